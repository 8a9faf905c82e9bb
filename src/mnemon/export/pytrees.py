"""Caches as pytrees of torch, for as long as a context is open.

    with pytrees():
        leaves, spec = torch.utils._pytree.tree_flatten(cache)

Flattening gives the same tensor objects each time (torch marks dimensions on objects: a new view
loses the mark and becomes a constant). Unflattening runs no operator. The context of a node is JSON
and holds no length: those are read from the shapes. Afterwards torch's registries are as before.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as python_tree
from torch import Tensor
from transformers import AutoConfig

from mnemon.cache import Cache
from mnemon.cache.pair import CrossCache
from mnemon.cache.pair import EncoderDecoderCache as Pair
from mnemon.errors import ExportError
from mnemon.hf.exporting import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from mnemon.hf.names import PreTrainedConfig
from mnemon.layers import DenseLayer, HybridLayer, RecurrentLayer, SharedLayer, StaticWindowLayer
from mnemon.layers.packed import PackedLayer
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.sliding import SlidingLayer
from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import TokenLayer

__all__ = ["pytrees"]

_Leaves = list[Tensor]
_LOCK = threading.RLock()  # torch's registries are the process's
_FORGOTTEN = (
    "This cache consists of windows that forgot tokens: how many were seen is in no shape, and a "
    "pytree holds nothing else. Flatten it before, or save it with cache.save()."
)


@contextmanager
def pytrees() -> Iterator[None]:
    """Register every cache class with torch's pytrees; take it back at the end, also on failure."""
    classes: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {
        Cache: (_flatten_own, _unflatten_own),
        CrossCache: (_flatten_own, _unflatten_own),
        Pair: (_flatten_own, _unflatten_own),
        DynamicCache: (_flatten_theirs, _unflatten_dynamic),
        StaticCache: (_flatten_theirs, _unflatten_static),
        EncoderDecoderCache: (_flatten_pair, _unflatten_pair),
    }
    registries: list[Any] = [
        python_tree.SUPPORTED_NODES,
        python_tree.SUPPORTED_SERIALIZED_TYPES,
        python_tree.SERIALIZED_TYPE_TO_PYTHON_TYPE,
    ]
    _LOCK.acquire()
    before = [dict(registry) for registry in registries]
    try:
        for cls, (flatten, unflatten) in classes.items():
            name = f"{cls.__module__}.{cls.__qualname__}"
            if cls in python_tree.SUPPORTED_NODES:
                known = python_tree.SUPPORTED_SERIALIZED_TYPES.pop(cls, None)
                if known is not None:
                    python_tree.SERIALIZED_TYPE_TO_PYTHON_TYPE.pop(known.serialized_type_name, None)
                python_tree.SUPPORTED_NODES.pop(cls)
            python_tree._private_register_pytree_node(
                cls,
                flatten,
                unflatten,
                serialized_type_name=name,
                to_dumpable_context=str,
                from_dumpable_context=str,
                flatten_with_keys_fn=_with_keys(flatten),
            )
        yield
    finally:
        for registry, held in zip(registries, before, strict=True):
            registry.clear()
            registry.update(held)
        _LOCK.release()


def _with_keys(flatten: Callable[[Any], tuple[_Leaves, str]]) -> Callable[[Any], Any]:
    def flatten_with_keys(cache: Any) -> tuple[list[tuple[Any, Tensor]], str]:
        leaves, context = flatten(cache)
        keyed: list[tuple[Any, Tensor]] = [
            (python_tree.SequenceKey(index), leaf) for index, leaf in enumerate(leaves)
        ]
        return keyed, context

    return flatten_with_keys


