"""What `mnemon migrate` shows people: diffs, what could not be decided, and one line at the end."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mnemon.cli import output

if TYPE_CHECKING:
    from mnemon.migrate import FileResult

__all__ = ["diffs", "progress", "rules", "summary"]

_COLOURS = {"+": "green", "-": "red", "@": "dim"}


@contextlib.contextmanager
def progress(total: int, *, hidden: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal for what takes longer than a moment; nothing anywhere else."""
    if hidden or total < 50 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda: bar.advance(task)


def diffs(results: list[FileResult]) -> None:
    """Print every change as a unified diff."""
    for result in results:
        if result.changed:
            for line in _diff(result):
                print(line)


def _diff(result: FileResult) -> Iterator[str]:
    before, after = (_lines(content) for content in (result.before, result.after))
    path = str(result.path).removeprefix("./").lstrip("/")
    names = f"a/{path}", f"b/{path}"
    for line in difflib.unified_diff(before, after, *names, lineterm=""):
        colour = "bold" if line.startswith(("+++", "---")) else _COLOURS.get(line[:1])
        shown = line.rstrip("\r")
        yield output.paint(shown, colour) if colour else shown


def _lines(content: bytes) -> list[str]:
    # By \n alone: a diff must not break lines where Python has none.
    text = content.decode("utf-8", "replace")
    lines = text.split("\n")
    return lines[:-1] if text.endswith("\n") else lines


def summary(
    results: list[FileResult], num_files: int, *, wrote: bool, listed: bool = False
) -> None:
    """Print what is left for people, and one line about all.

    Args:
        results: of the files with anything to say.
        num_files: looked at.
        wrote: the rewrites are on disk.
        listed: name each place that would be rewritten; a diff shows them otherwise.
    """
    from mnemon.migrate import Status

    if listed:
        would = [
            (f"{result.path}:{finding.place}", finding.rule, finding.message)
            for result in results
            for finding in result.of(Status.REWRITTEN)
        ]
        if would:
            _table("Would rewrite", ("where", "name", "how"), would)
    undecided = [
        (f"{result.path}:{finding.place}", finding.rule, finding.message)
        for result in results
        for finding in result.of(Status.UNDECIDED)
    ]
    if undecided:
        _table("Could not decide", ("where", "name", "why"), undecided)
    broken = [
        (f"{result.path}:{problem.place}" if problem.place else result.path, problem.message)
        for result in results
        for problem in result.problems
    ]
    if broken:
        _table("Could not read or write", ("where", "why"), broken)
    num_rewritten = sum(len(result.of(Status.REWRITTEN)) for result in results)
    num_changed = sum(result.changed for result in results)
    verb = "rewrote" if wrote else "would rewrite"
    message = f"{num_files:,} {_many('file', num_files)}: {verb} {num_rewritten:,} "
    message += f"{_many('place', num_rewritten)} in {num_changed:,}, {len(undecided):,} undecided"
    if broken:
        message += f", {len(broken):,} with errors"
    print(output.paint(message, "bold", sys.stderr), file=sys.stderr)


def _many(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """On stderr, so that a diff on stdout stays one that `patch` reads."""
    if not sys.stderr.isatty():
        for where, *rest in rows:
            print(f"{where}: {': '.join(rest)}", file=sys.stderr)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(stderr=True, highlight=False).print(table)


def rules(*, as_json: bool) -> None:
    """Print every name that is looked for."""
    from mnemon.migrate.loading import EXTRA_RULES
    from mnemon.migrate.rules import RULES
    from mnemon.names import NAMES

    used = {key for rule in RULES for key in rule.keys}
    found = [(n.key, n.spelling, n.modern, n.meaning) for n in NAMES if n.key in used]
    found += [(key, *texts) for key, texts in EXTRA_RULES.items()]
    if as_json:
        output.print_json(
            [
                {"rule": key, "old": old, "modern": modern, "why": why}
                for key, old, modern, why in found
            ]
        )
        return
    print(
        output.plain_table(
            ("rule", "old", "modern"),
            [row[:3] for row in found],
            left=3,
        )
    )
