"""How results read: in the terminal, as Markdown, as cells of a page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mnemon.cli.diffusion.record import AXES
from mnemon.cli.diffusion.settings import FEWER_STEPS
from mnemon.cli.output import format_bytes
from mnemon.cli.wording import percent, times

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "cells",
    "columns",
    "console",
    "cost_grid",
    "markdown_table",
    "notes",
    "show_costs",
    "show_rows",
    "title",
]

ABSENT = "\u2013"
_WRITERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "calls": ("calls", lambda row: f"{row['calls']:.2f}"),
    "macs_share": ("MACs", lambda row: f"{row['macs_share']:.2f}"),
    "seconds": ("s", lambda row: f"{row['seconds']:.3g}"),
    "speedup": ("speed-up", lambda row: times(row["speedup"])),
    "psnr": ("PSNR", lambda row: _with_sd(row["psnr"], row["psnr_sd"])),
    "peak_bytes": ("held", lambda row: format_bytes(row["peak_bytes"])),
    "accuracy": ("class", lambda row: percent(row["accuracy"])),
    "distance": ("distance", lambda row: f"{row['distance']:.3g}"),
}


def _with_sd(value: float, sd: float | None) -> str:
    return f"{value:.1f}" if sd is None else f"{value:.1f} ±{sd:.1f}"


def columns(rows: Sequence[dict[str, Any]], *, without: Sequence[str] = ()) -> dict[str, str]:
    """The figures that any row has, and their titles."""
    return {
        key: heading
        for key, (heading, _) in _WRITERS.items()
        if key not in without and any(row[key] is not None for row in rows)
    }


def cells(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """A row's figures as text."""
    found = []
    for key in keys:
        if row[key] is not None:
            found.append(_WRITERS[key][1](row))
        else:
            found.append("exact" if key == "psnr" and row["exact"] else ABSENT)
    return found


def console() -> Console:
    """A pipe has no width; a line that is cut or folded there helps nobody."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def title(pipe: dict[str, Any], environment: dict[str, Any]) -> str:
    """One line on the pipeline and the machine."""
    return (
        f"{pipe['name']} · {pipe['parameters'] / 1e6:.1f}M parameters, {pipe['blocks']} blocks of "
        f"{pipe['width']}, {pipe['tokens']} tokens · {pipe['sampler']} · "
        f"{environment['torch_threads']} threads"
    )


def show_rows(out: Console, rows: Sequence[dict[str, Any]], keys: dict[str, str]) -> None:
    """Prints a row for each setting."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in keys.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["error"] is None:
            style = "dim" if not row["library"] else ""
            table.add_row(escape(row["name"]), *cells(row, list(keys)), style=style)
    out.print(table)
    for row in rows:
        if row["error"]:
            out.print(f"[red]{escape(row['name'])}[/] could not run: {escape(row['error'])}")


def cost_grid(tables: Sequence[dict[str, Any]], axis: str) -> tuple[list[str], list[list[str]]]:
    """Families by costs along one axis: column titles, and rows with the best PSNR in each cell.

    The order is that of the middle cost; the best of each column is marked with a star.
    """
    chosen = [table for table in tables if table["axis"] == axis]
    if not chosen:
        return [], []
    by_cost = [{entry["family"]: entry for entry in table["families"]} for table in chosen]
    middle = by_cost[len(by_cost) // 2]
    names = dict.fromkeys([*middle, *(name for found in by_cost for name in found)])
    lines = []
    for name in names:
        line = [name]
        for found, table in zip(by_cost, chosen, strict=True):
            entry = found.get(name)
            if entry is None:
                line.append(ABSENT)
                continue
            star = "*" if table["families"][0] is entry else ""
            gain = (
                "" if name == FEWER_STEPS or entry["gain"] is None else f" ({entry['gain']:+.1f})"
            )
            line.append(f"{_with_sd(entry['psnr'], entry['psnr_sd'])}{gain}{star}")
        lines.append(line)
    return [f"at {table['cost']:g}" for table in chosen], lines


def show_costs(out: Console, tables: Sequence[dict[str, Any]]) -> None:
    """Prints what is best at equal cost, along both axes."""
    from rich import box
    from rich.table import Table

    for axis, word in AXES.items():
        headings, lines = cost_grid(tables, axis)
        if not lines:
            continue
        out.print(f"\nBest PSNR within a share of the uncached {word}, and over fewer steps")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for line in lines:
            plain = line[0] == FEWER_STEPS
            words = [f"[bold green]{w[:-1]}[/]" if w.endswith("*") else w for w in line]
            table.add_row(*words, style="dim" if plain else "")
        out.print(table)


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is said of settings that did not run, or run without effect."""
    return [
        f"{row['name']}: {row['error'] or row['note']}"
        for row in rows
        if row["error"] or row["note"]
    ]


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a repository; the first column is text."""
    return "\n".join(
        [
            f"| {' | '.join(headings)} |",
            f"|---|{'---:|' * (len(headings) - 1)}",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )
