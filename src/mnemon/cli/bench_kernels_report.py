"""What `mnemon bench --kernels` shows and writes: a table, kernels.json, .md, .html and charts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli import output
from mnemon.cli.bench_kernels import REFERENCE, Row, Run, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["record", "show", "write"]

COLUMNS = ("ms", "MiB", "GB/s", "of read", "x SDPA", "x torch", "x bf16")
_COLOURS = {
    "bf16": "#1d4ed8",
    "fp32": "#60a5fa",
    "int8": "#0b6e5f",
    "int4": "#34a391",
    "int2": "#7c3aed",
    "fp8": "#be185d",
}
_THEIRS = ("#6b7280", "#a16207", "#c2410c")


def record(settings: Settings, run: Run, environment: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, JSON-able."""
    best, middle = max(run.read_speeds), statistics.median(run.read_speeds)
    at: dict[int, dict[str, Row]] = {}
    for row in run.rows:
        at.setdefault(row.context, {})[row.path] = row
    return {
        "heads": settings.heads,
        "kv_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "batch": settings.batch,
        "rounds": settings.rounds,
        "device": settings.device,
        "read_gb_per_s": best / 1e9,
        "read_gb_per_s_median": middle / 1e9,
        "environment": environment,
        "results": [_result(row, at[row.context], best, middle) for row in run.rows],
    }


