"""`mnemon bench`: speed and memory against transformers' own caches over a sweep of contexts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemon.cli.bench_run import Settings
    from mnemon.cli.contenders import Contender

MODEL_CONTEXTS = "128,512,1k,2k"
SHAPE_CONTEXTS = "128,1k,8k,32k"
MAIN_CACHES = ("DynamicCache", "StaticCache", "dense + attach")


def command(
    model: Annotated[
        str | None, typer.Argument(help="Hub name or folder; nothing for the bundled model.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            "-c",
            help=f"Tokens held while decoding, separated by commas. "
            f"[default: {MODEL_CONTEXTS}; with --shape {SHAPE_CONTEXTS}]",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Random weights instead of a model: 162m or tiny."),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="Only this cache, as the table names it; repeatable. DynamicCache always runs.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="With --shape: all caches, not only the main three.")
    ] = False,
    prefill: Annotated[
        bool | None,
        typer.Option(
            "--prefill/--no-prefill",
            help="Fill by running the model (timed), or with random keys and values (quick). "
            "[default: run a model, make up for a --shape]",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare tokens in float32 as well.")
    ] = True,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Turns that each cache takes.")
    ] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps in each turn.")] = 8,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Rows.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="auto, float32, bfloat16 or float16; auto is bfloat16 for a --shape."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; torch's choice if unset.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write bench.html, .md, .json and charts to this folder."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed and memory against transformers' own caches, over a sweep of contexts.

    All caches hold the same content and take turns in one process. Exits with 3 if one that
    should give the same tokens in float32 does not.
    """
    from mnemon.cli import bench_report, bench_run, environment

    if model is not None and shape is not None:
        raise typer.BadParameter("give a model or --shape, not both")
    lengths = _contexts(
        (SHAPE_CONTEXTS if shape else MODEL_CONTEXTS) if contexts is None else contexts
    )
    settings = bench_run.Settings(
        contexts=lengths,
        rounds=rounds,
        steps=steps,
        prefill=shape is None if prefill is None else prefill,
        check=check,
        batch=batch,
    )
    loaded, name = _load(model, shape, dtype, device, threads)
    _check_lengths(loaded, settings, name)
    rivals = _rivals(loaded, cache, main_only=shape is not None and not every)
    results = _with_progress(loaded, rivals, settings, name)
    record = bench_report.record(name, loaded, settings, results, environment.environment())
    if out is not None:
        bench_report.write(record, out)
    if as_json:
        output.print_json(record)
    else:
        bench_report.show(record, out)
    if any(row["same_tokens"] is False for row in record["results"]):
        raise typer.Exit(output.EXIT_NO)


def _contexts(text: str) -> tuple[int, ...]:
    try:
        return tuple(output.parse_count(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--contexts: {error}") from error


def _load(
    model: str | None, shape: str | None, dtype: str, device: str, threads: int | None
) -> tuple[PreTrainedModel, str]:
    import torch

    from mnemon.cli import bench_run, models

    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        loaded = models.load_model(model, dtype=dtype, device=device)
        return loaded.model, loaded.name
    chosen = models.parse_dtype("bfloat16" if dtype == "auto" else dtype)
    where = models.parse_device(device)
    return bench_run.random_model(shape, chosen, where), f"random Llama {shape}"


def _check_lengths(model: PreTrainedModel, settings: Settings, name: str) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(settings.contexts) + settings.capacity
    if isinstance(limit, int) and longest > limit:
        raise ModelError(
            f"{name} was made for {limit:,} tokens; the longest context and the steps after it "
            f"need {longest:,}. Use smaller --contexts, or fewer --rounds and --steps."
        )


def _rivals(
    model: PreTrainedModel, wanted: list[str] | None, *, main_only: bool
) -> list[Contender]:
    from mnemon.cli.bench_run import REFERENCE
    from mnemon.cli.contenders import contenders

    known = contenders(model)
    names = {rival.name for rival in known}
    unknown = [name for name in wanted or [] if name not in names]
    if unknown:
        raise typer.BadParameter(
            f"--cache: no cache {unknown[0]!r} here; there are {', '.join(sorted(names))}"
        )
    chosen = set(wanted or (MAIN_CACHES if main_only else names)) | {REFERENCE}
    return [rival for rival in known if rival.name in chosen]


def _with_progress(
    model: PreTrainedModel, rivals: list[Contender], settings: Settings, name: str
) -> list[Any]:
    """Measure under a progress bar on stderr, so that --json stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from mnemon.cli import bench_run

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=bench_run.num_units(settings, rivals))

        def progress(doing: str, units: int) -> None:
            bar.update(task, advance=units, description=doing or None)
            bar.refresh()  # before the work, so that the thread that draws does not disturb it

        return bench_run.measure(model, rivals, settings, progress)
