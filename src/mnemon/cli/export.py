"""`mnemon export`: a model with free lengths for torch, onnxruntime or AOTInductor, verified."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output

if TYPE_CHECKING:
    from mnemon.export import Exported, Report


def command(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; tiny-stdlib is the bundled model.")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write; it must not exist or be empty.")
    ] = None,
    to: Annotated[str, typer.Option("--to", help="onnx, program or aoti.")] = "onnx",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="auto (as saved; onnx: never bfloat16), float32, float16, bfloat16."
        ),
    ] = "auto",
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX; newest if unset.")] = None,
    cache: Annotated[
        str,
        typer.Option(
            "--cache", help="How the graph keeps its cache: static(4096), int8, int4, int2, fp8."
        ),
    ] = "",
    bound: Annotated[
        list[str] | None,
        typer.Option("--range", help="Pin or bound an axis: batch=1, past=0:4096. Repeatable."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with the model afterwards.")
    ] = True,
    verify_only: Annotated[
        Path | None, typer.Option("--verify-only", help="Compare this export; write nothing.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds for the comparison.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export MODEL to OUT with a cache whose lengths stay free, and compare it with the model.

    Exit codes: 0 done; 1 an error, with a message (a wrong number among them: nothing is written
    then); 2 wrong usage; 3 --verify-only found wrong numbers; 130 interrupted.
    """
    if (out is None) == (verify_only is None):
        raise typer.BadParameter("name a folder to write, or --verify-only and a folder to read.")
    ranges: dict[str, int | tuple[int | None, int | None]] = {}
    for name, limits in map(_range, bound or ()):
        if ranges.setdefault(name, limits) != limits:
            raise typer.BadParameter(f"--range names {name!r} twice, and differently.")
    if verify_only is not None:
        unused = {"--cache": cache, "--range": ranges, "--opset": opset, "--no-verify": not verify}
        given = [name for name, value in unused.items() if value]
        if given:
            raise typer.BadParameter(
                f"--verify-only compares the export as it is; leave out {', '.join(given)}."
            )

    from mnemon.cli.models import load_model
    from mnemon.export import export_model, load_export
    from mnemon.export.targets import target
    from mnemon.export.verify import verify as compare

    if verify_only is not None:
        exported = load_export(verify_only)
        loaded = load_model(
            model, dtype=exported.manifest.dtype, device="cpu", with_tokenizer=False
        )
        with _Progress(as_json) as progress:
            report = compare(loaded.model, exported, timeout_s=timeout, progress=progress)
        _show(exported, report, loaded.name, verify_only, as_json=as_json)
        raise typer.Exit(3 if report.wrong or not report.num_right else 0)
    assert out is not None
    target(to)  # a wrong name is said before a model is loaded
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists already; choose a new folder or empty it.")
    loaded = load_model(model, dtype=dtype, device="cpu", with_tokenizer=False)
    if dtype == "auto" and to == "onnx" and str(loaded.model.dtype) == "torch.bfloat16":
        loaded.model.float()
        typer.echo(
            "note: saved in bfloat16, which onnxruntime's CPU kernels lack; exported in float32 "
            "(--dtype float16 takes half of it).",
            err=True,
        )
    begin = time.perf_counter()
    with _Progress(as_json) as progress:
        exported = export_model(
            loaded.model,
            to=to,
            cache=cache,
            ranges=ranges,
            verify=verify,
            opset=opset,
            timeout_s=timeout,
            progress=progress,
        )
    exported.save(out)
    took = time.perf_counter() - begin
    _show(exported, exported.report, loaded.name, out, took, as_json=as_json)


def _range(text: str) -> tuple[str, int | tuple[int | None, int | None]]:
    name, found, value = text.partition("=")
    low, several, high = value.partition(":")
    try:
        if not found or not name:
            raise ValueError
        if not several:
            return name, int(low)
        return name, (int(low) if low else None, int(high) if high else None)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: expected AXIS=SIZE or AXIS=LEAST:MOST, as in batch=1 or past=0:4096.",
            param_hint="--range",
        ) from None


class _Progress:
    """A line that says what is being done; nothing where nobody looks."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = None if quiet or not console.is_terminal else console.status("export")
        self._done = 0

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, what: str, done: int) -> None:
        self._done += done
        if self._status is not None and what:
            self._status.update(what)


def _show(
    exported: Exported,
    report: Report,
    name: str,
    folder: Path,
    took_s: float | None = None,
    *,
    as_json: bool,
) -> None:
    sizes = {file: (exported.folder / file).stat().st_size for file in exported.manifest.files}
    if as_json:
        facts: dict[str, Any] = {
            "model": name,
            "target": exported.target,
            "folder": str(folder),
            "seconds": took_s,
            "bytes": sum(sizes.values()),
            "shapes": exported.shapes.summary(),
            "evidence": exported.shapes.to_json(),
            "largest_difference": report.largest_difference,
            "verdicts": report.to_json(),
        }
        output.print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{name} to {exported.target}", title_justify="left")
    for column in ("input", "axes", "evidence"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, str], list[str]] = {}
    for tensor, axes in exported.shapes.summary().items():
        why = {one.evidence: 0 for one in exported.shapes.of(tensor) if one.is_dynamic}
        rows.setdefault((", ".join(map(str, axes)), "; ".join(why)), []).append(tensor)
    for (axes_text, why_text), tensors in rows.items():
        shown = tensors[0] if len(tensors) == 1 else f"{tensors[0]} and {len(tensors) - 1} more"
        table.add_row(shown, axes_text, why_text)
    console.print(table)
    console.print(str(report), style=None if not report.wrong else "red", highlight=False)
    ending = "" if took_s is None else f" in {took_s:.1f} s"
    console.print(f"{folder}: {output.format_bytes(sum(sizes.values()))}{ending}", highlight=False)
