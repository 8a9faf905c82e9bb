"""Which tokens change most: the scores by which ToCa and DuCa choose what to compute again.

Source: ToCa (arXiv 2410.05317), section 3.3; DuCa (arXiv 2412.18911) for value norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionTap", "attention_received", "emphasise", "value_norm_score"]

_ROWS = 256  # queries whose weights exist at a time


def value_norm_score(
    values: Float[Tensor, "batch tokens channels"], heads: int
) -> Float[Tensor, "batch tokens"]:
    """1 - the norm of each token's value, summed over heads and normalised over tokens."""
    norms = values.unflatten(-1, (heads, -1)).float().norm(dim=-1).sum(-1)
    score: Tensor = 1 - norms / norms.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return score


def attention_received(
    queries: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The attention that each token receives: columns of the map, averaged over heads, summed.

    Normalised to a norm of 1 over tokens. At most 256 rows of the map exist at a time.
    """
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    total = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
    for start in range(0, queries.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        logits = (queries[:, :, rows].float() * factor) @ keys.float().transpose(-1, -2)
        if mask is not None:
            part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            if part.dtype == torch.bool:
                logits = logits.masked_fill(~part, -math.inf)
            else:
                logits = logits + part
        total += logits.softmax(-1).mean(1).sum(1)
    score: Tensor = total / total.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return score


def emphasise(scores: Float[Tensor, "batch tokens"], bonus: float) -> Float[Tensor, "batch tokens"]:
    """The highest score in each 2 x 2 patch of the picture, times 1 + bonus.

    Tokens are taken for the rows of a square picture; if there is none of even width, four
    neighbours in a row are a patch. What is left over at the end is left alone.
    """
    batch, tokens = scores.shape
    side = math.isqrt(tokens)
    if side * side == tokens and side % 2 == 0:
        patches = scores.view(batch, side // 2, 2, side // 2, 2).transpose(2, 3).flatten(3)
    else:
        patches = scores[:, : tokens // 4 * 4].view(batch, 1, -1, 4)
    best = patches.argmax(-1, keepdim=True)
    factor = torch.ones_like(patches).scatter(-1, best, 1 + bonus)
    raised = patches * factor
    if side * side == tokens and side % 2 == 0:
        shape = (batch, side // 2, side // 2, 2, 2)
        return raised.view(shape).transpose(2, 3).reshape(batch, tokens)
    return torch.cat([raised.flatten(1), scores[:, tokens // 4 * 4 :]], 1)


class AttentionTap(TorchFunctionMode):
    """Hands the arguments of every `scaled_dot_product_attention` inside it to `seen`."""

    def __init__(self, seen: Callable[[Tensor, Tensor, Tensor, Tensor | None, Any], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self._seen(
                named["query"],
                named["key"],
                named["value"],
                named.get("attn_mask"),
                named.get("scale"),
            )
        return func(*args, **kwargs)
