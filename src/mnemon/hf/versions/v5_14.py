"""transformers 5.14 to 5.18: one set of options for all layers; `crop(n)` is a final size."""

import inspect
from typing import Any, Final

from transformers.cache_utils import get_layer_types_and_kwargs

from mnemon.hf.versions import five
from mnemon.hf.versions.five import (
    FEEDS_CACHED_AGAIN,
    PADDING_POSITION,
    RENAMED,
    CacheBase,
    Calls,
    PairBase,
    PreTrainedConfig,
    announce_cached,
    collects_attentions,
    first_inputs,
    layer_classes,
    prepare_layers,
)

__all__ = [
    "CHUNKS_CACHED_AGAIN",
    "FEEDS_CACHED_AGAIN",
    "GROW_ONLY",
    "ONLY_WITH_PROMPT",
    "PADDING_POSITION",
    "CacheBase",
    "Calls",
    "PairBase",
    "PreTrainedConfig",
    "announce_cached",
    "collects_attentions",
    "crop_layer",
    "first_inputs",
    "layer_classes",
    "layer_types",
    "prepare_layers",
    "tokens_to_remove",
    "why_not_served",
]

#: From 5.15 on `generate` has a list of these; before, every model drops its own. These are dropped
#: by all of them.
ONLY_WITH_PROMPT: Final = frozenset({"pixel_values", "pixel_values_videos", "input_features"})
CHUNKS_CACHED_AGAIN: Final = True
#: BLOOM makes room for empty keys in its position bias for transformers' own StaticCache only.
GROW_ONLY: Final = frozenset("bloom gpt_neo inkling_text led minimax_m3_vl_text paligemma".split())

# Options that belong to some types only, and are handed to all.
_BELONGS: Final = {
    "sliding_window": ("sliding_attention", "chunked_attention", "hybrid_sliding"),
    "number_of_states": ("conv", "linear_attention", "hybrid", "hybrid_sliding"),
}


def layer_types(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    found: Any = get_layer_types_and_kwargs(decoder)
    names, options = found
    total = len(getattr(decoder, "layer_types", None) or names)
    # Layers that read another layer's keys come last and are left out of the list.
    names = [*names, *["dummy"] * (total - len(names))]
    return [
        (
            RENAMED.get(name, name),
            {key: value for key, value in options.items() if name in _BELONGS.get(key, (name,))},
        )
        for name in names
    ]


def crop_layer(layer: Any, count: int) -> None:
    # Given what to remove, MiniMax M3's layer of 5.14 removes twice as many of its index keys.
    if "max_length" in inspect.signature(layer.crop).parameters:
        left = layer.get_seq_length() - count
        layer.crop(max(left, 1))
        if left == 0:  # a final size of 0 cannot be asked for
            layer.crop(-1)
    else:
        layer.crop(-count)


def why_not_served(decoder: PreTrainedConfig) -> str | None:
    if decoder.model_type == "olmo_hybrid":
        from transformers.models.olmo_hybrid import modeling_olmo_hybrid as modeling

        if hasattr(modeling, "OlmoHybridDynamicCache"):
            return (
                "In transformers 5.14 an 'olmo_hybrid' model keeps its states in "
                "OlmoHybridDynamicCache, and takes no cache made for all models. Install "
                "transformers>=5.15, where mnemon serves it."
            )
    return five.why_not_served(decoder)


def tokens_to_remove(given: int, num_tokens: int) -> int:
    return max(0, num_tokens - given) if given > 0 else -given
