"""Checks that methods make of their options, with one wording."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mnemon.errors import DiffusionError

__all__ = ["at_least", "between", "one_of"]


def at_least(name: str, value: int, least: int) -> None:
    """Raises:
    DiffusionError: not a whole number from `least` on.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DiffusionError(f"{name}={value!r} came; a whole number from {least} on was expected")


def between(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises:
    DiffusionError: not a number from `low` to `high`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        upper = "on" if math.isinf(high) else f"to {high}"
        raise DiffusionError(f"{name}={value!r} came; a number from {low} {upper} was expected")


def one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Raises:
    DiffusionError: not one of `valid`.
    """
    if value not in valid:
        raise DiffusionError(f"{name}={value!r} came; expected one of {', '.join(valid)}")
