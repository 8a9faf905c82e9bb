"""From a transformers config to what every decoder layer keeps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mnemon.compression import Compression, compression_of
from mnemon.errors import ModelError, NotServed
from mnemon.hf.names import PreTrainedConfig
from mnemon.hf.versions import current

__all__ = ["LayerSpec", "decoder_config", "is_encoder_decoder", "layer_specs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What one decoder layer keeps.

    Args:
        attends: keeps keys and values.
        window: tokens that a query sees, itself included; None for all.
        num_states: pairs of convolution and recurrent states beside them.
        indexed: keeps indexer keys (dynamic sparse attention).
        foreign: makes a layer of a class that lives in a modeling file of transformers, for layer
            types that only that model knows.
        foreign_static: the same with room for so many tokens; None where that model has none.
        counts_keys: the model's attention takes every key it is handed for a real one.
        compression: the model decides which tokens stay (a retrofitted model).
    """

    attends: bool = True
    window: int | None = None
    num_states: int = 0
    indexed: bool = False
    foreign: Callable[[], Any] | None = None
    foreign_static: Callable[[int], Any] | None = None
    counts_keys: bool = False
    compression: Compression | None = None

    @property
    def keeps_nothing(self) -> bool:
        return not self.attends and not self.num_states and self.foreign is None


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the text decoder.

    Raises:
        ModelError: not a transformers config.
    """
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(
            f"mnemon.Cache takes a transformers config (model.config); got {type(config).__name__}."
        )
    return config.get_text_config(decoder=True)


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the decoder also attends to an encoder whose keys are kept."""
    return bool(getattr(config, "is_encoder_decoder", False))


def layer_specs(config: PreTrainedConfig) -> list[LayerSpec]:
    """What each decoder layer of `config` keeps, in layer order.

    Raises:
        ModelError: not a config, or a layer type that nobody knows.
        NotServed: in this version of transformers, the model takes a cache of its own only.
    """
    decoder = decoder_config(config)
    reason = current.why_not_served(decoder)
    if reason is not None:
        raise NotServed(reason)
    try:
        found = current.layer_types(decoder)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"Cannot tell what the layers of a {decoder.model_type!r} model keep ({error}); "
            f"pass the config of a model that generates text."
        ) from error
    # Of a multimodal model it is the whole that counts keys (PaliGemma), not its decoder alone.
    types = {str(config.model_type), str(decoder.model_type)}
    grows_only = not types.isdisjoint(current.GROW_ONLY)
    compression = compression_of(decoder)
    return [
        replace(_spec(name, options, decoder), counts_keys=grows_only, compression=compression)
        for name, options in found
    ]


def _spec(name: str, options: dict[str, Any], decoder: PreTrainedConfig) -> LayerSpec:
    window = options.get("sliding_window")
    num_states = options.get("number_of_states", 1)
    match name:
        case "full_attention":
            return LayerSpec()
        case "sliding_attention" | "chunked_attention":
            return LayerSpec(window=window)
        case "indexed_attention":
            return LayerSpec(indexed=True)
        case "conv" | "linear_attention":
            return LayerSpec(attends=False, num_states=num_states)
        case "hybrid":
            return LayerSpec(num_states=num_states)
        case "hybrid_sliding":
            return LayerSpec(window=window, num_states=num_states)
        case "dummy":
            return LayerSpec(attends=False)
    # Layer types that a modeling file registers when it is imported, with a class of its own.
    known, static = current.layer_classes(name)
    if known is None:
        raise ModelError(
            f"Layer type {name!r} of a {decoder.model_type!r} model is unknown to this version of "
            f"transformers and to mnemon; load the model first if it registers its own layers."
        )
    return LayerSpec(
        window=window,
        foreign=lambda: known(**options),
        foreign_static=None if static is None else lambda size: static(size, **options),
    )