def _result(row: Row, others: dict[str, Row], best: float, middle: float) -> dict[str, Any]:
    seconds = row.median_s
    torch_s = [other.median_s for other in others.values() if other.library == "torch"]
    speed = row.size_bytes / seconds if seconds else None
    return {
        "context": row.context,
        "path": row.path,
        "library": row.library,
        "error": row.error or None,
        "ms": _scaled(seconds, 1e3),
        "ms_min": 1e3 * min(row.call_s) if row.call_s else None,
        "size_bytes": row.size_bytes,
        "gb_per_s": _scaled(speed, 1e-9),
        "floor_ms": 1e3 * row.size_bytes / best,
        "share_of_read": _scaled(speed, 1 / best),
        "share_of_median_read": _scaled(speed, 1 / middle),
        "against_sdpa": _ratio(others[REFERENCE].median_s, seconds),
        "against_best_torch": _ratio(min(filter(None, torch_s), default=None), seconds),
        "against_bf16": _ratio(others["bf16"].median_s if "bf16" in others else None, seconds),
        "difference": row.difference,
        "calls": len(row.call_s),
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def show(found: dict[str, Any], out: Path | None) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(_title(found), style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("path", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for context, rows in _by_context(found):
        table.add_row(f"{output.format_context(context)} tokens", style="bold cyan")
        for row in rows:
            style = "bold" if row["library"] == "mnemon" else ""
            table.add_row("  " + row["path"], *_cells(row), style=style)
        table.add_section()
    console.print(table)
    for row in found["results"]:
        if row["error"]:
            where = output.format_context(row["context"])
            console.print(f"{row['path']} at {where}: {row['error']}", style="dim")
    console.print(_note(found), style="dim")
    if out is not None:
        console.print(f"wrote {out / 'kernels.html'}, kernels.json and charts beside it")


def _title(found: dict[str, Any]) -> str:
    threads = found["environment"]["torch_threads"]
    return (
        f"attention of one decode step · {found['heads']} heads, {found['kv_heads']} of keys, "
        f"{found['head_dim']} wide · batch {found['batch']} · {found['device']}, {threads} threads"
    )


def _note(found: dict[str, Any]) -> str:
    return (
        f"Medians; all paths took turns, each call after a read of 256 MiB. The fastest of those "
        f"reads went at {found['read_gb_per_s']:.1f} GB/s (median "
        f"{found['read_gb_per_s_median']:.1f}): 'of read' is a path's share of it. x SDPA: against "
        "what transformers calls without a mask; x torch: against the fastest path of torch; "
        "x bf16: against mnemon's own over 16-bit keys and values."
    )


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells of one row, under `COLUMNS`."""
    ms = row["ms"]
    if ms is None:
        return ["-"] * len(COLUMNS)
    ratios = (row["against_sdpa"], row["against_best_torch"], row["against_bf16"])
    return [
        f"{ms:.3f}" if ms < 10 else f"{ms:.1f}",
        f"{row['size_bytes'] / 2**20:,.1f}",
        f"{row['gb_per_s']:.1f}",
        f"{100 * row['share_of_read']:.0f}%",
        *("-" if value is None else f"{value:.2f}" for value in ratios),
    ]


def _by_context(found: dict[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    contexts = dict.fromkeys(row["context"] for row in found["results"])
    return [
        (context, [row for row in found["results"] if row["context"] == context])
        for context in contexts
    ]


def write(found: dict[str, Any], folder: Path) -> None:
    """Write kernels.json, kernels.md, kernels.html and the charts.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    from mnemon.cli import bench_report

    matplotlib.use("svg")  # no display is needed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "kernels.md").write_text(_markdown(found), encoding="utf-8")
    drawings = []
    for file, title, draw in (
        ("kernels_time", "Time of a call, and the time of reading its bytes", _draw_times),
        ("kernels_share", "Share of the streaming read's speed", _draw_shares),
    ):
        figure = draw(found)
        figure.axes[0].set_title(title, loc="left", fontweight="bold")
        figure.savefig(folder / f"{file}.png", dpi=144)
        figure.savefig(folder / f"{file}.svg")
        drawings.append((title, bench_report.svg(folder / f"{file}.svg")))
    rows = [
        {
            "context": output.format_context(row["context"]),
            "cache": row["path"],
            "ours": row["library"] == "mnemon",
            "error": row["error"],
            "cells": _cells(row),
        }
        for row in found["results"]
    ]
    page = bench_report.page(
        kicker="mnemon bench --kernels",
        heading="Attention of one decode step, in each format",
        of="path",
        title=_title(found),
        note=_note(found),
        columns=COLUMNS,
        rows=rows,
        drawings=drawings,
        environment=found["environment"],
    )
    (folder / "kernels.html").write_text(page, encoding="utf-8")


def _markdown(found: dict[str, Any]) -> str:
    """The table and where it was measured, for a repository."""
    columns = ["tokens", "path", *COLUMNS]
    lines = [f"# {_title(found)}", "", f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
    for row in found["results"]:
        cells = [row["error"]] if row["error"] else _cells(row)
        words = [output.format_context(row["context"]), row["path"], *cells]
        lines.append(f"| {' | '.join(words)} |")
    facts = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    return "\n".join([*lines, "", _note(found), "", "; ".join(facts) + ".", ""])


def _draw_times(found: dict[str, Any]) -> Figure:
    """Time against context, both logarithmic; dotted: the bytes at the speed of the read."""
    figure = _figure(found)
    axes = figure.axes[0]
    for name, library, colour in _lines(found):
        rows = _measured(found, name)
        style = "-" if library == "mnemon" else "--"
        xs = [row["context"] for row in rows]
        axes.plot(xs, [row["ms"] for row in rows], style, marker="o", color=colour, label=name)
        if library == "mnemon":
            axes.plot(xs, [row["floor_ms"] for row in rows], ":", color=colour, lw=1)
    axes.plot([], [], ":", color="#6b7280", lw=1, label="reading the bytes")
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _draw_shares(found: dict[str, Any]) -> Figure:
    """Share of the streaming read's speed against context."""
    figure = _figure(found)
    axes = figure.axes[0]
    for name, library, colour in _lines(found):
        rows = _measured(found, name)
        style = "-" if library == "mnemon" else "--"
        xs, ys = [row["context"] for row in rows], [100 * row["share_of_read"] for row in rows]
        axes.plot(xs, ys, style, marker="o", color=colour, label=name)
    axes.axhline(100, color="#6b7280", lw=1, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("percent")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _figure(found: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    contexts = [context for context, _ in _by_context(found)]
    if len(contexts) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(contexts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: output.format_context(round(v))))
    axes.set_xlabel("tokens held")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _measured(found: dict[str, Any], path: str) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["path"] == path and row["ms"] is not None]


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, library and colour of every path that ran, in the order of the table."""
    libraries = {row["path"]: row["library"] for row in found["results"] if row["ms"] is not None}
    theirs = iter(_THEIRS)
    return [
        (name, library, _COLOURS[name] if library == "mnemon" else next(theirs))
        for name, library in libraries.items()
    ]
