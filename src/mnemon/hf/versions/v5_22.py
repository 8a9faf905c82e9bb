"""transformers 5.22 and 5.23: the ground that mnemon's own words follow."""

from typing import Any, Final

from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from mnemon.errors import CacheError
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
    crop_layer,
    first_inputs,
    layer_classes,
    prepare_layers,
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

ONLY_WITH_PROMPT: Final = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
CHUNKS_CACHED_AGAIN: Final = False
GROW_ONLY: Final = frozenset("gpt_neo inkling_text led minimax_m3_vl_text paligemma".split())


def layer_types(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    types, options = get_layer_types_and_kwargs(decoder)
    names = [RENAMED.get(name, name) for name in types]
    return list(zip(names, options, strict=True))


def tokens_to_remove(given: int, num_tokens: int) -> int:
    if given > 0:
        raise CacheError(
            f"crop takes minus the number of tokens to remove, e.g. crop(-3); got {given}. For a "
            f"final size of n: crop(n - cache.num_tokens)."
        )
    return -given
