"""transformers 5.19 to 5.23: options per layer, and every layer is named."""

from typing import Any, Final

import torch
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    get_layer_types_and_kwargs,
)
from transformers.cache_utils import Cache as CacheBase
from transformers.cache_utils import EncoderDecoderCache as PairBase
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.utils.output_capturing import _active_collector

from mnemon.errors import CacheError

__all__ = [
    "FEEDS_CACHED_AGAIN",
    "ONLY_WITH_PROMPT",
    "PADDING_POSITION",
    "CacheBase",
    "Calls",
    "PairBase",
    "PreTrainedConfig",
    "collects_attentions",
    "first_inputs",
    "layer_classes",
    "layer_types",
    "prepare_layers",
    "tokens_to_remove",
    "why_not_served",
]

ONLY_WITH_PROMPT: Final = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
FEEDS_CACHED_AGAIN: Final = True
PADDING_POSITION: Final = 0


class Calls:
    """Nothing beyond what every cache answers."""


def prepare_layers(layers: list[Any]) -> None:
    """Nothing: `generate` says itself when layers have to remember what may be taken back."""


def layer_types(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    types, options = get_layer_types_and_kwargs(decoder)
    return list(zip(types, options, strict=True))


def layer_classes(name: str) -> tuple[Any | None, Any | None]:
    # Modeling files add their own when they are imported.
    return DYNAMIC_LAYER_TYPE_MAPPING.get(name), STATIC_LAYER_TYPE_MAPPING.get(name)


def why_not_served(decoder: PreTrainedConfig) -> str | None:
    return None


def tokens_to_remove(given: int, num_tokens: int) -> int:
    if given > 0:
        raise CacheError(
            f"crop takes minus the number of tokens to remove, e.g. crop(-3); got {given}. For a "
            f"final size of n: crop(n - cache.num_tokens)."
        )
    return -given


def collects_attentions() -> bool:
    collected = _active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


def first_inputs(
    model: GenerationMixin,
    chunk: torch.Tensor,
    inputs: dict[str, Any],
    start: int,
    stop: int,
) -> dict[str, Any]:
    # Its `self` and ids have types of their own.
    prepare: Any = model.prepare_inputs_for_generation  # type: ignore[misc]
    prepared: dict[str, Any] = prepare(chunk, is_first_iteration=True, **inputs)
    return prepared
