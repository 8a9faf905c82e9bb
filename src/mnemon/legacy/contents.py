"""What a cache holds, read and written like the tuples and lists of old."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from transformers import cache_utils

from mnemon.cache import Cache as MnemonCache
from mnemon.errors import CacheError
from mnemon.legacy.callers import is_own_class, old_code_calls
from mnemon.legacy.hosts import ROOT, OldAttribute, is_mnemon, is_pair, replace_everywhere
from mnemon.legacy.own_lists import keeps_lists
from mnemon.legacy.patches import Patches
from mnemon.legacy.tuples import from_pairs
from mnemon.legacy.views import LayerTensors, Side, held, waiting
from mnemon.legacy.warning import Notices

__all__ = ["entry", "install"]


def install(patches: Patches, notices: Notices) -> None:
    sides: tuple[tuple[str, Side], ...] = (("key_cache", "keys"), ("value_cache", "values"))
    for name, side in sides:
        patches.add(ROOT, name, OldAttribute(notices, name, _reader(side), _writer(side)))
    if not hasattr(ROOT, "__getitem__"):

        def getitem(self: Any, layer_idx: int) -> tuple[Any, ...]:
            """Keys and values of a layer; with an encoder its keys and values too."""
            notices.give("cache[i]")
            return entry(self, layer_idx)

        patches.put(ROOT, "__getitem__", getitem)
        replace_everywhere(patches, "__iter__", lambda own: _iterate(own, notices))
        if not hasattr(ROOT, "__iter__"):
            patches.put(ROOT, "__iter__", _iterate(None, notices))
        replace_everywhere(patches, "__len__", _length)
    patches.put(MnemonCache, "fork", _fork(MnemonCache.fork))

    def to_legacy_cache(self: Any) -> tuple[tuple[Any, ...], ...]:
        """A tuple with one entry per layer that holds tokens; the tensors themselves."""
        notices.give("to_legacy_cache")
        return tuple(pair for pair in _entries(self) if pair[0] is not None)

    def from_legacy_cache(cls: Any, past_key_values: Any = None) -> Any:
        """A cache that holds the tensors of the tuple themselves, uncopied."""
        notices.give("from_legacy_cache")
        if isinstance(past_key_values, ROOT):  # 4.40 did not ask whether it was one already
            past_key_values = tuple(p for p in _entries(past_key_values) if p[0] is not None)
        if issubclass(cls, MnemonCache):
            return cls.from_legacy(past_key_values)
        if not is_own_class(cls):
            cache = cls()
            for index, (keys, values) in enumerate(past_key_values or ()):
                cache.update(keys, values, index)  # it may count, or drop, what comes
            return cache
        return from_pairs(past_key_values, cls)

    for owner in (cache_utils.DynamicCache, cache_utils.EncoderDecoderCache, MnemonCache):
        patches.add(owner, "to_legacy_cache", to_legacy_cache)
        patches.add(owner, "from_legacy_cache", classmethod(from_legacy_cache))


def _length(own: Callable[..., int]) -> Callable[..., int]:
    """Layers; for old code those that hold tokens, as there were no others."""

    def length(self: Any) -> int:
        if not old_code_calls() or keeps_lists(self):
            return own(self)
        part = getattr(self, "self_attention_cache", self)
        return sum(held(layer, "keys") is not None for layer in part.layers)

    return length


def _fork(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def fork(self: Any) -> Any:
        for index, layer in enumerate(self.layers):
            if waiting(layer):
                entry(self, index)  # raises: half of it is written
        return own(self)

    return functools.wraps(own)(fork)


def entry(cache: Any, index: int) -> tuple[Any, ...]:
    """``(keys, values)`` of layer `index`, each None while empty; four of them with an encoder.

    Raises:
        KeyError: there is no such layer (what caches always raised).
    """
    count = len(cache)
    index = operator.index(index)
    if not -count <= index < count:
        raise KeyError(
            f"Cache only has {count} layers, attempted to access layer with index {index}"
        )
    if is_pair(cache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        encoded = entry(cross, index) if len(cross) > index else (None, None)
        return entry(own, index) + encoded
    if keeps_lists(cache):
        return cache.key_cache[index], cache.value_cache[index]
    layer = cache.layers[index]
    if waiting(layer):
        raise CacheError(
            f"Layer {index}: key_cache and value_cache were given tensors of different lengths. "
            "Assign both first."
        )
    return held(layer, "keys"), held(layer, "values")


def _entries(cache: Any) -> Iterator[tuple[Any, ...]]:
    for index in range(len(cache)):
        pair = entry(cache, index)
        # Without anything of an encoder the old tuples had two entries.
        yield pair[:2] if len(pair) == 4 and pair[2] is None else pair


def _iterate(own: Callable[[Any], Iterator[Any]] | None, notices: Notices) -> Callable[..., Any]:
    """Pairs for old code; today's iteration, which gives threes and sixes, for today's."""

    def iterate(self: Any) -> Iterator[Any]:
        if own is not None and not old_code_calls():
            return own(self)
        notices.give("iteration")
        # Of old there were no layers before their first tokens.
        return (pair for pair in _entries(self) if pair[0] is not None)

    return iterate


def _reader(side: Side) -> Callable[[Any], LayerTensors]:
    def read(cache: Any) -> LayerTensors:
        _refuse_pair(cache)
        return LayerTensors(cache, side)

    return read


def _writer(side: Side) -> Callable[[Any, Any], None]:
    def write(cache: Any, tensors: Any) -> None:
        _refuse_pair(cache)
        LayerTensors(cache, side).replace(tensors)

    return write


def _refuse_pair(cache: Any) -> None:
    if is_pair(cache) and not is_mnemon(cache):
        raise CacheError(
            "key_cache and value_cache are asked of an EncoderDecoderCache, which has two caches: "
            "ask its self_attention_cache or its cross_attention_cache."
        )
