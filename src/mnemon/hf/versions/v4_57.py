"""transformers 4.57: positions passed as tensors, `crop(n)` a final size, no common states.

Recurrent and convolution models bring cache classes of their own here, which are not
``transformers.Cache`` and which their code asks for by class or by attribute. Those are refused.
"""

from typing import Any, Final

import torch
from transformers import GenerationMixin
from transformers import PretrainedConfig as PreTrainedConfig
from transformers.cache_utils import Cache as CacheBase
from transformers.cache_utils import EncoderDecoderCache as PairBase

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

#: Every model drops its own; these are dropped by all of them.
ONLY_WITH_PROMPT: Final = frozenset({"pixel_values", "pixel_values_videos", "input_features"})
FEEDS_CACHED_AGAIN: Final = False
CHUNKS_CACHED_AGAIN: Final = True
#: BLOOM makes room for empty keys in its position bias for transformers' own StaticCache only.
GROW_ONLY: Final = frozenset("bloom gpt_neo led paligemma".split())
PADDING_POSITION: Final = 1

#: What keeps the states of models that take no common cache, by model type. A test asks
#: transformers whether the list is complete.
_OWN_CACHES: Final = {
    "bamba": "HybridMambaAttentionDynamicCache",
    "falcon_h1": "FalconHybridMambaAttentionDynamicCache",
    "falcon_mamba": "FalconMambaCache",
    "granitemoehybrid": "HybridMambaAttentionDynamicCache",
    "jamba": "HybridMambaAttentionDynamicCache",
    "lfm2": "Lfm2HybridConvCache",
    "lfm2-vl": "Lfm2HybridConvCache",
    "mamba": "MambaCache",
    "mamba2": "Mamba2Cache",
    "minimax": "MiniMaxCache",
    "qwen3_next": "Qwen3NextDynamicCache",
    "recurrent_gemma": "attributes of its own modules",
    "reformer": "ReformerDynamicCache",
    "rwkv": "tuples of tensors",
    "xlnet": "tuples of tensors",
    "xlstm": "xLSTMCache",
    "zamba": "ZambaHybridDynamicCache",
    "zamba2": "Zamba2HybridDynamicCache",
}


#: Other models that mnemon refuses here, with the reason.
_REFUSED: Final = {
    "moonshine": "hands a cache that it is given to its encoder also, which writes into it",
}


class Calls:
    """What this release calls otherwise: lengths in tensors, and the older names and forms."""

    layers: list[Any]

    def get_mask_sizes(self, cache_position: Any, layer_idx: int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` for the positions ``[new]`` of the next tokens."""
        num_new = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        sizes: tuple[int, int] = super().get_mask_sizes(num_new, layer_idx)  # type: ignore[misc]
        return sizes

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens that can be held; -1 without a bound."""
        length: int = self.get_max_length(layer_idx)  # type: ignore[attr-defined]
        return length

    @property
    def max_cache_len(self) -> int:
        return self.get_max_cache_shape()

    @property
    def max_batch_size(self) -> int:
        rows: int = self.batch_size  # type: ignore[attr-defined]
        return rows

    def to_legacy_cache(self) -> tuple[tuple[torch.Tensor | None, ...], ...]:
        """Keys and values of every layer, as tuples (``return_legacy_cache=True``)."""
        return tuple(iter(self))  # type: ignore[call-overload]


def prepare_layers(layers: list[Any]) -> None:
    """Let windows remember the last append: nobody announces here that it may be taken back.

    Assisted decoding is refused as soon as one layer is preallocated, and those that keep nothing
    call themselves so.
    """
    preallocated = all(layer.is_compileable for layer in layers)
    for layer in layers:
        layer.record_last()
        if layer.is_dummy:
            layer.is_compileable = preallocated


def layer_types(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    window = getattr(decoder, "sliding_window", None) or getattr(
        decoder, "attention_chunk_size", None
    )
    names = getattr(decoder, "layer_types", None)
    if names is None:
        name = "full_attention" if window is None else "sliding_attention"
        names = [name] * decoder.num_hidden_layers
    shared = getattr(decoder, "num_kv_shared_layers", None) or 0
    own = len(names) - shared
    return [
        ("dummy", {})
        if index >= own
        else ("sliding_attention", {"sliding_window": window})
        if name in ("sliding_attention", "chunked_attention")
        else ("full_attention", {})
        for index, name in enumerate(names)
    ]


def layer_classes(name: str) -> tuple[Any | None, Any | None]:
    return None, None  # no modeling file brings layers of its own


def why_not_served(decoder: PreTrainedConfig) -> str | None:
    name = decoder.model_type
    reason = _REFUSED.get(name)
    if name in _OWN_CACHES:
        reason = f"keeps its states in {_OWN_CACHES[name]}, and takes no cache made for all models"
    if reason is None:
        return None
    return (
        f"In transformers 4.57 a {name!r} model {reason}. Install transformers>=5.14, where mnemon "
        f"serves it."
    )


def tokens_to_remove(given: int, num_tokens: int) -> int:
    # 0 removes nothing here, as it does from 5.14 on; 4.57's own caches were emptied by it.
    return max(0, num_tokens - given) if given > 0 else -given


def announce_cached(arguments: dict[str, Any], start: int, stop: int) -> None:
    # `generate` takes what it is given for the beginning of the prompt, unless it is told.
    arguments["cache_position"] = torch.arange(start, stop)


def crop_layer(layer: Any, count: int) -> None:
    layer.crop(-count)


def collects_attentions() -> bool:
    return False  # what models want is passed on to their attention functions


def first_inputs(
    model: GenerationMixin,
    chunk: torch.Tensor,
    inputs: dict[str, Any],
    start: int,
    stop: int,
) -> dict[str, Any]:
    positions = torch.arange(start, stop, device=chunk.device)
    # Its `self` and ids have types of their own.
    prepare: Any = model.prepare_inputs_for_generation  # type: ignore[misc]
    prepared: dict[str, Any] = prepare(chunk, cache_position=positions, **inputs)
    return prepared
