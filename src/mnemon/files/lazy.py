"""Layers that read and check their part of a file when they are first touched.

Checking a large file means reading it, which would make loading as slow as the disk. A deferred
layer is an object of a subclass of its real class whose attribute access loads it first and then
makes it the real class again: nobody can see it unloaded, and once loaded it costs nothing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from mnemon.layers.base import CacheLayer

__all__ = ["defer"]

_LOAD = "_load_deferred"
# Facts of construction: model code asks every layer for them before it uses one.
_KNOWN = frozenset({"kind", "is_sliding", "is_linear", "is_dummy", "counts_tokens"})


def defer(layer: CacheLayer, load: Callable[[CacheLayer], None]) -> None:
    """Has `load(layer)` called when the layer is first used; if it raises, again next time."""
    layer.__dict__[_LOAD] = load
    layer.__class__ = _deferred(type(layer))


def _finish(layer: CacheLayer) -> None:
    deferred: Any = type(layer)
    load = vars(layer).pop(_LOAD)
    object.__setattr__(layer, "__class__", deferred.__base__)
    try:
        load(layer)
    except BaseException:
        defer(layer, load)
        raise


@cache
def _deferred(kind: type[CacheLayer]) -> type[CacheLayer]:
    def get(self: CacheLayer, name: str) -> Any:
        if name not in _KNOWN and not name.startswith("__"):
            _finish(self)
        return object.__getattribute__(self, name)

    def put(self: CacheLayer, name: str, value: object) -> None:
        _finish(self)
        setattr(self, name, value)

    body = {"__getattribute__": get, "__setattr__": put}
    return type(f"Deferred{kind.__name__}", (kind,), body)
