"""The old form of a cache, a tuple with one entry per layer, and the way there and back.

    decoder-only      (keys, values), each [batch, kv_heads, tokens, width]
    encoder-decoder   (keys, values, cross keys, cross values); the encoder's tokens in the latter
    Bloom             keys [batch * heads, width, tokens], values [batch * heads, tokens, width]
    iteration, 5.x    (keys, values, window or None), what iterating over a DynamicCache gives

Nothing is copied where memory allows: a growing cache borrows the tensors it is made of, until its
first append; what comes out are views of what the cache holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mnemon import layers as kinds
from mnemon import policies
from mnemon.cache.pair import EncoderDecoderCache
from mnemon.cache.plain import Cache
from mnemon.errors import CacheError
from mnemon.hf.kinds import LayerSpec, decoder_config
from mnemon.hf.names import PreTrainedConfig
from mnemon.layers.base import CacheLayer
from mnemon.recipe import Recipe, parse

__all__ = ["from_tuples", "to_tuples", "unfold_heads"]

Pair = tuple[torch.Tensor, torch.Tensor]
Entry = tuple[Pair | None, Pair | None]  # (the decoder's, the encoder's)
_PLAIN, _WITH_WINDOW, _CROSS, _CROSS_WITH_WINDOW = 2, 3, 4, 6
_LAYOUTS = (
    "(keys, values), or (keys, values, cross keys, cross values) of an encoder-decoder model, each "
    "[batch, kv_heads, tokens, width]"
)


def from_tuples(
    past: Iterable[Sequence[Any]],
    config: PreTrainedConfig | None = None,
    recipe: str | Recipe = "",
    num_tokens: int | None = None,
) -> Cache:
    """A cache that holds what the tuple `past` holds; see `Cache.from_legacy`."""
    if isinstance(past, torch.Tensor) or not isinstance(past, Iterable):
        raise CacheError(f"A {type(past).__name__} is no tuple of layers; expected {_LAYOUTS}.")
    items = list(past)
    entries = [_entry(item, index, config) for index, item in enumerate(items)]
    parsed = parse(recipe)
    if config is None:
        # Four entries are an encoder-decoder's, also before anything was encoded.
        paired = any(len(item) in (_CROSS, _CROSS_WITH_WINDOW) for item in items)
        cache = _without_config(entries, parsed, paired)
    else:
        cache = Cache(config, parsed)
    entries = _one_for_each(entries, cache)
    encoded = any(cross is not None for _, cross in entries)
    groups = cache._groups()
    if encoded and len(groups) == 1:
        raise CacheError(
            "The tuple has four tensors per layer, an encoder's among them, and the config "
            f"({cache.config.model_type!r}) is of a model without an encoder."
        )
    _check_batches(entries)
    seen = _num_tokens(entries, groups[0], num_tokens)
    for group, pairs in zip(groups, zip(*entries, strict=True), strict=False):
        for index, (layer, pair) in enumerate(zip(group, pairs, strict=True)):
            if pair is not None:
                own = group is groups[0]
                _fill(layer, pair, seen if own else pair[0].shape[-2], index)
    if isinstance(cache, EncoderDecoderCache):
        cache._note_encoded()
    return cache


def to_tuples(cache: Cache) -> tuple[tuple[torch.Tensor, ...], ...]:
    """What `cache` holds as a tuple; see `Cache.to_legacy`."""
    groups = cache._groups()
    result = []
    for index, own in enumerate(groups[0]):
        tensors = _tensors(own, index)
        for group in groups[1:]:
            tensors += _tensors(group[index], index)
        if tensors:
            result.append(tensors)
    return tuple(result)


def _tensors(layer: CacheLayer, index: int) -> tuple[torch.Tensor, ...]:
    if layer.is_dummy or layer.batch_size < 0:
        return ()
    if not layer.is_pair:
        raise CacheError(
            f"Layer {index} is of kind {layer.kind!r}, which keeps more than one pair of keys and "
            f"values: the old tuples have no place for it. Use cache.save(path) or cache.fork()."
        )
    return layer.dense_pair()


def _entry(item: object, index: int, config: PreTrainedConfig | None) -> Entry:
    """One layer's entry, checked."""
    parts = list(item) if isinstance(item, (tuple, list)) else []
    if len(parts) in (_WITH_WINDOW, _CROSS_WITH_WINDOW):
        del parts[2::3]  # the window: the config says it too
    if len(parts) not in (_PLAIN, _CROSS):
        found = f"{len(parts)} entries" if parts else f"a {type(item).__name__}"
        raise CacheError(f"Layer {index} of the tuple is {found}; expected {_LAYOUTS}.")
    own, cross = (_pair(two, index, config) for two in (parts[:2], parts[2:]))
    return own, cross


def _pair(two: list[Any], index: int, config: PreTrainedConfig | None) -> Pair | None:
    """Keys and values of one layer; None where that layer holds nothing."""
    if all(tensor is None or (isinstance(tensor, list) and not tensor) for tensor in two):
        return None
    keys, values = two
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        raise CacheError(
            f"Layer {index} of the tuple holds a {type(keys).__name__} and a "
            f"{type(values).__name__}; expected {_LAYOUTS}."
        )
    if keys.ndim == values.ndim == 3:
        keys, values = unfold_heads(keys, values, index, config)
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
        raise CacheError(
            f"Layer {index} of the tuple has keys {list(keys.shape)} and values "
            f"{list(values.shape)}; expected {_LAYOUTS}, which agree in all but the width."
        )
    heads = None if config is None else _num_kv_heads(config)
    if heads is not None and keys.shape[1] != heads and keys.shape[2] == heads:
        raise CacheError(
            f"Layer {index} of the tuple has keys {list(keys.shape)}, and the model {heads} heads "
            f"for them: this looks like [batch, tokens, kv_heads, width]. Transpose axes 1 and 2."
        )
    return keys, values


