"""transformers 5.19 to 5.21: as 5.22, but for chunked prefill and BLOOM."""

from typing import Final

from mnemon.hf.versions.v5_22 import (
    FEEDS_CACHED_AGAIN,
    ONLY_WITH_PROMPT,
    PADDING_POSITION,
    CacheBase,
    Calls,
    PairBase,
    PreTrainedConfig,
    announce_cached,
    collects_attentions,
    crop_layer,
    first_inputs,
    layer_classes,
    layer_types,
    prepare_layers,
    tokens_to_remove,
    why_not_served,
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

CHUNKS_CACHED_AGAIN: Final = True
#: BLOOM makes room for empty keys in its position bias for transformers' own StaticCache only.
GROW_ONLY: Final = frozenset("bloom gpt_neo inkling_text led minimax_m3_vl_text paligemma".split())
