"""What `mnemon bench` shows and writes: a table, bench.json, bench.html, charts as SVG and PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli import output
from mnemon.cli.bench_run import REFERENCE, Result, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

# The palette of report.css (light): transformers in warm and grey tones, mnemon in blue and green.
_THEIRS = ("#6b7280", "#a16207", "#c2410c", "#9f1239", "#d97706", "#57534e")
_OURS = (
    *("#60a5fa", "#1d4ed8", "#34a391", "#0b6e5f"),
    *("#7c3aed", "#0891b2", "#4d7c0f", "#be185d"),
    *("#312e81", "#22c55e", "#a78bfa", "#0f766e"),
)
_ONLY_WRITTEN = (
    "ms/token",
    "prefill x",
    "held",
)  # in the files; a terminal of 80 columns has no room
_CHARTS = (
    ("decode", "tokens_per_s", "Decode speed", "tokens per second"),
    ("ratio", "speed_ratio", f"Decode speed against {REFERENCE}", "times as fast"),
    ("append", "append_us", "Appending one token to all layers", "microseconds"),
    ("memory", "peak_bytes", "Memory to fill the cache, at its peak", "MiB"),
)


def record(
    name: str,
    model: PreTrainedModel,
    settings: Settings,
    results: list[Result],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, JSON-able."""
    references = {result.context: result for result in results if result.name == REFERENCE}
    return {
        "model": name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch": settings.batch,
        "rounds": settings.rounds,
        "steps": settings.steps,
        "filled_by": "prefill" if settings.prefill else "random keys and values",
        "environment": environment,
        "results": [
            result.to_dict(settings.batch, references.get(result.context)) for result in results
        ],
    }


