"""`mnemon bench`: speed and memory against transformers' own caches over a sweep of contexts.

With `--kernels` attention alone, against torch's and against the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli import output
from mnemon.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemon.cli import bench_run
    from mnemon.cli.contenders import Contender

MODEL_CONTEXTS = "128,512,1k,2k"
SHAPE_CONTEXTS = "128,1k,8k,32k"
KERNEL_CONTEXTS = "1k,4k,16k,64k"
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
            f"[default: {MODEL_CONTEXTS}; with --shape {SHAPE_CONTEXTS}; "
            f"with --kernels {KERNEL_CONTEXTS}]",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Random weights instead of a model: 162m or tiny."),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Attention of one decode step alone, without a model."),
    ] = False,
    heads: Annotated[int, typer.Option("--heads", min=1, help="With --kernels: of queries.")] = 32,
    kv_heads: Annotated[
        int, typer.Option("--kv-heads", min=1, help="With --kernels: of keys and values.")
    ] = 8,
    head_dim: Annotated[
        int, typer.Option("--head-dim", min=1, help="With --kernels: their width.")
    ] = 128,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="Only this cache, as the table names it, or any recipe (with or without "
            "' + attach'), or quanto-4, hqq-4; with --kernels a format: bf16, int4, ...; "
            "repeatable. What everything is compared with always runs.",
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
    prefill_rounds: Annotated[
        int, typer.Option("--prefill-rounds", min=1, help="With prefill: how often, in turns.")
    ] = 1,
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
        typer.Option(
            "--out",
            "-o",
            help="Write bench.html, .md, .json and charts to this folder (with --kernels "
            "kernels.html, ...).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed and memory against transformers' own caches, over a sweep of contexts.

    All caches hold the same content and take turns in one process. Exits with 3 if one that
    should give the same tokens in float32 does not. With --kernels attention alone is measured,
    against torch's and against how fast memory can be read.
    """
    if kernels:
        if model is not None or shape is not None:
            raise typer.BadParameter("--kernels takes --heads and --head-dim, no model or --shape")
        if heads % kv_heads:
            raise typer.BadParameter(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
        _kernels(
            _contexts(KERNEL_CONTEXTS if contexts is None else contexts),
            *(cache, heads, kv_heads, head_dim, batch, rounds, device, threads, out, as_json),
        )
        return
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
        prefill_rounds=prefill_rounds,
        check=check,
        batch=batch,
    )
    loaded, name = _load(model, shape, dtype, device, threads)
    _check_lengths(loaded, settings, name)
    rivals = _rivals(loaded, cache, main_only=shape is not None and not every)
    with _progress(name, bench_run.num_units(settings, rivals)) as progress:
        results = bench_run.measure(loaded, rivals, settings, progress)
    record = bench_report.record(name, loaded, settings, results, environment.environment())
    if out is not None:
        bench_report.write(record, out)
    if as_json:
        output.print_json(record)
    else:
        bench_report.show(record, out)
    if any(row["same_tokens"] is False for row in record["results"]):
        raise typer.Exit(output.EXIT_NO)


def _kernels(
    contexts: tuple[int, ...],
    formats: list[str] | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    rounds: int,
    device: str,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """`mnemon bench --kernels`."""
    import torch

    from mnemon.cli import bench_kernels, bench_kernels_report, environment, models

    unknown = [name for name in formats or () if name not in bench_kernels.FORMATS]
    if unknown:
        names = ", ".join(bench_kernels.FORMATS)
        raise typer.BadParameter(f"--cache: with --kernels one of {names}; got {unknown[0]!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = bench_kernels.Settings(
        contexts=contexts,
        formats=tuple(dict.fromkeys(formats or bench_kernels.FORMATS)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=batch,
        rounds=rounds,
        device=str(models.parse_device(device)),
    )
    with _progress("kernels", bench_kernels.num_units(settings)) as progress:
        measured = bench_kernels.measure(settings, progress)
    record = bench_kernels_report.record(settings, measured, environment.environment())
    if out is not None:
        bench_kernels_report.write(record, out)
    if as_json:
        output.print_json(record)
    else:
        bench_kernels_report.show(record, out)


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


def _check_lengths(model: PreTrainedModel, settings: bench_run.Settings, name: str) -> None:
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
    from mnemon.cli.contenders import contender, contenders
    from mnemon.errors import RecipeError

    known = contenders(model)
    if wanted is None:
        chosen = {*MAIN_CACHES} if main_only else {rival.name for rival in known}
        return [rival for rival in known if rival.name in chosen]
    found = {REFERENCE: known[0]}
    for name in wanted:
        try:
            rival = contender(model, name)
        except RecipeError as error:
            names = ", ".join(sorted(each.name for each in known))
            raise typer.BadParameter(
                f"--cache: no cache {name!r} here; there are {names}, and every recipe. {error}"
            ) from error
        found[rival.name] = rival
    return list(found.values())


@contextmanager
def _progress(name: str, num_units: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on stderr, so that --json stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=num_units)

        def progress(doing: str, units: int) -> None:
            bar.update(task, advance=units, description=doing or None)
            bar.refresh()  # before the work, so that the thread that draws does not disturb it

        yield progress
