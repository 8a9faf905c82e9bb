"""A bar on stderr while models train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, final

__all__ = ["Shown", "bar"]


class Shown(Protocol):
    """A bar, or what stands for one where none is wanted."""

    def advance(self, count: int) -> None:
        """So many more units are done."""

    def say(self, text: str) -> None:
        """What has just happened."""


@final
class _Silent:
    def advance(self, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@contextmanager
def bar(what: str, total: int, *, quiet: bool) -> Iterator[Shown]:
    """A bar of `total` units, with the time that is left."""
    if quiet or not total:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<56.56}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)

        @final
        class Bar:
            def advance(self, count: int) -> None:
                progress.advance(task, count)

            def say(self, text: str) -> None:
                progress.update(task, description=text)

        yield Bar()