def show(found: dict[str, Any], out: Path | None) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(_title(found), style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("cache", no_wrap=True)
    shown = [title for title in _columns(found) if title not in _ONLY_WRITTEN]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for context, rows in _by_context(found):
        table.add_row(f"{output.format_context(context)} tokens", style="bold cyan")
        for row in rows:
            style = "bold" if row["library"] == "mnemon" else ""
            cells = dict(zip(_columns(found), _cells(found, row), strict=True))
            table.add_row("  " + row["cache"], *(cells[title] for title in shown), style=style)
        table.add_section()
    console.print(table)
    for row in found["results"]:
        if row["error"]:
            where = output.format_context(row["context"])
            console.print(f"{row['cache']} at {where}: {row['error']}", style="dim")
    console.print(_note(found), style="dim")
    if out is not None:
        console.print(f"wrote {out / 'bench.html'}, bench.json and charts beside it")


def _title(found: dict[str, Any]) -> str:
    threads = found["environment"]["torch_threads"]
    return (
        f"{found['model']} · {found['parameters'] / 1e6:,.1f}M parameters · {found['dtype']} · "
        f"{found['device']}, {threads} threads · batch {found['batch']}"
    )


def _note(found: dict[str, Any]) -> str:
    steps = found["rounds"] * found["steps"]
    return (
        f"Medians of {steps} steps; the caches took turns and held the same content "
        f"({found['filled_by']}). x: speed against {REFERENCE}. peak: how far memory rose while "
        "the cache was filled. same: the reference's tokens, in float32, where they are promised."
    )


def _columns(found: dict[str, Any]) -> list[str]:
    titles = ["tok/s", "ms/token", "x"]
    if found["filled_by"] == "prefill":
        titles += ["prefill/s", "prefill x"]
    titles += ["append us", "stored", "held", "peak"]
    if any(row["same_tokens"] is not None for row in found["results"]):
        titles.append("same")
    return titles


def _cells(found: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The cells of one row, under `_columns`."""
    size = _short
    values: dict[str, tuple[Any, Any]] = {
        "tok/s": (row["tokens_per_s"], lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.1f}"),
        "ms/token": (row["step_ms"], lambda v: f"{v:,.2f}"),
        "x": (row["speed_ratio"], lambda v: f"{v:.2f}"),
        "prefill/s": (row["prefill_tokens_per_s"], lambda v: f"{v:,.0f}"),
        "prefill x": (row["prefill_ratio"], lambda v: f"{v:.2f}"),
        "append us": (row["append_us"], lambda v: f"{v:,.0f}"),
        "stored": (row["stored_bytes"], size),
        "held": (row["held_bytes"], size),
        "peak": (row["peak_bytes"], size),
        "same": (row["same_tokens"], lambda v: "yes" if v else "NO"),
    }
    cells = []
    for title in _columns(found):
        value, write = values[title]
        cells.append("-" if value is None else write(value))
    return cells


def _short(size_bytes: int) -> str:
    """A size with three digits: "33.8 MiB"."""
    number, unit = output.format_bytes(size_bytes).split()
    return f"{number[:4] if number[2:3] == '.' else number} {unit}"


def _by_context(found: dict[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    contexts = dict.fromkeys(row["context"] for row in found["results"])
    return [
        (context, [row for row in found["results"] if row["context"] == context])
        for context in contexts
    ]


def write(found: dict[str, Any], folder: Path) -> None:
    """Write bench.json, bench.md, bench.html and the charts.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("svg")  # no display is needed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(_markdown(found), encoding="utf-8")
    drawings = []
    for file, key, title, unit in _CHARTS:
        figure = _chart(found, key, title, unit)
        if figure is None:
            continue
        figure.savefig(folder / f"{file}.png", dpi=144)
        figure.savefig(folder / f"{file}.svg")
        drawings.append((title, svg(folder / f"{file}.svg")))
    (folder / "bench.html").write_text(_page(found, drawings), encoding="utf-8")


def _markdown(found: dict[str, Any]) -> str:
    """The table and where it was measured, for a repository."""
    columns = ["tokens", "cache", *_columns(found)]
    lines = [
        f"# {_title(found)}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---:|' * len(columns)}",
    ]
    for row in found["results"]:
        cells = [row["error"]] if row["error"] else _cells(found, row)
        words = [output.format_context(row["context"]), row["cache"], *cells]
        lines.append(f"| {' | '.join(words)} |")
    facts = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    return "\n".join([*lines, "", _note(found), "", "; ".join(facts) + ".", ""])


def _chart(found: dict[str, Any], key: str, title: str, unit: str) -> Figure | None:
    """One figure: a line per cache over the context; None if nothing was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    scale = 1 / 2**20 if key.endswith("bytes") else 1.0
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    drawn = 0
    for name, library, colour in _lines(found):
        points = [
            (row["context"], row[key] * scale)
            for row in found["results"]
            if row["cache"] == name and row[key] is not None
        ]
        if not points:
            continue
        drawn += 1
        style = "-" if library == "mnemon" else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=name, lw=2)
    if not drawn:
        return None
    contexts = [context for context, _ in _by_context(found)]
    if len(contexts) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(contexts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: output.format_context(round(v))))
    if key == "append_us":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    axes.set_xlabel("tokens held")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, library and colour of every cache, in the order of the table."""
    libraries = {row["cache"]: row["library"] for row in found["results"]}
    slots = {"mnemon": list(_OURS), "transformers": list(_THEIRS)}
    if sum(library == "mnemon" for library in libraries.values()) == 1:
        slots["mnemon"] = [_OURS[3]]
    lines = []
    for name, library in libraries.items():
        colours = slots[library]
        lines.append((name, library, colours[0]))
        colours.append(colours.pop(0))
    return lines


def svg(path: Path) -> str:
    """A figure to put inside a page: without the XML prologue."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _page(found: dict[str, Any], drawings: list[tuple[str, str]]) -> str:
    rows = [
        {
            "context": output.format_context(row["context"]),
            "cache": row["cache"],
            "ours": row["library"] == "mnemon",
            "error": row["error"],
            "cells": _cells(found, row),
        }
        for row in found["results"]
    ]
    return page(
        kicker="mnemon bench",
        heading="Decoding with each cache, at each context",
        of="cache",
        title=_title(found),
        note=_note(found),
        columns=_columns(found),
        rows=rows,
        drawings=drawings,
        environment=found["environment"],
    )


def page(
    *,
    kicker: str,
    heading: str,
    of: str,
    title: str,
    note: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
    drawings: Sequence[tuple[str, str]],
    environment: dict[str, Any],
) -> str:
    """One self-contained page.

    Args:
        kicker, heading, title, note: what stands above, from small to large and back.
        of: what a row is about, the title of the second column.
        columns: titles of the `cells` of each row.
        rows: with "context", "cache" (the row's name), "ours", "error" and "cells".
        drawings: title and SVG of each chart.
        environment: where it was measured.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("mnemon.cli", "templates"), autoescape=True, undefined=StrictUndefined
    )
    loader = templates.loader
    assert loader is not None
    css = loader.get_source(templates, "report.css")[0]
    return templates.get_template("bench.html.jinja").render(
        css=Markup(css),
        kicker=kicker,
        heading=heading,
        of=of,
        title=title,
        note=note,
        columns=columns,
        rows=rows,
        drawings=[(name, Markup(drawing)) for name, drawing in drawings],
        environment=environment,
    )
