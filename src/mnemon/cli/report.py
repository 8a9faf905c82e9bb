"""Turn a `DemoResult` into `report.html`: one file, no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mnemon.cli import charts
from mnemon.cli.contenders import REFERENCE
from mnemon.cli.demo_result import DemoResult, FedTwice, Row
from mnemon.cli.output import format_bytes
from mnemon.cli.wording import milliseconds, percent, small, times

__all__ = ["render", "write"]


class Cell(NamedTuple):
    """One cell of the main table."""

    text: str
    tone: str = ""


class Tile(NamedTuple):
    """One of the large figures at the top."""

    figure: str
    what: str
    tone: str = ""


def write(result: DemoResult, folder: Path) -> Path:
    """Write `report.html` into a folder, whole or not at all.

    Raises:
        OSError: the folder cannot be made.
        FileError: the file cannot be written.
    """
    from mnemon.files.atomic import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    page = render(result).encode()
    write_atomically(path, lambda writer: writer.write(page))
    return path


def render(result: DemoResult) -> str:
    """The page as a string of HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mnemon.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader = environment.loader
    assert loader is not None
    css = loader.get_source(environment, "report.css")[0]
    page = environment.get_template("report.html.jinja")
    return page.render(css=Markup(css), **_context(result))


def _context(result: DemoResult) -> dict[str, Any]:
    working = [row for row in result.rows if not row.error]
    colours = _colours(result.rows)
    context: dict[str, Any] = {
        "model": result.model,
        "source": result.source,
        "settings": result.settings,
        "environment": result.environment,
        "notes": result.notes,
        "reference": REFERENCE,
        "tiles": _tiles(result),
        "groups": _groups(result.rows),
        "quantized": any((row.logit_difference or 0) > 0.02 for row in working),
        "bytes_chart": _bytes_chart(working, colours),
        "reuse": result.reuse,
        "fed_twice": [_fed_twice(case, result.rows) for case in result.fed_twice],
        "texts": _texts(result),
        "facts": _facts(result),
    }
    recall = _recall(working, colours, result.settings["recall_samples"])
    return context | _speed(result, colours) | _reuse(result) | recall


def _colours(rows: list[Row]) -> dict[str, int]:
    """Slots 0-3 for transformers, 4-7 for mnemon; a fifth of either begins again."""
    slots: dict[str, int] = {}
    for library, first in (("transformers", 0), ("mnemon", 4)):
        members = [row.name for row in rows if row.library == library]
        slots |= {name: first + index % 4 for index, name in enumerate(members)}
    return slots


def _tiles(result: DemoResult) -> list[Tile]:
    rows = {row.name: row for row in result.rows if not row.error}
    reference = rows[REFERENCE]
    tiles = []
    ours = [row for row in rows.values() if row.library == "mnemon" and row.tokens_per_s]
    chosen = rows.get("dense + attach") or next(iter(ours), None)
    if chosen and chosen.tokens_per_s and reference.tokens_per_s:
        # The default recipe against the default cache; the strongest peer is named beside them.
        static = rows.get("StaticCache")
        beside = ""
        if static and static.tokens_per_s:
            beside = f" (StaticCache, sized beforehand: {static.tokens_per_s:.0f})"
        tiles.append(
            Tile(
                times(chosen.tokens_per_s / reference.tokens_per_s),
                f"the speed of {REFERENCE}: {chosen.tokens_per_s:.0f} tokens/s with mnemon "
                f"“{chosen.name}”, {reference.tokens_per_s:.0f} without{beside}",
            )
        )
    if result.reuse:
        fresh, _, loaded = result.reuse.medians()
        tiles.append(
            Tile(
                times(fresh / loaded),
                "faster to the first token from a saved prompt: "
                f"{milliseconds(loaded)}, loading included; "
                f"{milliseconds(fresh)} computed again",
            )
        )
    if ours:
        equal = sum(row.agreement == 1.0 for row in ours)
        tiles.append(
            Tile(
                f"{equal} of {len(ours)}",
                f"mnemon caches gave {REFERENCE}'s tokens, all {result.settings['new_tokens']} "
                "of them",
            )
        )
    wrong = [case for case in result.fed_twice if not case.is_right and not case.error]
    right = [case for case in result.fed_twice if case.is_right and not case.error]
    if wrong and right:
        tiles.append(
            Tile(
                "silently wrong",
                f"is what {wrong[0].name} does with a prompt that it already holds; mnemon's "
                f"\u201c{right[0].name}\u201d does it right",
                "wrong",
            )
        )
    return tiles


