"""Making a model compress its cache, and undoing it."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mnemon.compression import CONFIG_NAME, Compression
from mnemon.errors import LearnedMemoryError
from mnemon.hf import compressing as hf
from mnemon.hf.kinds import decoder_config
from mnemon.memory.retrofitting.attention import PROJECTION, CompressedForward
from mnemon.memory.retrofitting.control import Control

__all__ = ["attach_compression", "control_of", "detach_compression"]

_CONTROL = "_mnemon_control"


def attach_compression(model: PreTrainedModel, compression: Compression) -> Control:
    """Let the layers of `model` decide which tokens their cache merges or drops.

    The model's config says so from now on, and `mnemon.Cache(model.config)` follows it. A new
    projection decides nothing yet; `detach_compression` undoes everything.

    Args:
        model: a causal model of Llama, Qwen2, Qwen3 or Mistral type; changed in place.
        compression: how it compresses.

    Returns:
        The settings that its layers share.

    Raises:
        LearnedMemoryError: another kind of model, or one that compresses already.
    """
    if control_of(model) is not None:
        raise LearnedMemoryError(
            f"{type(model).__name__} compresses already; call "
            f"mnemon.memory.detach_compression(model) first."
        )
    layers = hf.compressible_layers(model)
    control = Control(compression=compression)
    for layer in layers:
        if compression.source == "projection":
            parts: Any = layer
            weight = parts.k_proj.weight
            projection = nn.Linear(
                weight.shape[1],
                weight.shape[0] // parts.head_dim,
                bias=False,
                dtype=weight.dtype,
                device=weight.device,
            )
            nn.init.zeros_(projection.weight)
            layer.add_module(PROJECTION, projection)
        layer.forward = CompressedForward(layer, control)
    for config in _configs(model):
        setattr(config, CONFIG_NAME, compression.to_dict())
    object.__setattr__(model, _CONTROL, control)
    return control


def detach_compression(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Let `model` keep every token again; nothing happens if it does.

    Returns:
        The weights that decided, by the names they had in the state dict; empty for a neuron.
    """
    weights = decision_weights(model)
    if control_of(model) is None:
        return weights
    for layer in hf.compressible_layers(model):
        vars(layer).pop("forward", None)
        layer._modules.pop(PROJECTION, None)
    for config in _configs(model):
        vars(config).pop(CONFIG_NAME, None)
    vars(model).pop(_CONTROL, None)
    return weights


def control_of(model: nn.Module) -> Control | None:
    """What the layers of `model` share; None if it does not compress."""
    control: Control | None = vars(model).get(_CONTROL)
    return control


def decision_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the projections that decide, by their names in the state dict."""
    return {
        name: weight for name, weight in model.state_dict().items() if f".{PROJECTION}." in name
    }


def _configs(model: PreTrainedModel) -> list[Any]:
    """The model's config and that of its decoder, which may be the same."""
    whole, decoder = model.config, decoder_config(model.config)
    return [whole] if decoder is whole else [whole, decoder]
