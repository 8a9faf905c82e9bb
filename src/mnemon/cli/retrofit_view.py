"""What `mnemon retrofit` shows: a bar and a live table while it trains, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from mnemon.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress as Bar

    from mnemon.memory.retrofitting import Progress, RetrofitOptions

_SMOOTHING = 0.9
_MOST_HEADS = 16
_ENOUGH = 0.8  # of the ratio, before calibration


@final
class View:
    """Takes the progress of each step, and draws it if there is a place to draw."""

    def __init__(self, options: RetrofitOptions, live: Live | None, bar: Bar | None) -> None:
        self._options, self._live, self._bar = options, live, bar
        self._task = None if bar is None else bar.add_task("retrofit", total=options.steps)
        self._loss = 0.0
        self._kept: list[list[float]] = []
        self.last: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        mix = 0.0 if self.last is None else _SMOOTHING
        self._loss = mix * self._loss + (1 - mix) * progress.loss
        # Shares kept are averaged, not ratios.
        now = [[1 / ratio for ratio in layer] for layer in progress.by_head]
        old = self._kept or now
        self._kept = [
            [mix * a + (1 - mix) * b for a, b in zip(*pair, strict=True)]
            for pair in zip(old, now, strict=True)
        ]
        self.last = progress
        if self._live is not None and self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress.step)
            self._live.update(self._drawn(progress))

    def _drawn(self, progress: Progress) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        assert self._bar is not None
        kept = [share for layer in self._kept for share in layer]
        measured = len(kept) / sum(kept) if kept else 1.0
        line = Text(
            f"loss {self._loss:.4f} nats per token   ratio asked {progress.ratio:.2f}   "
            f"measured {measured:.2f}   lacking {progress.lacking:.4f}"
        )
        if not kept:
            return Group(self._bar, line)
        table = Table("layer", box=None, pad_edge=False)
        heads = min(_MOST_HEADS, len(self._kept[0]))
        for head in range(heads):
            table.add_column(f"head {head}", justify="right")
        table.add_column("all", justify="right")
        for index, layer in enumerate(self._kept):
            cells = [f"{1 / share:.2f}" for share in layer[:heads]]
            table.add_row(str(index), *cells, f"{len(layer) / sum(layer):.2f}")
        return Group(self._bar, line, table)


@contextmanager
def watching(options: RetrofitOptions, *, quiet: bool) -> Iterator[View]:
    """A live view on stderr; without a terminal, or if `quiet`, nothing is drawn."""
    if quiet:
        yield View(options, None, None)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, auto_refresh=False)
    with Live(bar, console=console, refresh_per_second=4, transient=True) as live:
        yield View(options, live, bar)


def result_lines(facts: dict[str, Any]) -> str:
    """The table of compression, and where the model lies."""
    ending = (
        f"wrote {facts['out']} after {facts['steps']} steps of {facts['tokens']:,} tokens in all, "
        f"{facts['seconds']:.0f} s"
    )
    if "by_head" not in facts:
        return f"a control: no compression\n{ending}"
    by_head: Sequence[Sequence[float]] = facts["by_head"]
    heads = min(_MOST_HEADS, len(by_head[0]))
    rows = [
        [str(index), *(f"{ratio:.2f}" for ratio in layer[:heads]), f"{_mean_ratio(layer):.2f}"]
        for index, layer in enumerate(by_head)
    ]
    table = output.plain_table(["layer", *(f"head {head}" for head in range(heads)), "all"], rows)
    short = facts["before_calibration"] < _ENOUGH * facts["ratio"]
    warning = (
        "warning: training ended far below the ratio asked for, and the offset made up the rest: "
        "expect a poor model. Train for more steps, or raise --decision-lr, --factor or "
        "--pressure.\n"
    )
    return (
        f"{table}\n"
        f"{warning if short else ''}"
        f"tokens per slot on {facts['judged_tokens']:,} tokens: {facts['measured']:.2f} "
        f"(asked {facts['ratio']:g}; {facts['before_calibration']:.2f} before the offset was set "
        f"to {facts['offset']:.2f})\n"
        f"{ending}\n"
        f"load it: mnemon.memory.load_retrofitted({facts['out']!r})"
    )


def _mean_ratio(ratios: Sequence[float]) -> float:
    return len(ratios) / sum(1 / ratio for ratio in ratios)