def _groups(rows: list[Row]) -> list[dict[str, Any]]:
    fastest = max((row.tokens_per_s or 0 for row in rows), default=0)
    soonest = min((row.first_token_s for row in rows if row.first_token_s), default=0)
    groups = []
    for library in ("transformers", "mnemon"):
        members = [
            {
                "name": row.name,
                "library": library,
                "error": row.error,
                "cells": [] if row.error else _cells(row, fastest, soonest),
            }
            for row in rows
            if row.library == library
        ]
        if members:
            groups.append({"library": library, "rows": members})
    return groups


def _cells(row: Row, fastest: float, soonest: float) -> list[Cell]:
    def cell(value: float | None, text: Callable[[float], str], tone: str = "") -> Cell:
        return Cell("\u2013") if value is None else Cell(text(value), tone)

    return [
        cell(row.tokens_per_s, "{:.1f}".format, "best" if row.tokens_per_s == fastest else ""),
        cell(
            row.first_token_s,
            lambda value: f"{1000 * value:,.0f}",
            "best" if row.first_token_s == soonest else "",
        ),
        cell(row.bytes_per_token, "{:,.0f}".format),
        cell(row.held_bytes, format_bytes),
        cell(row.peak_bytes, format_bytes),
        cell(row.agreement, percent),
        cell(row.logit_difference, small),
        cell(row.bits_per_byte, "{:.3f}".format),
    ]


def _speed(result: DemoResult, colours: dict[str, int]) -> dict[str, Any]:
    contexts = sorted({point.context for point in result.speed})
    by_name: dict[str, dict[int, float]] = {}
    for point in result.speed:
        by_name.setdefault(point.name, {})[point.context] = point.tokens_per_s
    libraries = {row.name: row.library for row in result.rows}
    series = [
        charts.Series(
            name=name,
            points=tuple((float(x), y) for x, y in sorted(points.items())),
            colour=colours[name],
            dashed=libraries[name] == "transformers",
        )
        for name, points in by_name.items()
    ]
    text = (
        "Each new token reads everything the cache holds, so a longer context is slower. "
        "A cache that copies itself for each token, or attention that expands it, slows down more."
    )
    if len(contexts) > 1:
        text += " Dashed: transformers."
        chart = charts.lines(series, x_label="tokens of context", y_label="tokens per second")
        legend = charts.legend(series)
    else:  # a line needs two points
        chart, legend = charts.bars([_speed_bar(line) for line in series]), Markup("")
    return {
        "speed_text": text,
        "speed_chart": chart,
        "speed_legend": legend,
        "speed_contexts": contexts,
        "speed_table": [
            (name, [f"{points[x]:.1f}" if x in points else "\u2013" for x in contexts])
            for name, points in by_name.items()
        ],
    }


def _speed_bar(line: charts.Series) -> charts.Bar:
    speed = line.points[0][1]
    return charts.Bar(name=line.name, value=speed, text=f"{speed:.1f} tokens/s", colour=line.colour)


def _bytes_chart(rows: list[Row], colours: dict[str, int]) -> Markup:
    bars = [
        charts.Bar(
            name=row.name,
            value=row.bytes_per_token,
            text=f"{row.bytes_per_token:,.0f} bytes",
            colour=colours[row.name],
        )
        for row in rows
        # attach changes how a cache is read, not what it keeps: one bar is enough
        if row.bytes_per_token is not None and not row.name.endswith("+ attach")
    ]
    return charts.bars(bars)


