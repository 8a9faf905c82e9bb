"""`mnemon demo`: a real model, a real text, every cache: a table and report.html."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.errors import MnemonError

if TYPE_CHECKING:
    from rich.table import Table

    from mnemon.cli.demo_result import DemoResult, Row

MAX_NEW_TOKENS = 1024


def command(
    model: Annotated[
        str | None, typer.Argument(help="Hub name or folder; nothing for the bundled model.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", help="Text to read; this project's own when left out.")
    ] = None,
    context: Annotated[
        str, typer.Option("--context", help="Tokens of the prompt, e.g. 2048 or 2k.")
    ] = "2k",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=2, max=MAX_NEW_TOKENS, help="Tokens to generate.")
    ] = 48,
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html.")] = Path("."),
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run one model on one text with every cache, and set the results side by side.

    Caches: transformers' dynamic, static and (where the backend is installed) quantized ones, and
    every mnemon recipe, with and without attach. Prints a table and writes report.html, which
    needs no network. Exit codes: 0 done; 1 an error, with a message; 2 wrong usage.
    """
    try:
        num_context = output.parse_count(context)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--context") from error
    _check_writable(out)

    from mnemon.cli.sources import own_text, read_text

    source = own_text() if file is None else read_text(file)
    with _progress(quiet=as_json) as start:
        from mnemon.cli import demo_run, report
        from mnemon.cli.models import load_model

        loaded = load_model(model, dtype=dtype, device=device)
        options = demo_run.DemoOptions(context=num_context, num_new=new_tokens)
        result = demo_run.run(loaded, source, options, progress=start)
    try:
        path = report.write(result, out)
    except OSError as error:
        raise OutputError(f"cannot write report.html to {out}: {error}; choose --out.") from error
    if as_json:
        output.print_json({**result.to_dict(), "report": str(path)})
        return
    _print(result, path)


class OutputError(MnemonError, OSError):
    """A result cannot be written where it was asked for."""


def _check_writable(folder: Path) -> None:
    """Fail before minutes of work, not after."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out."
        ) from error


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int], Callable[[str], None]] | None]:
    """A progress bar on stderr, which first says that the model is being loaded."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading torch and the model", total=None)
        num_done = -1

        def start(num_pieces: int) -> Callable[[str], None]:
            def advance(what: str) -> None:
                nonlocal num_done
                num_done += 1
                bar.update(
                    task, description=what, total=num_pieces, completed=min(num_done, num_pieces)
                )

            return advance

        yield start


def _print(result: DemoResult, path: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    model, settings = result.model, result.settings
    console.print(
        f"\n[bold]{model['name']}[/] ({model['parameters'] / 1e6:.1f}M parameters, "
        f"{model['dtype']}, {model['device']}), prompt: {settings['context']:,} tokens of "
        f"{result.source['name']}, {settings['new_tokens']} new tokens, "
        f"median of {settings['rounds']} rounds in turn"
    )
    console.print(_table(result))
    for note in result.notes:
        console.print(f"[dim]{note}[/]")
    for line in _findings(result):
        console.print(line)
    console.print(f"\nreport: [bold]{path}[/]  ({result.elapsed_s:.0f} s)", soft_wrap=True)


def _table(result: DemoResult) -> Table:
    from rich import box
    from rich.table import Table

    # A pipe has no width of its own: 80 columns would cut figures.
    width = None if sys.stdout.isatty() else 112
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=width, expand=False)
    table.add_column("cache", no_wrap=True)
    for title in (
        "tokens/s",
        "first\ntoken",
        "bytes/\ntoken",
        "peak\nmemory",
        "same\ntokens",
        "logits\ndiffer",
        "bits/\nbyte",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    if any(row.recall for row in result.rows):
        for distance in _recall_distances(result.rows):
            table.add_column(f"recall\nat {distance:,}", justify="right", no_wrap=True)
    library = ""
    for row in result.rows:
        if row.library != library:
            library = row.library
            table.add_row(f"[dim]{library}[/]")
        table.add_row(f"  {row.name}", *_cells(row, result.rows))
    return table


def _recall_distances(rows: list[Row]) -> list[int]:
    """The distances that the terminal has room for: the shortest, a middle one, the longest."""
    distances = sorted({distance for row in rows for distance in row.recall})
    return (
        sorted({distances[0], distances[len(distances) // 2], distances[-1]}) if distances else []
    )


def _cells(row: Row, rows: list[Row]) -> list[str]:
    from rich.markup import escape

    from mnemon.cli.report import percent, small

    if row.error:
        return [f"[red]no: {escape(row.error)}[/]"]

    def cell(value: Any, text: Callable[[Any], str]) -> str:
        return "\u2013" if value is None else text(value)

    return [
        cell(row.tokens_per_s, "{:.1f}".format),
        cell(row.first_token_s, lambda s: f"{1000 * s:,.0f} ms"),
        cell(row.bytes_per_token, "{:,.0f}".format),
        cell(row.peak_bytes, output.format_bytes),
        cell(row.agreement, percent),
        cell(row.logit_difference, small),
        cell(row.bits_per_byte, "{:.3f}".format),
        *(cell(row.recall.get(distance), percent) for distance in _recall_distances(rows)),
    ]


def _findings(result: DemoResult) -> Iterator[str]:
    """The two results that are no rows of the table, in one line each."""
    if result.reuse:
        fresh, kept, loaded = (1000 * seconds for seconds in result.reuse.medians())
        yield (
            f"Prompt reuse, {result.reuse.num_reused:,} of {result.reuse.num_prompt:,} tokens: "
            f"first token after {fresh:,.0f} ms computed, {kept:,.0f} ms from a kept cache, "
            f"{loaded:,.0f} ms from a file ({output.format_bytes(result.reuse.file_bytes)})."
        )
    for case in result.fed_twice:
        if case.error:
            verdict = f"[red]{case.error}[/]"
        elif case.same and case.num_held == case.num_right:
            verdict = "[green]the right answer[/]"
        else:
            verdict = (
                f"[red]{'the right' if case.same else 'another'} answer, without an error[/] "
                f"({case.num_held} tokens held, {case.num_right} are right)"
            )
        yield f"A cached prompt of {case.num_prompt} tokens given again, {case.name}: {verdict}."
