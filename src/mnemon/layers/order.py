"""Which layers of a cache a forward pass reads one after the other."""

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar, final

__all__ = ["LayerOrder"]

Layer = TypeVar("Layer")


@final
class LayerOrder(Generic[Layer]):
    """The tiered layers of one cache, in the order in which they are read, round and round.

    Layers are held weakly. Copies of a whole cache (forks, extracted rows) are made layer by
    layer: each copy joins the order's heir at its own place, and when that place is taken, another
    copy has begun, with an order of its own.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
        self._next = 0
        self._heir: weakref.ref[LayerOrder[Layer]] | None = None
        #: Whether the tier was told of the whole cache's size (preallocated caches).
        self.preallocated = False

    def join(self, layer: Layer, place: int | None = None) -> int:
        """Put `layer` at `place`, or behind the last one; returns its place."""
        place = self._next if place is None else place
        self._layers[place] = layer
        self._next = max(self._next, place + 1)
        return place

    def heir(self, place: int) -> "LayerOrder[Layer]":
        """The order that a copy of the layer at `place` joins."""
        heir = None if self._heir is None else self._heir()
        if heir is None or place < heir._next:
            heir = LayerOrder[Layer]()
            self._heir = weakref.ref(heir)
        return heir

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(list(self._layers.values()))

    def after(self, place: int) -> Iterator[Layer]:
        """The layers that are read after the one at `place`, that one itself last."""
        for step in range(1, self._next + 1):
            layer = self._layers.get((place + step) % self._next)
            if layer is not None:
                yield layer
