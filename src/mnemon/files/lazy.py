"""Layers whose part of a file is checked when they are first touched.

Checking a large file means reading it, which would make loading as slow as the disk. A deferred
layer is an object of a subclass of its real class whose attribute access runs the check first and
then makes it the real class again: no number gets out unchecked, and afterwards it costs nothing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from mnemon.layers.base import CacheLayer

__all__ = ["defer"]

_CHECK = "_deferred_check"
_FACTS = "_deferred_facts"
# What is asked of every layer before one is used; says nothing about a tensor's numbers.
_FACT_NAMES = (
    *("kind", "is_sliding", "is_linear", "is_dummy", "counts_tokens"),
    *("num_tokens", "num_stored", "batch_size", "nbytes", "nbytes_reserved"),
)


def defer(layer: CacheLayer, check: Callable[[], None]) -> None:
    """Has `check()` called when the layer is first used; if it raises, again the next time."""
    facts = {name: getattr(layer, name) for name in _FACT_NAMES}
    vars(layer).update({_CHECK: check, _FACTS: facts})
    layer.__class__ = _deferred(type(layer))


def _finish(layer: CacheLayer) -> None:
    vars(layer)[_CHECK]()
    real: Any = type(layer).__base__
    object.__setattr__(layer, "__class__", real)
    for name in (_CHECK, _FACTS):
        vars(layer).pop(name, None)


@cache
def _deferred(kind: type[CacheLayer]) -> type[CacheLayer]:
    def get(self: CacheLayer, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        if name in _FACT_NAMES:
            return vars(self)[_FACTS][name]
        _finish(self)
        return getattr(self, name)

    def put(self: CacheLayer, name: str, value: object) -> None:
        _finish(self)
        setattr(self, name, value)

    body = {"__getattribute__": get, "__setattr__": put, "__module__": __name__}
    return type(f"Deferred{kind.__name__}", (kind,), body)
