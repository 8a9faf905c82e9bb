"""Methods that every model had, and the plain rotary embedding, for old remote code.

Source: their documented behaviour up to transformers 4.57 (``ModuleUtilsMixin``,
``modeling_rope_utils``).
"""

from typing import Any

import torch
from transformers import PreTrainedModel, modeling_rope_utils

from mnemon.errors import ModelError
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["default_rope", "extended_attention_mask", "head_masks", "install", "inverted_mask"]


def install(patches: Patches, notices: Notices) -> None:
    patches.add(PreTrainedModel, "get_head_mask", head_masks)
    patches.add(PreTrainedModel, "invert_attention_mask", inverted_mask)
    patches.add(PreTrainedModel, "get_extended_attention_mask", extended_attention_mask)
    patches.add_item(modeling_rope_utils.ROPE_INIT_FUNCTIONS, "default", default_rope)


def head_masks(
    self: Any,
    head_mask: torch.Tensor | None,
    num_hidden_layers: int,
    is_attention_chunked: bool = False,
) -> torch.Tensor | list[None]:
    """What each layer multiplies its attention weights by.

    Args:
        head_mask: 1.0 keeps a head; ``[heads]`` or ``[layers, heads]``; None keeps all.
        num_hidden_layers: layers.
        is_attention_chunked: add an axis for chunks.

    Returns:
        ``[layers, 1, heads, 1, 1]`` (and a last axis of 1 for chunks), or a None for each layer.

    Raises:
        ModelError: a mask of another number of axes.
    """
    if head_mask is None:
        return [None] * num_hidden_layers
    if head_mask.ndim == 1:
        head_mask = head_mask.expand(num_hidden_layers, -1)
    if head_mask.ndim != 2:
        raise ModelError(
            f"head_mask has shape {list(head_mask.shape)}; expected [heads] or [layers, heads]."
        )
    masks = head_mask.to(dtype=self.dtype)[:, None, :, None, None]
    return masks.unsqueeze(-1) if is_attention_chunked else masks


def inverted_mask(self: Any, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
    """0 where a mask is 1 and the lowest number where it is 0, ``[batch, 1, 1 or new, tokens]``.

    Args:
        encoder_attention_mask: ``[batch, tokens]`` or ``[batch, new, tokens]``.
    """
    return _additive(_four_axes(encoder_attention_mask), self.dtype)


def extended_attention_mask(
    self: Any,
    attention_mask: torch.Tensor,
    input_shape: tuple[int, ...],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The mask that is added to the scores, ``[batch, 1, 1 or new, tokens]``; causal in a decoder.

    Args:
        attention_mask: 1 is seen; ``[batch, tokens]`` or ``[batch, new, tokens]``.
        input_shape: ``[batch, new]`` of the input.
        device: nothing; of old it was ignored too.
        dtype: of the result; the model's by default.

    Raises:
        ModelError: a mask of another number of axes.
    """
    mask = _four_axes(attention_mask)
    if attention_mask.ndim == 2 and getattr(self.config, "is_decoder", False):
        num_new, num_tokens = input_shape[-1], attention_mask.shape[1]
        rows = torch.arange(num_tokens - num_new, num_tokens, device=attention_mask.device)
        columns = torch.arange(num_tokens, device=attention_mask.device)
        mask = mask * (columns[None, :] <= rows[:, None]).to(mask.dtype)
    return _additive(mask, dtype or self.dtype)


def default_rope(
    config: Any = None,
    device: torch.device | None = None,
    seq_len: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies of the plain rotary embedding, ``[width / 2]``, and a factor of 1.

    Args:
        config: a model's config; or give ``base`` and ``dim`` (4.43 to 4.50).
        device: where to make them.
        seq_len: nothing; other kinds of embedding depend on it.
        **kwargs: ``base`` and ``dim`` in place of the config.
    """
    if config is None:
        base, width = kwargs["base"], kwargs["dim"]
    else:
        rope = getattr(config, "rope_parameters", None) or {}
        base = getattr(config, "rope_theta", None) or rope.get("rope_theta", 10_000.0)
        share = getattr(config, "partial_rotary_factor", None)
        share = rope.get("partial_rotary_factor", 1.0) if share is None else share
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        width = int(head_dim * share)
    steps = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    return 1.0 / (base ** (steps / width)), 1.0


def _four_axes(mask: torch.Tensor) -> torch.Tensor:
    if mask.ndim == 3:
        return mask[:, None]
    if mask.ndim == 2:
        return mask[:, None, None]
    raise ModelError(
        f"attention_mask has shape {list(mask.shape)}; expected [batch, tokens] or [batch, new, "
        "tokens]."
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (1.0 - mask.to(dtype=dtype)) * torch.finfo(dtype).min