def unfold_heads(
    keys: torch.Tensor, values: torch.Tensor, index: int, config: PreTrainedConfig | None
) -> Pair:
    """Bloom's keys and values as views ``[batch, heads, tokens, width]``."""
    if config is None:
        raise CacheError(
            f"Layer {index} of the tuple has keys {list(keys.shape)} and values "
            f"{list(values.shape)}, batch and heads in one axis, as Bloom had them. Pass the "
            f"model's config, which knows the number of heads."
        )
    heads = int(decoder_config(config).num_attention_heads)
    rows, num_tokens, width = values.shape
    if rows % heads or keys.shape != (rows, width, num_tokens):
        raise CacheError(
            f"Layer {index} of the tuple has keys {list(keys.shape)} and values "
            f"{list(values.shape)}; for a model of {heads} heads expected [batch * {heads}, width, "
            f"tokens] and [batch * {heads}, tokens, width], as Bloom had them."
        )
    return (
        keys.unflatten(0, (rows // heads, heads)).transpose(-1, -2),
        values.unflatten(0, (rows // heads, heads)),
    )


def _num_kv_heads(config: PreTrainedConfig) -> int | None:
    decoder = decoder_config(config)
    found = getattr(decoder, "num_key_value_heads", None)
    if found is None:
        found = getattr(decoder, "num_attention_heads", None)
    return found if isinstance(found, int) else None


def _without_config(entries: list[Entry], recipe: Recipe, paired: bool) -> Cache:
    """An empty cache whose layers keep every token, as many as the tuple has."""
    if not entries:
        raise CacheError(
            "The tuple has no layers, and nothing else says how many there are: pass the model's "
            "config, or make an empty cache with mnemon.Cache(config)."
        )
    own = policies.build_all([LayerSpec()] * len(entries), recipe)
    if not paired:
        return Cache._of(PreTrainedConfig(), recipe, own)
    cache = object.__new__(EncoderDecoderCache)
    cache._init_groups(PreTrainedConfig(), recipe, own, [kinds.CrossLayer() for _ in entries])
    return cache


def _one_for_each(entries: list[Entry], cache: Cache) -> list[Entry]:
    """An entry for every layer of `cache`: layers that keep nothing may lack theirs."""
    layers = cache.layers
    if not entries:
        return [(None, None)] * len(layers)
    if len(entries) != len(layers):
        keeping = [layer for layer in layers if not layer.is_dummy]
        if len(entries) != len(keeping):
            raise CacheError(
                f"The tuple has {len(entries)} layers and the model "
                f"({cache.config.model_type!r}) {len(layers)}, {len(keeping)} of which keep "
                f"something: it was made by another model."
            )
        found = iter(entries)
        entries = [(None, None) if layer.is_dummy else next(found) for layer in layers]
    empty = [own is None for (own, _), layer in zip(entries, layers, strict=True) if _kept(layer)]
    if any(empty) and not all(empty):
        raise CacheError(f"Layer {empty.index(True)} of the tuple is empty and others are not.")
    return entries


def _kept(layer: CacheLayer) -> bool:
    return not layer.is_dummy


def _check_batches(entries: list[Entry]) -> None:
    pairs = [pair for entry in entries for pair in entry if pair is not None]
    rows = {pair[0].shape[0] for pair in pairs}
    if len(rows) > 1:
        raise CacheError(f"The layers of the tuple have batches of {sorted(rows)} rows.")


def _num_tokens(entries: list[Entry], layers: list[CacheLayer], said: int | None) -> int:
    """How many tokens the cache has seen: what its longest layer holds, or what the caller says."""
    stored = {own[0].shape[-2] for own, _ in entries if own is not None}
    longest = max(stored, default=0)
    whole = {
        own[0].shape[-2]
        for (own, _), layer in zip(entries, layers, strict=True)
        if own is not None and not layer.is_sliding
    }
    if len(whole) > 1 or (whole and said is not None and said not in whole):
        raise CacheError(
            f"Layers that keep every token hold {sorted(whole)} tokens"
            + (f", and num_tokens={said} was given." if said is not None else ".")
        )
    if said is not None and said < longest:
        raise CacheError(f"num_tokens={said} was given and the tuple holds {longest} tokens.")
    if not whole and said is None and _may_have_forgotten(entries, layers):
        raise CacheError(
            f"Every layer keeps a window only, and the tuple holds {longest} tokens, as many as a "
            f"full window: it may have seen more. Pass num_tokens=, the tokens seen in all "
            f"(num_tokens={longest} if these are all)."
        )
    return longest if said is None else said


def _may_have_forgotten(entries: list[Entry], layers: list[CacheLayer]) -> bool:
    """Whether a window layer's entry is just as long as a window that let tokens go."""
    for (own, _), layer in zip(entries, layers, strict=True):
        window = layer.state().meta.get("window")
        if own is not None and window is not None and own[0].shape[-2] in (window - 1, window):
            return True
    return False


def _fill(layer: CacheLayer, pair: Pair, seen: int, index: int) -> None:
    if not layer.is_pair:
        raise CacheError(
            f"Layer {index} of the model is of kind {layer.kind!r}, which keeps more than one pair "
            f"of keys and values: the old tuples do not hold it. Compute the cache again, or use "
            f"cache.save(path)."
        )
    if layer.is_compileable and seen == pair[0].shape[-2]:
        layer.append(*pair)  # preallocated memory is written to, whatever comes
        return
    empty = layer.state()
    tensors = {"keys": pair[0], "values": pair[1]}
    layer.load_state(replace(empty, tensors=tensors, meta={**empty.meta, "num_tokens": seen}))