def _reuse(result: DemoResult) -> dict[str, Any]:
    if result.reuse is None:
        return {}
    fresh, kept, loaded = result.reuse.medians()
    bars = [
        charts.Bar(name=name, value=seconds, text=milliseconds(seconds), colour=colour)
        for name, seconds, colour in (
            ("computed from nothing", fresh, 0),
            ("cache kept in memory", kept, 5),
            ("cache loaded from a file", loaded, 7),
        )
    ]
    return {
        "reuse_chart": charts.bars(bars),
        "reuse_file": format_bytes(result.reuse.file_bytes),
        "reuse_save": milliseconds(result.reuse.save_s),
    }


def _recall(rows: list[Row], colours: dict[str, int], num_samples: int) -> dict[str, Any]:
    measured = [row for row in rows if row.recall]
    if not measured:
        return {"recall_chart": None}
    series = charts.merge_equal(
        [
            charts.Series(
                name=row.name,
                points=tuple((float(x), y) for x, y in sorted(row.recall.items())),
                colour=colours[row.name],
            )
            for row in measured
        ]
    )
    text = (
        "Words are planted in a text and asked for later; the line says how many came back "
        f"right, by how many tokens ago they were seen ({num_samples} prompts per distance). "
        "What the model itself cannot recall, no cache can; a cache that drops or rounds too "
        "much falls below the full one."
    )
    if len(series) == 1:
        text += " Here all caches recall the same."
    return {
        "recall_chart": charts.lines(
            series, x_label="tokens ago", y_label="recalled", y_max=1.0, y_text=percent
        ),
        "recall_legend": charts.legend(series),
        "recall_text": text,
    }


def _fed_twice(case: FedTwice, rows: list[Row]) -> dict[str, Any]:
    library = next((row.library for row in rows if row.name == case.name), "")
    answers = f"{case.num_same} of {case.num_prompts} answers right"
    if case.num_same < case.num_prompts:
        answers += ", without an error"
    held = "no count kept" if case.num_held is None else f"{case.num_held} tokens held"
    if case.num_held is not None and case.num_held != case.num_right:
        held += f" where {case.num_right} are right"
    return {
        "case": case,
        "text": case.text.strip("\n"),
        "right_text": case.right_text.strip("\n"),
        "library": library,
        "is_wrong": case.num_same < case.num_prompts,
        "verdict": f"{answers}; {held}",
    }


def _texts(result: DemoResult) -> list[dict[str, str]]:
    rows = [row for row in result.rows if not row.error and row.tokens]
    reference = next(row for row in rows if row.name == REFERENCE).text
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.tokens), []).append(row)
    texts = []
    for members in groups.values():
        text = members[0].text
        same = _num_same(text, reference)
        texts.append(
            {
                "names": ", ".join(row.name for row in members),
                "prompt": result.prompt_end,
                "same": text[:same],
                "differs": text[same:],
            }
        )
    return texts


def _num_same(text: str, other: str) -> int:
    """Leading characters that two texts share."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    model = result.model
    shape = [f"{model['parameters'] / 1e6:.1f} million parameters"]
    if model["layers"]:
        shape.append(f"{model['layers']} layers")
    if model["kv_heads"] and model["head_dim"]:
        shape.append(f"{model['kv_heads']} key/value heads of {model['head_dim']}")
    facts = [("model", f"{model['name']} ({model['architecture']}; {', '.join(shape)})")]
    facts.append(("numbers", f"{model['dtype']} on {model['device']}"))
    words = {"torch_threads": "torch threads", "processors_usable": "processors usable"}
    for name, value in result.environment.items():
        if value not in (None, [], ""):
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            facts.append((words.get(name, name.replace("_", " ")), shown))
    facts.append(("this run took", f"{result.elapsed_s:.0f} s"))
    return facts
