"""transformers 5.14 to 5.18: one set of options for all layers; `crop(n)` is a final size."""

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
from transformers.utils.output_capturing import _active_collector

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

#: From 5.15 on `generate` has a list (MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL); before, every
#: model drops its own. These are dropped by all of them.
ONLY_WITH_PROMPT: Final = frozenset({"pixel_values", "pixel_values_videos", "input_features"})
FEEDS_CACHED_AGAIN: Final = True
PADDING_POSITION: Final = 0

# What 5.19 calls these layer types.
_RENAMED: Final = {"deepseek_sparse_attention": "indexed_attention", "moe": "dummy", "mlp": "dummy"}
# Options that belong to some types only, and are handed to all.
_BELONGS: Final = {
    "sliding_window": ("sliding_attention", "chunked_attention", "hybrid_sliding"),
    "number_of_states": ("conv", "linear_attention", "hybrid", "hybrid_sliding"),
}


class Calls:
    """Nothing beyond what every cache answers."""


def prepare_layers(layers: list[Any]) -> None:
    """Nothing: `generate` says itself when layers have to remember what may be taken back."""


def layer_types(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    found: Any = get_layer_types_and_kwargs(decoder)
    names, options = found
    total = len(getattr(decoder, "layer_types", None) or names)
    # Layers that read another layer's keys come last and are left out of the list.
    names = [*names, *["dummy"] * (total - len(names))]
    return [
        (
            _RENAMED.get(name, name),
            {key: value for key, value in options.items() if name in _BELONGS.get(key, (name,))},
        )
        for name in names
    ]


def layer_classes(name: str) -> tuple[Any | None, Any | None]:
    # Modeling files add their own when they are imported.
    return DYNAMIC_LAYER_TYPE_MAPPING.get(name), STATIC_LAYER_TYPE_MAPPING.get(name)


def why_not_served(decoder: PreTrainedConfig) -> str | None:
    return None


def tokens_to_remove(given: int, num_tokens: int) -> int:
    return max(0, num_tokens - given) if given > 0 else -given


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
