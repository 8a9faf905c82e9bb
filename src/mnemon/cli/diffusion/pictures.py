"""A grid of generated images: methods in rows, samples in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mnemon.cli.diffusion.charts import png
from mnemon.cli.wording import times

__all__ = ["Strip", "caption", "grid"]

_CELL = 0.62  # inches; all other lengths are in cells
_GAP, _HEAD = 0.4, 0.45
_TIMES = 5  # how much differences are amplified
_INK, _SOFT = "#1d2128", "#5b6370"


class Strip(NamedTuple):
    """One row.

    Args:
        name: at its left.
        figures: below the name, small.
        images: (samples, channels, height, width) in [-1, 1].
    """

    name: str
    figures: str
    images: Tensor


def grid(strips: Sequence[Strip]) -> bytes:
    """A PNG: each strip's images, and beside them how they differ from the first strip's.

    Single-channel images are dark on light, as digits are written. Of more channels, differences
    are averaged.
    """
    from matplotlib.figure import Figure

    count = max(len(strip.images) for strip in strips)
    rows = len(strips)
    label = 0.6 + 0.105 * max(len(strip.name) for strip in strips)
    columns = label + count + _GAP + (count if rows > 1 else 0)
    figure = Figure(figsize=(_CELL * columns, _CELL * (rows + _HEAD)), facecolor="white")

    def text(column: float, row: float, words: str, size: float, colour: str, side: str) -> None:
        place = column / columns, 1 - row / (rows + _HEAD)
        figure.text(*place, words, fontsize=size, color=colour, ha=side, va="center")

    def draw(column: float, row: float, values: Tensor, **look: Any) -> None:
        share = 0.93
        place = (
            column / columns,
            1 - (row + share) / (rows + _HEAD),
            share / columns,
            share / (rows + _HEAD),
        )
        axes = figure.add_axes(place)
        axes.set_axis_off()
        axes.imshow(values.numpy(), **look)

    text(label, _HEAD / 2, "images", 8, _SOFT, "left")
    if rows > 1:
        heading = f"minus the uncached, times {_TIMES}: red is darker, blue lighter"
        text(label + count + _GAP, _HEAD / 2, heading, 8, _SOFT, "left")
    for number, strip in enumerate(strips):
        row = number + _HEAD
        text(label - 0.2, row + 0.34, strip.name, 8, _INK, "right")
        text(label - 0.2, row + 0.64, strip.figures, 7, _SOFT, "right")
        for column, image in enumerate(strip.images):
            shown = (image / 2 + 0.5).clamp(0, 1)
            if len(shown) == 1:
                draw(label + column, row, shown[0], cmap="gray_r", vmin=0, vmax=1)
            else:
                draw(label + column, row, shown.permute(1, 2, 0))
            if number and column < len(strips[0].images):
                # One channel is drawn dark where it is high, colours are not.
                sign = 1 if len(image) == 1 else -1
                change = sign * _TIMES * (image - strips[0].images[column]).mean(0)
                place = label + count + _GAP + column
                draw(place, row, change, cmap="RdBu_r", vmin=-2, vmax=2)
    return png(figure)


def caption(row: dict[str, Any]) -> str:
    """A row's figures, for below its name."""
    parts = []
    if row["macs_share"] is not None and row["psnr"] is not None:
        parts.append(f"MACs {row['macs_share']:.2f}")
    if row["speedup"] is not None and row["psnr"] is not None:
        parts.append(times(row["speedup"]))
    if row["psnr"] is not None:
        parts.append(f"{row['psnr']:.1f} dB")
    return "   ".join(parts)
