"""What is best at equal cost: fronts of (cost, quality) points, and values between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Point", "best_within", "front"]


class Point(NamedTuple):
    """One setting: what it costs, as a share of the uncached, and its quality in dB."""

    cost: float
    quality: float


def front(points: Iterable[Point]) -> list[Point]:
    """Those that nothing cheaper is as good as, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not found or point.quality > found[-1].quality:
            found.append(point)
    return found


def best_within(points: Sequence[Point], cost: float) -> float | None:
    """The quality to be had for `cost`: on the front, linear between two neighbours.

    None if everything costs more; beyond the dearest, the dearest's.
    """
    line = front(points)
    if not line or cost < line[0].cost:
        return None
    for left, right in pairwise(line):
        if cost < right.cost:
            share = (cost - left.cost) / (right.cost - left.cost)
            return left.quality + share * (right.quality - left.quality)
    return line[-1].quality
