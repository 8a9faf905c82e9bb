"""Charts of quality against cost, as matplotlib figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mnemon.cli.diffusion.fronts import Point, front
from mnemon.cli.diffusion.record import AXES, working
from mnemon.cli.diffusion.settings import FEWER_STEPS, UNCACHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["colours", "costs", "held", "png", "quality", "svg"]

_OURS = (
    *("#60a5fa", "#1d4ed8", "#34a391", "#0b6e5f", "#7c3aed", "#0891b2"),
    *("#4d7c0f", "#be185d", "#22c55e", "#a78bfa", "#312e81", "#0f766e"),
)
_THEIRS = (
    *("#c2410c", "#a16207", "#9f1239", "#d97706", "#6b7280", "#e11d48"),
    *("#78350f", "#f59e0b", "#831843", "#57534e", "#fb7185", "#ca8a04"),
)
_PLAIN = "#1d2128"
_MARKERS = "osD^vPX*<>hp"


def colours(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour for each family: mnemon's cool, others' warm, fewer steps black."""
    found, slots = {}, {"mnemon": 0}
    for row in rows:
        name, library = row["family"], row["library"]
        if name in found or name == UNCACHED:
            continue
        if not library:
            found[name] = _PLAIN
            continue
        key = "mnemon" if library == "mnemon" else "others"
        palette = _OURS if key == "mnemon" else _THEIRS
        slot = slots.get(key, 0)
        slots[key] = slot + 1
        found[name] = palette[slot % len(palette)]
    return found


def quality(
    rows: Sequence[dict[str, Any]], axis: str, families: Sequence[str], *, title: str
) -> Figure:
    """PSNR against a cost: every setting a point, every family's front a line.

    Args:
        rows: of the record.
        axis: "macs_share" or "time_share".
        families: drawn; fewer steps always is.
        title: above it.
    """
    palette = colours(rows)
    figure, axes = _figure(8.6, 4.9)
    good = [row for row in working(rows) if row[axis] is not None]
    drawn = [name for name in palette if name in families or name == FEWER_STEPS]
    ours = [name for name in drawn if name != FEWER_STEPS]
    for name in drawn:
        members = [row for row in good if row["family"] == name]
        if not members:
            continue
        plain = name == FEWER_STEPS
        line = front(Point(row[axis], row["psnr"]) for row in members)
        marker = "." if plain else _MARKERS[ours.index(name) % len(_MARKERS)]
        look: dict[str, Any] = {"color": palette[name], "marker": marker}
        axes.plot(
            *zip(*line, strict=True),
            **look,
            linestyle="--" if plain else "-",
            linewidth=2.2 if plain else 1.6,
            markersize=4.5,
            zorder=4 if plain else 3,
            label=name,
        )
        beaten = [row for row in members if (row[axis], row["psnr"]) not in line]
        axes.scatter(
            [row[axis] for row in beaten],
            [row["psnr"] for row in beaten],
            **look,
            s=14,
            alpha=0.3,
            linewidths=0,
            zorder=2,
        )
        if any(row["psnr_sd"] for row in members):
            spread = {(row[axis], row["psnr"]): row["psnr_sd"] or 0 for row in members}
            axes.errorbar(
                [point.cost for point in line],
                [point.quality for point in line],
                yerr=[spread[point] for point in line],
                fmt="none",
                ecolor=palette[name],
                alpha=0.35,
                zorder=1,
            )
    # What is dearer than the uncached is of no use, and would squeeze all the rest.
    axes.set_xlim(0, min(1.1, max([1.0, *(row[axis] for row in good)]) * 1.02))
    axes.set_xlabel(f"share of the uncached {AXES[axis]}")
    axes.set_ylabel("PSNR to the uncached images, dB")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def costs(rows: Sequence[dict[str, Any]]) -> Figure:
    """Whether time follows computation: the share of seconds against that of MACs."""
    palette = colours(rows)
    figure, axes = _figure(8.6, 4.9)
    good = [r for r in rows if r["error"] is None and r["time_share"] is not None]
    for index, (name, colour) in enumerate(palette.items()):
        members = [row for row in good if row["family"] == name]
        if members:
            axes.scatter(
                [row["macs_share"] for row in members],
                [row["time_share"] for row in members],
                color=colour,
                marker=_MARKERS[index % len(_MARKERS)],
                s=34,
                label=name,
                zorder=3,
            )
    top = min(2.0, max([1.0, *(row["time_share"] for row in good)]))
    axes.plot([0, top], [0, top], color="#9ca3af", linestyle=":", zorder=1)
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, top * 1.05)
    axes.set_xlabel("share of the uncached MACs")
    axes.set_ylabel("share of the uncached seconds")
    beyond = sum(row["time_share"] > top for row in good)
    if beyond:
        axes.set_xlabel(f"share of the uncached MACs ({beyond} settings lie above the chart)")
    axes.set_title("Seconds against computation", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def held(rows: Sequence[dict[str, Any]]) -> Figure:
    """The most memory that features took, a bar for each setting that keeps any."""
    palette = colours(rows)
    good = [row for row in rows if row["error"] is None and row["peak_bytes"]]
    figure, axes = _figure(8.6, 0.9 + 0.27 * len(good))
    names = [row["name"] for row in good]
    sizes = [row["peak_bytes"] / 2**20 for row in good]
    axes.barh(names, sizes, color=[palette[row["family"]] for row in good], height=0.7)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    for place, size in enumerate(sizes):
        axes.text(size, place, f" {size:.3g}", va="center", fontsize=8.5)
    axes.margins(x=0.08)
    axes.set_xlabel("MiB")
    axes.set_title("Features held at most", loc="left", fontweight="bold")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "mnemon"  # the same figure gives the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The figure to put inside a page: without the XML prologue."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
