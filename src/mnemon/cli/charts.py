"""Charts for `report.html`: plain SVG and HTML strings, no script, colours from the page's CSS.

A line chart is drawn twice, wide and narrow, and the page's CSS shows the one that fits: text in
a scaled SVG would be unreadable on a phone. Bars are HTML, which wraps by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Bar", "Series", "bars", "legend", "lines", "merge_equal"]

NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: a name, its points by rising x, and the colour slot (0-7) of the page's CSS."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: its label, its length, the text that says it, and the colour slot."""

    name: str
    value: float
    text: str
    colour: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where the plot lies inside an SVG of the given size, in pixels."""

    width: int
    height: int
    left: int = 56
    right: int = 14
    top: int = 34
    bottom: int = 44


_WIDE = _Frame(width=760, height=340)
_NARROW = _Frame(width=340, height=280, left=46)


def merge_equal(series: Sequence[Series]) -> list[Series]:
    """Join lines that lie exactly on each other into one, named after all of them."""
    groups: dict[tuple[tuple[float, float], ...], list[Series]] = {}
    for line in series:
        groups.setdefault(line.points, []).append(line)
    joined = []
    for points, members in groups.items():
        name = ", ".join(member.name for member in members)
        if len(members) == len(series) and len(series) > 2:
            name = f"all {len(members)} caches"
        joined.append(Series(name=name, points=points, colour=members[-1].colour))
    return joined


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_max: float | None = None,
    y_text: Callable[[float], str] | None = None,
) -> Markup:
    """A line chart over a logarithmic x axis (context lengths and distances double).

    Args:
        series: at least one, each with at least one point of x > 0.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        y_max: the top of the y axis; the largest y, rounded up, when None.
        y_text: how a y value reads; plain numbers when None.

    Returns:
        HTML of two SVGs, one for wide and one for narrow screens.
    """
    text = y_text or _number
    drawn = [
        f'<div class="{name}">{_svg(series, frame, x_label, y_label, y_max, text)}</div>'
        for name, frame in (("wide", _WIDE), ("narrow", _NARROW))
    ]
    return Markup("".join(drawn))


def legend(series: Sequence[Series]) -> Markup:
    """The names of the lines with their colours, as HTML."""
    entries = [
        f'<li><svg width="26" height="10" aria-hidden="true"><line x1="1" y1="5" x2="25" y2="5" '
        f'class="line c{line.colour % NUM_COLOURS}{" dashed" if line.dashed else ""}"/></svg> '
        f"{escape(line.name)}</li>"
        for line in series
    ]
    return Markup(f'<ul class="legend">{"".join(entries)}</ul>')


def bars(rows: Sequence[Bar]) -> Markup:
    """Horizontal bars as HTML, all on one scale that starts at zero."""
    longest = max((bar.value for bar in rows), default=0.0) or 1.0
    drawn = [
        f'<div class="bar-row"><div class="bar-name">{escape(bar.name)}</div>'
        f'<div class="bar-track"><div class="bar c{bar.colour % NUM_COLOURS}" '
        f'style="width:{max(100 * bar.value / longest, 0.4):.2f}%"></div></div>'
        f'<div class="bar-value">{escape(bar.text)}</div></div>'
        for bar in rows
    ]
    return Markup(f'<div class="bars">{"".join(drawn)}</div>')


def _svg(
    series: Sequence[Series],
    frame: _Frame,
    x_label: str,
    y_label: str,
    y_max: float | None,
    text: Callable[[float], str],
) -> str:
    xs = sorted({x for line in series for x, _ in line.points})
    top = y_max if y_max is not None else max(y for line in series for _, y in line.points)
    ticks = _ticks(top)
    top = ticks[-1] if y_max is None else y_max
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    plot_width = frame.width - frame.left - frame.right
    plot_height = frame.height - frame.top - frame.bottom

    def at_x(x: float) -> float:
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return frame.left + share * plot_width

    def at_y(y: float) -> float:
        return frame.top + (1 - y / top) * plot_height

    parts = [
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">'
        # Above the axis, not turned along it: it reads at any width.
        f'<text class="axis y" x="0" y="14">{escape(y_label)}</text>',
    ]
    for tick in ticks:
        if tick > top:
            continue
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/><text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{escape(text(tick))}</text>'
        )
    base = frame.height - frame.bottom
    labelled = -math.inf
    for x in xs:
        if at_x(x) - labelled < 34:  # two labels would touch
            continue
        labelled = at_x(x)
        anchor = "end" if x == xs[-1] and len(xs) > 1 else "middle"
        parts.append(
            f'<text class="tick" x="{at_x(x):.1f}" y="{base + 18}" text-anchor="{anchor}">'
            f"{_number(x)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{frame.left + plot_width / 2:.0f}" y="{frame.height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    for line in series:
        colour = f"c{line.colour % NUM_COLOURS}"
        path = " ".join(f"{at_x(x):.1f},{at_y(min(y, top)):.1f}" for x, y in line.points)
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="line {colour}{dashed}" points="{path}"/>')
        for x, y in line.points:
            parts.append(
                f'<circle class="dot {colour}" cx="{at_x(x):.1f}" cy="{at_y(min(y, top)):.1f}" '
                f'r="3.5"><title>{escape(line.name)}: {escape(text(y))} at {_number(x)}</title>'
                "</circle>"
            )
    parts.append("</svg>")
    return "".join(parts)


def _ticks(top: float) -> list[float]:
    """Round numbers from zero to at least `top`, four to six of them."""
    if top <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(top))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        if top / (step * factor) <= 5:
            step *= factor
            break
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
