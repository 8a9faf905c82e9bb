"""Methods that every model had, for old remote code.

Source: their documented behaviour up to transformers 4.57 (``ModuleUtilsMixin``).
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from mnemon.errors import ModelError
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["extended_attention_mask", "head_masks", "install", "inverted_mask"]


def install(patches: Patches, notices: Notices) -> None:
    patches.add(PreTrainedModel, "get_head_mask", head_masks)
    patches.add(PreTrainedModel, "invert_attention_mask", inverted_mask)
    patches.add(PreTrainedModel, "get_extended_attention_mask", extended_attention_mask)


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
