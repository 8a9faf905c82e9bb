"""What a cache holds, as a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from mnemon.layers.base import CacheLayer

__all__ = ["Report", "ReportRow", "places", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """Layers that hold the same: their kind, how many, and what one of them keeps.

    Args:
        part: ``decoder`` or ``encoder``.
        kind: kind of layer.
        layers: how many.
        num_stored: tokens kept per layer.
        dtype: dtype of the keys, or how they are packed; or empty.
        nbytes: bytes stored, all of these layers.
        nbytes_reserved: bytes allocated, all of these layers.
        places: `nbytes` by where they lie: ``"device"``, ``"host"``, ``"disk"``.
    """

    part: str
    kind: str
    layers: int
    num_stored: int
    dtype: str
    nbytes: int
    nbytes_reserved: int
    places: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A cache's content: print it, or take ``to_dict()`` for JSON."""

    title: str
    num_tokens: int
    num_known_tokens: int
    rows: tuple[ReportRow, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def nbytes_reserved(self) -> int:
        return sum(row.nbytes_reserved for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return {
            "title": self.title,
            "num_tokens": self.num_tokens,
            "num_known_tokens": self.num_known_tokens,
            "nbytes": self.nbytes,
            "nbytes_reserved": self.nbytes_reserved,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        heads = ("part", "kind", "layers", "tokens kept", "dtype", "stored", "reserved")
        cells = [
            (
                row.part,
                row.kind,
                str(row.layers),
                str(row.num_stored),
                row.dtype,
                _size(row.nbytes),
                _size(row.nbytes_reserved),
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", "", _size(self.nbytes), _size(self.nbytes_reserved))
        table = [heads, *cells, total]
        widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        end = len(lines) - 1
        rule = "-" * max(len(line) for line in lines)
        held: dict[str, int] = {}
        for row in self.rows:
            for place, size in row.places.items():
                held[place] = held.get(place, 0) + size
        if set(held) - {"device"}:  # a cache without a tier lies where the model is
            lines.append(
                "of it " + ", ".join(f"{_size(n)} on {place}" for place, n in held.items())
            )
        unknown = self.num_tokens - self.num_known_tokens
        known = f"{self.num_tokens} tokens seen"
        if unknown:
            known += f", {unknown} of them unknown: reuse is verified for the others only"
        return "\n".join([self.title, known, lines[0], rule, *lines[1:end], rule, *lines[end:]])


def report(
    *,
    groups: Mapping[str, Sequence[CacheLayer]],
    title: str,
    num_tokens: int,
    num_known_tokens: int,
) -> Report:
    """Layers that look the same are one row."""
    found: dict[tuple[str, str, int, str], list[CacheLayer]] = {}
    for part, layers in groups.items():
        for layer in layers:
            found.setdefault((part, layer.kind, layer.num_stored, layer.stored_as), []).append(
                layer
            )
    rows = tuple(
        ReportRow(
            part=part,
            kind=kind,
            layers=len(layers),
            num_stored=stored,
            dtype=dtype,
            nbytes=sum(layer.nbytes for layer in layers),
            nbytes_reserved=sum(layer.nbytes_reserved for layer in layers),
            places=places(layers),
        )
        for (part, kind, stored, dtype), layers in found.items()
    )
    return Report(title=title, num_tokens=num_tokens, num_known_tokens=num_known_tokens, rows=rows)


def places(layers: Iterable[CacheLayer]) -> dict[str, int]:
    """Bytes stored by where they lie, all `layers` together."""
    total: dict[str, int] = {}
    for layer in layers:
        for place, size in layer.nbytes_by_place().items():
            total[place] = total.get(place, 0) + size
    return total


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