def _config_json(config: PreTrainedConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _config_of(text: str) -> PreTrainedConfig:
    facts = json.loads(text)
    config: PreTrainedConfig = AutoConfig.for_model(facts.pop("model_type"), **facts)
    return config


# -- mnemon's -----------------------------------------------------------------------------------


def _flatten_own(cache: Cache) -> tuple[_Leaves, str]:
    leaves: _Leaves = []
    knows = any(isinstance(layer, DenseLayer | PackedLayer) for layer in cache.layers)
    for layer in cache.layers:
        if isinstance(layer, SlidingLayer) and not knows and layer.num_stored < layer.num_tokens:
            raise ExportError(_FORGOTTEN)
    facts = [_flatten_layer(layer, leaves) for layer in cache._all_layers]
    context = {
        "class": type(cache).__name__,
        "config": _config_json(cache.config),
        "recipe": str(cache.recipe),
        "layers": facts,
    }
    return leaves, json.dumps(context)


def _unflatten_own(leaves: Sequence[Tensor], context: str) -> Cache:
    facts = json.loads(context)
    config = _config_of(facts["config"])
    cls = CrossCache if facts["class"] == "CrossCache" else Cache
    cache = cls(config, facts["recipe"])
    rest = iter(leaves)
    layers = list(cache._all_layers)
    for layer, fact in zip(layers, facts["layers"], strict=True):
        _fill_layer(layer, fact, rest)
    # A layer that keeps every token knows what the windows beside it have forgotten.
    whole = next((one for one in cache.layers if isinstance(one, DenseLayer | PackedLayer)), None)
    for layer in layers:
        if isinstance(layer, SlidingLayer) and whole is not None and whole.batch_size > 0:
            layer._seen = whole._keys.reading_length(0)
    if isinstance(cache, Pair):
        cache._note_encoded()
    return cache


def _flatten_layer(layer: Any, leaves: _Leaves) -> Any:
    if isinstance(layer, SharedLayer):
        return None
    if isinstance(layer, HybridLayer):
        return [_flatten_layer(part, leaves) for part in layer.parts]
    if isinstance(layer, RecurrentLayer):
        known = [("conv", layer._conv), ("recurrent", layer._recurrent)]
        names = [[kind, index] for kind, states in known for index in sorted(states)]
        for _, states in known:
            leaves += [states[index] for index in sorted(states)]
        return {"states": names, "kernel": layer._kernel, "has": layer._has_state}
    buffers: tuple[Any, ...] = (getattr(layer, "_keys", None), getattr(layer, "_values", None))
    plain = isinstance(layer, TokenLayer | SlidingLayer | StaticWindowLayer)
    kinds = TokenBuffer | StaticBuffer | PackedBuffer
    if not plain or not all(isinstance(one, kinds) for one in buffers):
        raise ExportError(f"A {layer.kind} layer has no form as plain tensors.")
    if getattr(layer, "_dropped", 0):
        raise ExportError("keep() dropped tokens of this cache: its positions are not its shapes.")
    if any(isinstance(one, PackedBuffer) and one.num_skipped for one in buffers):
        raise ExportError(
            "This packed window begins inside a block, which no shape says: a pytree holds nothing "
            "else. Flatten it before, or save it with cache.save()."
        )
    empty = layer.batch_size < 0
    groups = [] if empty else [buffer.leaves() for buffer in buffers]
    leaves += [leaf for group in groups for leaf in group]
    if isinstance(layer, StaticWindowLayer) and not empty:
        assert layer._seen_counter is not None
        leaves.append(layer._seen_counter)
    return {"leaves": [len(group) for group in groups]}


def _fill_layer(layer: Any, fact: Any, leaves: Iterator[Tensor]) -> None:
    if fact is None:
        return
    if isinstance(layer, HybridLayer):
        for part, one in zip(layer.parts, fact, strict=True):
            _fill_layer(part, one, leaves)
        return
    if isinstance(layer, RecurrentLayer):
        for kind, index in fact["states"]:
            states = layer._conv if kind == "conv" else layer._recurrent
            states[index] = next(leaves)
        layer._kernel = {int(key): value for key, value in fact["kernel"].items()}
        layer._has_state = {int(key): value for key, value in fact["has"].items()}
        return
    if not fact["leaves"]:
        return
    for buffer, count in zip((layer._keys, layer._values), fact["leaves"], strict=True):
        buffer.take_leaves([next(leaves) for _ in range(count)])
    if isinstance(layer, SlidingLayer):
        # What the window forgot is not in its shapes: from here on it counts what it holds.
        layer._seen = layer._keys.reading_length(0)
    elif isinstance(layer, StaticWindowLayer):
        layer._seen, layer._seen_counter = None, next(leaves)


# -- transformers' -------------------------------------------------------------------------------


def _flatten_theirs(cache: Any) -> tuple[_Leaves, str]:
    leaves: _Leaves = []
    facts = []
    sliding = [layer.is_sliding for layer in cache.layers]
    for layer in cache.layers:
        count = getattr(layer, "cumulative_length", None)
        if all(sliding) and isinstance(count, int) and layer.keys is not None:
            if count > layer.keys.shape[-2]:
                raise ExportError(_FORGOTTEN)
        filled = getattr(layer, "keys", None) is not None
        window = getattr(layer, "sliding_window", None)
        fact = {"class": type(layer).__name__, "filled": filled, "window": window}
        if isinstance(cache, StaticCache):
            fact["max"] = layer.max_cache_len
        if filled:
            leaves += [layer.keys, layer.values]
            count = getattr(layer, "cumulative_length", None)
            fact["counted"] = isinstance(count, Tensor)
            if isinstance(count, Tensor):
                leaves.append(count)
        facts.append(fact)
    return leaves, json.dumps({"class": type(cache).__name__, "layers": facts})


def _unflatten_dynamic(leaves: Sequence[Tensor], context: str) -> Any:
    return _filled(DynamicCache(), leaves, context)


def _unflatten_static(leaves: Sequence[Tensor], context: str) -> Any:
    return _filled(object.__new__(StaticCache), leaves, context)


def _filled(cache: Any, leaves: Sequence[Tensor], context: str) -> Any:
    facts = json.loads(context)
    rest = iter(leaves)
    layers = []
    for fact in facts["layers"]:
        # Not through the constructor: a static layer's makes a tensor.
        layer = object.__new__(getattr(cache_utils, fact["class"]))
        cache_utils.CacheLayerMixin.__init__(layer)
        if "max" in fact:
            layer.max_cache_len = fact["max"]
        if fact["window"] is not None:
            layer.sliding_window = fact["window"]
            layer.record_past = False
        if fact["filled"]:
            layer.keys, layer.values = next(rest), next(rest)
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.is_initialized = True
            if fact["counted"]:
                layer.cumulative_length = next(rest)
            elif "Sliding" in fact["class"]:
                layer.cumulative_length = layer.keys.shape[-2]
        layers.append(layer)
    # A layer that keeps every token knows what the windows beside it have forgotten.
    whole = next((one.keys for one in layers if not one.is_sliding and one.is_initialized), None)
    for layer in layers:
        if layer.is_sliding and whole is not None and isinstance(layer.cumulative_length, int):
            layer.cumulative_length = whole.shape[-2]
    cache_utils.Cache.__init__(cache, layers=layers)
    return cache


def _flatten_pair(cache: Any) -> tuple[list[Any], str]:
    return [cache.self_attention_cache, cache.cross_attention_cache], type(cache).__name__


def _unflatten_pair(children: Sequence[Any], context: str) -> Any:
    return EncoderDecoderCache(*children)
