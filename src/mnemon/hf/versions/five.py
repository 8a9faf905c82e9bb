"""What all served releases of transformers 5 have in common; no adapter by itself."""

from typing import Any, Final

import torch
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.cache_utils import Cache as CacheBase
from transformers.cache_utils import EncoderDecoderCache as PairBase
from transformers.utils.output_capturing import _active_collector

__all__ = [
    "FEEDS_CACHED_AGAIN",
    "PADDING_POSITION",
    "RENAMED",
    "CacheBase",
    "Calls",
    "PairBase",
    "PreTrainedConfig",
    "announce_cached",
    "collects_attentions",
    "crop_layer",
    "first_inputs",
    "layer_classes",
    "prepare_layers",
    "why_not_served",
]

#: What 5.23 calls layer types of older releases and older configs.
RENAMED: Final = {"deepseek_sparse_attention": "indexed_attention", "moe": "dummy", "mlp": "dummy"}
FEEDS_CACHED_AGAIN: Final = True
PADDING_POSITION: Final = 0


class Calls:
    """Nothing beyond what every cache answers."""


def prepare_layers(layers: list[Any]) -> None:
    """Nothing: `generate` says itself when layers have to remember what may be taken back."""


def layer_classes(name: str) -> tuple[Any | None, Any | None]:
    # Modeling files add their own when they are imported.
    return DYNAMIC_LAYER_TYPE_MAPPING.get(name), STATIC_LAYER_TYPE_MAPPING.get(name)


def why_not_served(decoder: PreTrainedConfig) -> str | None:
    # Its layers with states are named from 5.23 on; before, a cache does not learn of them.
    named = "linear_attention" in (getattr(decoder, "layer_types", None) or ())
    if decoder.model_type == "recurrent_gemma" and not named:
        return (
            "Before transformers 5.23 a 'recurrent_gemma' model does not name the layers that keep "
            "states, in its modules, so that no cache can look after them. Install "
            "transformers>=5.23, where mnemon serves it."
        )
    return None


def announce_cached(arguments: dict[str, Any], start: int, stop: int) -> None:
    """Nothing: a mask that is longer than the ids says it."""


def crop_layer(layer: Any, count: int) -> None:
    layer.crop(-count)


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
