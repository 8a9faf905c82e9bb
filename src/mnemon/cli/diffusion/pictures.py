"""A grid of generated images: methods in rows, samples in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mnemon.cli.diffusion.charts import png
from mnemon.cli.wording import times

__all__ = ["Strip", "caption", "grid"]


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
    """A PNG; single-channel images are dark on light, as digits are written."""
    from matplotlib.figure import Figure

    count = max(len(strip.images) for strip in strips)
    cell, label = 0.62, 3.3
    width, height = label + cell * count, cell * len(strips)
    figure = Figure(figsize=(width + 0.1, height + 0.1), facecolor="white")
    for row, strip in enumerate(strips):
        bottom = 1 - (row + 1) * cell / (height + 0.1)
        middle = bottom + 0.5 * cell / (height + 0.1)
        gap = 0.09 / (height + 0.1)
        right = (label - 0.12) / (width + 0.1)
        look = {"ha": "right", "va": "center"}
        figure.text(right, middle + gap, strip.name, fontsize=8, color="#1d2128", **look)
        figure.text(right, middle - gap, strip.figures, fontsize=7, color="#5b6370", **look)
        for column, image in enumerate(strip.images):
            place = (
                (label + column * cell) / (width + 0.1),
                bottom,
                0.93 * cell / (width + 0.1),
                0.93 * cell / (height + 0.1),
            )
            axes = figure.add_axes(place)
            axes.set_axis_off()
            shown = (image / 2 + 0.5).clamp(0, 1)
            if len(shown) == 1:
                axes.imshow(shown[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            else:
                axes.imshow(shown.permute(1, 2, 0).numpy())
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
