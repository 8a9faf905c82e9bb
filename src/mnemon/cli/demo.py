"""`mnemon demo`: a real model, a real text, every cache: a table and report.html."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.wording import milliseconds, percent, small

if TYPE_CHECKING:
    from rich.table import Table

    from mnemon.cli.demo_result import DemoResult, Row

MAX_NEW_TOKENS = 1024


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Hub name or folder; nothing for the bundled model."
        ),
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

    Caches: transformers' dynamic, static and (where the backend is there)
    quantized ones, and every mnemon recipe, with and without attach.
    Prints a table and writes report.html, which needs no network.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage.
    """
    try:
        num_context = output.parse_count(context)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--context") from error
    output.check_writable(out)

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
        raise output.OutputError(
            f"cannot write report.html to {out}: {error}; choose --out."
        ) from error
    if as_json:
        output.print_json({**result.to_dict(), "report": str(path)})
        return
    _print(result, path)


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

    # A pipe has no width; a report line that is cut or folded there helps nobody.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
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

    # Narrow on purpose: it has to fit 80 columns.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache", overflow="fold")  # the one column that may fold
    for title in (
        "tokens/s",
        "first\nms",
        "bytes/\ntoken",
        "peak\nMiB",
        "same\ntokens",
        "logits\ndiffer",
        "bits/\nbyte",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    library = ""
    for row in result.rows:
        if row.library != library:
            library = row.library
            table.add_row(f"[dim]{library}[/]")
        table.add_row(f" {row.name}", *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    def cell(value: Any, text: Callable[[Any], str]) -> str:
        return "\u2013" if value is None else text(value)

    return [
        cell(row.tokens_per_s, "{:.1f}".format),
        cell(row.first_token_s, lambda seconds: f"{1000 * seconds:,.0f}"),
        cell(row.bytes_per_token, "{:,.0f}".format),
        cell(row.peak_bytes, lambda size: f"{size / 2**20:,.1f}"),
        cell(row.agreement, percent),
        cell(row.logit_difference, small),
        cell(row.bits_per_byte, "{:.3f}".format),
    ]


def _findings(result: DemoResult) -> Iterator[str]:
    """The results that are no rows of the table, in one line each."""
    from rich.markup import escape

    for row in result.rows:
        if row.error:
            yield f"[red]{row.name} does not work with this model:[/] {escape(row.error)}"
    recalls = {tuple(row.recall.items()) for row in result.rows if row.recall}
    for recall in recalls:
        names = [row.name for row in result.rows if tuple(row.recall.items()) == recall]
        who = ", ".join(names) if len(recalls) > 1 else "with every cache"
        shares = ", ".join(f"{percent(share)} at {distance:,}" for distance, share in recall)
        yield f"Recall of planted words by distance, {who}: {shares} tokens."
    if result.reuse:
        fresh, kept, loaded = map(milliseconds, result.reuse.medians())
        yield (
            f"Prompt reuse, {result.reuse.num_reused:,} of {result.reuse.num_prompt:,} tokens: "
            f"first token after {fresh} computed, {kept} from a kept cache, "
            f"{loaded} from a file ({output.format_bytes(result.reuse.file_bytes)})."
        )
    for case in result.fed_twice:
        if case.error:
            verdict = f"[red]{escape(case.error)}[/]"
        else:
            verdict = f"{case.num_same} of {case.num_prompts} answers right"
            if case.num_held is not None:
                verdict += f", {case.num_held} tokens held where {case.num_right} are right"
            verdict = f"[{'green' if case.is_right else 'red'}]{verdict}[/]"
        yield f"A cached prompt of {case.num_prompt} tokens given again, {case.name}: {verdict}"
