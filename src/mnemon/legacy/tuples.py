"""From the tuples of old to a cache, without a copy where the layers grow.

GPT-2   per layer (keys, values), each [batch, heads, tokens, head_dim]
BART    (keys, values, cross keys, cross values)
Bloom   keys [batch * heads, head_dim, tokens], values [batch * heads, tokens, head_dim]
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import cache_utils

from mnemon.cache.legacy_form import unfold_heads
from mnemon.errors import CacheError
from mnemon.legacy.views import put_pair

__all__ = ["cache_for", "from_pairs", "is_tuple"]


def is_tuple(past: object) -> bool:
    """Whether this is the past in its old form (or the empty tuple)."""
    return isinstance(past, (tuple, list)) and all(
        entry is None or isinstance(entry, (tuple, list)) for entry in past
    )


def from_pairs(past: Sequence[Any] | None, cls: type | None = None) -> Any:
    """A cache of class `cls` (`DynamicCache`, or `EncoderDecoderCache`) that holds `past`."""
    if cls is not None and issubclass(cls, cache_utils.EncoderDecoderCache):
        pair: Any = cls(cache_utils.DynamicCache(), cache_utils.DynamicCache())
        for index, entry in enumerate(past or ()):
            _put(pair.self_attention_cache, index, entry[:2])
            if len(entry) > 2:
                _put(pair.cross_attention_cache, index, entry[2:])
                pair.is_updated[index] = True
        return pair
    cache: Any = (cls or cache_utils.DynamicCache)()
    for index, entry in enumerate(past or ()):
        _put(cache, index, entry)
    return cache


def cache_for(model: Any, past: Sequence[Any]) -> Any:
    """The cache that `model` would make for itself, holding `past`; None for an empty tuple.

    Raises:
        CacheError: a layout that is none of the three, or another number of layers.
    """
    entries = [entry for entry in past if entry is not None and any(e is not None for e in entry)]
    if not entries:
        return None
    if len(entries) != len(past):
        raise CacheError(
            f"{len(past) - len(entries)} of {len(past)} layers of past_key_values are empty: give "
            "keys and values for each, or None for the whole."
        )
    config = model.config.get_text_config(decoder=True)
    entries = [_four_dimensions(entry, index, config) for index, entry in enumerate(entries)]
    encoded = model.config.is_encoder_decoder or any(len(entry) == 4 for entry in entries)
    own = cache_utils.DynamicCache(config=config)
    if own.layers and len(own.layers) != len(entries):
        raise CacheError(
            f"The tuple has {len(entries)} layers, and {type(model).__name__} keeps "
            f"{len(own.layers)}: it was made by another model."
        )
    for index, entry in enumerate(entries):
        _put(own, index, entry[:2])
    if not encoded:
        return own
    cross = cache_utils.DynamicCache()
    for index, entry in enumerate(entries):
        if len(entry) == 4:
            _put(cross, index, entry[2:])
    return cache_utils.EncoderDecoderCache(own, cross)


def _put(cache: Any, index: int, pair: Sequence[Any]) -> None:
    if len(pair) != 2 or not all(isinstance(tensor, torch.Tensor) for tensor in pair):
        raise CacheError(
            f"Layer {index} of past_key_values is {[type(part).__name__ for part in pair]}; "
            "expected two tensors, keys and values (four with an encoder)."
        )
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    put_pair(cache.layers[index], *pair)


def _four_dimensions(entry: Sequence[Any], index: int, config: Any) -> tuple[Any, ...]:
    """The tensors of one layer, Bloom's unfolded to [batch, heads, tokens, head_dim]: views."""
    if len(entry) not in (2, 4):
        raise CacheError(
            f"Layer {index} of past_key_values has {len(entry)} entries; expected keys and values, "
            "and the encoder's two after them."
        )
    if not all(isinstance(tensor, torch.Tensor) for tensor in entry):
        raise CacheError(
            f"Layer {index} of past_key_values is {[type(part).__name__ for part in entry]}; "
            "expected tensors."
        )
    keys, values = entry[:2]
    if keys.ndim == 3 and values.ndim == 3:
        keys, values = unfold_heads(keys, values, index, config)
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise CacheError(
            f"Layer {index} of past_key_values has keys {list(keys.shape)} and values "
            f"{list(values.shape)}; expected [batch, heads, tokens, head_dim] for both."
        )
    return (keys, values, *entry[2:])
