"""`key_cache` and `value_cache`: lists of one tensor per layer, as caches had them."""

import weakref
from collections.abc import Iterator, MutableSequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from transformers import cache_utils

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer
from mnemon.legacy.lengths import UNCOUNTED

__all__ = ["LayerTensors", "held", "put_pair", "waiting"]

Side = Literal["keys", "values"]
_OTHER: dict[Side, Side] = {"keys": "values", "values": "keys"}

# What was written to one side of a mnemon layer and waits for the other to become as long.
_WAITING: weakref.WeakKeyDictionary[CacheLayer, dict[Side, torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def held(layer: Any, side: Side) -> torch.Tensor | None:
    """Keys or values of a layer of either kind; None while there are none.

    Raises:
        UnsupportedVerb: a layer whose numbers do not lie there as tensors (quantized).
    """
    if isinstance(layer, CacheLayer):
        waiting = _WAITING.get(layer, {}).get(side)
        if waiting is not None:
            return waiting
        return layer.keys if side == "keys" else layer.values
    if hasattr(layer, "_quantized_keys"):
        raise UnsupportedVerb(
            f"A {type(layer).__name__} keeps its tokens quantized: key_cache, value_cache, "
            "cache[i] and iteration would show the newest of them only. Use a cache that is not "
            "quantized, or read what update() returns."
        )
    tensor: torch.Tensor | None = getattr(layer, side, None)
    return None if tensor is None or not tensor.numel() else tensor


def put_pair(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Make a layer of either kind hold these tensors themselves, uncopied where it grows."""
    if isinstance(layer, CacheLayer):
        _load(layer, keys, values)
    elif type(layer) is cache_utils.DynamicLayer:
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
    else:  # windows and preallocated layers have to see the tokens come
        layer.reset()
        layer.update(keys, values)


def _load(layer: CacheLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    _refuse_bound(layer)
    state = layer.state()
    meta = {**state.meta, "num_tokens": keys.shape[-2]}
    layer.load_state(replace(state, tensors={"keys": keys, "values": values}, meta=meta))


def _refuse_bound(layer: CacheLayer) -> None:
    if not layer.is_pair or layer.is_sliding or layer.is_compileable:
        raise UnsupportedVerb(
            f"A layer of kind {layer.kind!r} cannot be written by hand: where a token stands in it "
            "is bound to its length. Let update() write, or use mnemon.Cache(config), whose layers "
            "grow."
        )


@final
class LayerTensors(MutableSequence[torch.Tensor]):
    """One side of every layer that holds tokens: reads are the tensors, writes go to the layers.

    Keys and values may be written one after the other; a mnemon layer takes both once they are of
    one length.
    """

    def __init__(self, cache: Any, side: Side) -> None:
        self._cache, self._side = cache, side

    @property
    def _layers(self) -> list[Any]:
        layers: list[Any] = self._cache.layers
        return layers

    def __len__(self) -> int:
        count = 0
        for layer in self._layers:
            if held(layer, self._side) is None:
                break
            count += 1
        return count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        filled = [held(layer, self._side) for layer in self._layers[: len(self)]]
        return filled[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        places = range(len(self))[index]
        if isinstance(places, range):
            for place, tensor in zip(places, value, strict=True):
                self._write(place, tensor)
        else:
            self._write(places, value)

    def __delitem__(self, index: Any) -> None:
        raise CacheError(
            f"Layers cannot be taken out of {self._side} one side at a time: assign the whole "
            "list, or call reset()."
        )

    def insert(self, index: int, value: torch.Tensor) -> None:
        """Give the next layer its tensor; only the end is a place for one."""
        if index != len(self):
            raise CacheError(f"Layers are added at the end, number {len(self)}; got {index}.")
        self._write(index, value)

    def replace(self, tensors: Any) -> None:
        """What assigning the whole list does."""
        tensors = list(tensors)
        if not tensors:
            for layer in self._layers:
                _empty(layer)
            UNCOUNTED.forget(self._cache)
            return
        if len(tensors) < len(self):
            raise CacheError(
                f"A list of {len(tensors)} tensors came for a cache whose first {len(self)} layers "
                "hold tokens: give one for each, or an empty list to forget all."
            )
        for place, tensor in enumerate(tensors):
            self._write(place, tensor)

    def to(self, *args: Any, **kwargs: Any) -> "LayerTensors":
        """Every tensor moved or converted, in the cache."""
        for place, tensor in enumerate(self[:]):
            self._write(place, tensor.to(*args, **kwargs))
        return self

    def __repr__(self) -> str:
        return f"LayerTensors({self._side} of {len(self)} layers)"

    def _write(self, index: int, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
            found = (
                list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise CacheError(
                f"The {self._side} of a layer are a tensor [batch, kv_heads, tokens, width]; got "
                f"{found}."
            )
        before = int(self._cache.get_seq_length()) if index == 0 else 0
        while len(self._layers) <= index and self._cache.layer_class_to_replicate is not None:
            self._layers.append(self._cache.layer_class_to_replicate())
        if index >= len(self._layers):
            raise CacheError(f"The cache has {len(self._layers)} layers; got number {index}.")
        _write_side(self._layers[index], self._side, tensor)
        if index == 0:
            UNCOUNTED.wrote_by_hand(self._cache, int(self._cache.get_seq_length()) - before)


def _write_side(layer: Any, side: Side, tensor: torch.Tensor) -> None:
    if isinstance(layer, CacheLayer):
        _refuse_bound(layer)
        sides = _WAITING.pop(layer, {}) | {side: tensor}
        other = sides.get(_OTHER[side])
        if other is None:
            other = held(layer, _OTHER[side])
        if other is None or other.shape[:3] != tensor.shape[:3]:
            _WAITING[layer] = sides
            return
        sides[_OTHER[side]] = other
        _load(layer, sides["keys"], sides["values"])
        return
    held(layer, side)  # refuses what is quantized
    if type(layer) is not cache_utils.DynamicLayer:
        present = getattr(layer, side, None)
        if present is None or present.shape != tensor.shape:
            raise UnsupportedVerb(
                f"A {type(layer).__name__} takes a tensor of the shape it has "
                f"({None if present is None else list(present.shape)}); got {list(tensor.shape)}. "
                "Where a token stands in it is bound to its length: let update() write."
            )
    elif not layer.is_initialized:
        layer.dtype, layer.device, layer.is_initialized = tensor.dtype, tensor.device, True
        empty = torch.tensor([], dtype=tensor.dtype, device=tensor.device)
        layer.keys = layer.values = empty
    setattr(layer, side, tensor)


def _empty(layer: Any) -> None:
    if type(layer) is cache_utils.DynamicLayer:  # some releases reset to zeros of the same length
        layer.keys = layer.values = None
        layer.is_initialized = False
    else:
        layer.reset()
        _WAITING.pop(layer, None)


def waiting(layer: Any) -> bool:
    """Whether one side was written and the other is still of another length."""
    return isinstance(layer, CacheLayer) and layer in _WAITING
