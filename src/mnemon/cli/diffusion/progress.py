"""A bar on stderr while a command works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function that is told what comes next; each call is one unit of `total`."""
    if quiet:
        yield lambda doing: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<44.44}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as shown:
        task = shown.add_task(what, total=total)
        begun = -1

        def advance(doing: str) -> None:
            nonlocal begun
            begun += 1
            shown.update(task, description=doing, completed=begun)
            shown.refresh()  # before the work, so that no thread disturbs it while it is timed

        yield advance
