"""How figures read, in the terminal and in report.html."""

from __future__ import annotations

__all__ = ["milliseconds", "percent", "small", "times"]


def percent(share: float) -> str:
    """A share as a percentage that reads 100% only when it is, and 0% only when it is."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}%"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}".removesuffix(".0") + "%"


def small(value: float) -> str:
    """A difference: 0 when it is none, else two digits."""
    return "0" if value == 0 else f"{value:.2g}"


def times(ratio: float) -> str:
    """A ratio: 2.3 times."""
    return f"{ratio:.1f}\u00d7" if ratio < 10 else f"{ratio:.0f}\u00d7"


def milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
