"""`mnemon retrofit`: train a model to compress its own cache."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.errors import LearnedMemoryError

if TYPE_CHECKING:
    from mnemon.cli.models import LoadedModel
    from mnemon.memory.retrofitting import RetrofitOptions


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Hub name or folder; nothing: the bundled model."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder to write; a checkpoint lies beside it meanwhile."),
    ] = Path("retrofitted"),
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="dms drops tokens, dmc merges them, none: a control."),
    ] = "dms",
    ratio: Annotated[float, typer.Option("--ratio", "-r", help="Tokens seen per slot kept.")] = 4.0,
    window: Annotated[
        int | None,
        typer.Option("--window", help="DMS: tokens always kept (0: none). DMC: tokens averaged."),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="What decides: neuron or projection (dms only).")
    ] = None,
    factor: Annotated[
        float | None, typer.Option("--factor", help="What a decision's number is multiplied with.")
    ] = None,
    loss: Annotated[
        str, typer.Option("--loss", help="distill (from the model as it came), text, or both.")
    ] = "distill",
    steps: Annotated[int, typer.Option("--steps", help="Of the optimiser.")] = 500,
    length: Annotated[int, typer.Option("--length", help="Tokens of a row.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", help="Rows in a step.")] = 2,
    rate: Annotated[float, typer.Option("--lr", help="Of the model's weights.")] = 3e-5,
    decision_rate: Annotated[float, typer.Option("--decision-lr", help="Of what decides.")] = 1e-4,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="UTF-8 file to train on; may be given several times. [default: "
            "what the bundled model was trained with]",
            show_default=False,
        ),
    ] = None,
    pressure: Annotated[
        float, typer.Option("--pressure", help="Weight of what compression lacks of its target.")
    ] = 2.0,
    seed: Annotated[int, typer.Option("--seed", help="Of rows and noise.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    bfloat16: Annotated[
        bool | None,
        typer.Option(
            "--bfloat16/--float32",
            help="Compute in. [default: bfloat16 on a GPU]",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train MODEL until its own decisions keep one slot of its cache per RATIO tokens.

    Writes a normal model folder; mnemon.memory.load_retrofitted(FOLDER) loads it, and
    mnemon.Cache(model.config) compresses. Ctrl-C leaves a checkpoint, for --resume.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    target = out.expanduser()
    if resume:
        _check_checkpoint(target)
    _check_target(target)

    import torch

    from mnemon.memory.retrofitting import RetrofitOptions

    options = RetrofitOptions(
        method=method,
        ratio=ratio,
        steps=steps,
        length=length,
        batch=batch,
        window=window,
        source=source,
        factor=factor,
        loss=loss,
        rate=rate,
        decision_rate=decision_rate,
        pressure=pressure,
        seed=seed,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    from mnemon.cli.models import load_model
    from mnemon.cli.sources import read_text

    texts = None if text is None else [read_text(str(path)).text for path in text]
    loaded = load_model(model, dtype="float32", device=device)
    _check_length(loaded.model.config, options)
    facts = _train(loaded, options, texts, target, resume=resume, bfloat16=bfloat16, quiet=as_json)
    if as_json:
        output.print_json(facts)
        return
    from mnemon.cli.retrofit_view import result_lines

    print(result_lines(facts))


def _train(
    loaded: LoadedModel,
    options: RetrofitOptions,
    texts: list[str] | None,
    target: Path,
    *,
    resume: bool,
    bfloat16: bool | None,
    quiet: bool,
) -> dict[str, Any]:
    """Trains, calibrates, writes; what is reported."""
    from mnemon.cli.retrofit_view import watching
    from mnemon.memory.retrofitting.folder import write_folder
    from mnemon.memory.retrofitting.measuring import calibrate, measure
    from mnemon.memory.retrofitting.retrofit import (
        calibration_rows,
        make_rows,
        run_with_checkpoints,
    )
    from mnemon.memory.retrofitting.trainer import Retrofitter

    begin = time.perf_counter()
    checkpoint = _checkpoint(target)
    rows = make_rows(texts, loaded.tokenizer, options, loaded.model)
    trainer = Retrofitter(loaded.model, rows, options, autocast=bfloat16)
    target.parent.mkdir(parents=True, exist_ok=True)
    with watching(options, quiet=quiet) as view:
        run_with_checkpoints(trainer, checkpoint, resume=resume, every_s=60, after_step=view)
    facts: dict[str, Any] = {
        "command": "retrofit",
        "model": loaded.name,
        "out": str(target),
        "method": options.method,
        "ratio": options.ratio,
        "steps": options.steps,
        "tokens": trainer.num_tokens,
        "seed": options.seed,
        "loss": view.last.loss if view.last else None,
    }
    control = trainer.control
    if control is not None:
        if not quiet:
            print("setting the offset of the decisions ...", file=sys.stderr, flush=True)
        judged = calibration_rows(rows, options, loaded.model, loaded.tokenizer, own=texts is None)
        facts["before_calibration"] = measure(loaded.model, judged).ratio
        found = calibrate(loaded.model, judged, float(options.ratio))
        facts |= {
            "measured": found.ratio,
            "by_head": found.by_head,
            "judged_tokens": found.num_tokens,
            "offset": control.compression.offset,
            "window": control.compression.window,
        }
    facts["seconds"] = time.perf_counter() - begin
    write_folder(loaded.model, loaded.tokenizer, target, facts)
    checkpoint.unlink(missing_ok=True)
    return facts


def _checkpoint(target: Path) -> Path:
    return target.with_name(f"{target.name}.checkpoint.pt")


def _check_checkpoint(target: Path) -> None:
    path = _checkpoint(target)
    if not path.is_file():
        raise LearnedMemoryError(
            f"{path} is not there: nothing to go on from. Start without --resume, or give the "
            f"--out of the interrupted run."
        )


def _check_target(target: Path) -> None:
    """Fails before hours of work, not after."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LearnedMemoryError(
            f"{target} is there and not an empty folder; choose another --out, or remove it."
        )
    output.check_writable(target.absolute().parent)


def _check_length(config: Any, options: RetrofitOptions) -> None:
    from mnemon.cli.sources import context_limit

    limit = context_limit(config)
    if limit is not None and options.length > limit:
        raise LearnedMemoryError(
            f"--length {options.length} is more than the model's context of {limit} tokens; give "
            f"a smaller one."
        )
