"""What a retrofit needs of transformers' attention modules: their parts, and how they attend.

Llama, Qwen2, Qwen3 and Mistral share one form: four projections, norms of queries and keys in some
(Qwen3), rotary positions, and a function of the module's file that applies them.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mnemon.errors import LearnedMemoryError
from mnemon.hf.eager import eager_function
from mnemon.hf.kinds import decoder_config

__all__ = [
    "Projected",
    "as_seen",
    "attend_plainly",
    "compressible_layers",
    "output",
    "project",
    "rotate",
    "sliding_window",
]

_SERVED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


class Projected(NamedTuple):
    """What attention is computed from, before positions: ``[batch, heads, new, head_dim]``."""

    query: Tensor
    keys: Tensor
    values: Tensor


def compressible_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a causal model, in layer order.

    Raises:
        LearnedMemoryError: not a Llama-, Qwen- or Mistral-type decoder.
    """
    found = [module for module in model.modules() if type(module).__name__ in _SERVED]
    expected = getattr(decoder_config(model.config), "num_hidden_layers", 0)
    if not found or len(found) != expected:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
        )
        raise LearnedMemoryError(
            f"{type(model).__name__} has {len(found)} attention modules that can be retrofitted of "
            f"{expected} layers (its own: {', '.join(kinds) or 'none'}); expected a decoder of "
            f"{', '.join(_SERVED)}."
        )
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def project(module: nn.Module, hidden: Tensor) -> Projected:
    """Queries, keys and values of `hidden` [batch, new, width], normed, without positions."""
    shape = (*hidden.shape[:-1], -1, module.head_dim)
    parts: Any = module
    query, keys = parts.q_proj(hidden).view(shape), parts.k_proj(hidden).view(shape)
    if hasattr(module, "q_norm"):  # Qwen3
        query, keys = parts.q_norm(query), parts.k_norm(keys)
    values = parts.v_proj(hidden).view(shape)
    return Projected(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))


def rotate(
    module: nn.Module, query: Tensor, keys: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys at their positions, by the module's own function."""
    apply: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
        type(module).__module__
    ].apply_rotary_pos_emb
    return apply(query, keys, cos, sin)


def output(module: nn.Module, attended: Tensor) -> Tensor:
    """``[batch, heads, new, head_dim]`` through the output projection."""
    merged = attended.transpose(1, 2).flatten(2).contiguous()
    result: Tensor = module.o_proj(merged)  # type: ignore[operator]
    return result


def attend_plainly(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the module itself would compute: output [batch, new, heads, head_dim] and weights."""
    parts: Any = module
    name = parts.config._attn_implementation
    function = eager_function(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    assert function is not None
    dropout = parts.attention_dropout if module.training else 0.0
    window = sliding_window(module)
    if window is not None:
        kwargs["sliding_window"] = window
    result: tuple[Tensor, Tensor | None] = function(
        module, query, keys, values, mask, dropout=dropout, scaling=parts.scaling, **kwargs
    )
    return result


def sliding_window(module: nn.Module) -> int | None:
    """Tokens that a query of this layer sees, itself included; None for all."""
    if type(module).__name__ == "MistralAttention":
        return getattr(module.config, "sliding_window", None)
    return getattr(module, "sliding_window", None)


def as_seen(mask: Tensor | None) -> Tensor | None:
    """A model's mask as bool ``[batch, 1, new, tokens]``, True = seen."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
