"""The type checker that the import hook of conftest.py puts around every function of a layer."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception

__all__ = ["checked"]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked against its annotations."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function  # jaxtyping decorates methods one by one, where Self means nothing
