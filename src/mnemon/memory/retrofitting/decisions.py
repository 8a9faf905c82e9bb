"""Which tokens merge (DMC) or go (DMS): decisions from a borrowed neuron or a projection.

Logits are float32 (float64 of a float64 model) whatever the model runs in: rounding to bfloat16
flips decisions near their threshold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemon.compression import Compression

__all__ = [
    "TEMPERATURE",
    "borrow",
    "decision_logits",
    "merge_weights",
    "project_decision",
    "soft_decisions",
]

TEMPERATURE = 0.1
"""Of the relaxed decisions in training."""

_TINY = 1e-6  # keeps a segment's sum of weights from being zero


def decision_logits(
    compression: Compression, query: Tensor, keys: Tensor, decided: Tensor | None
) -> Tensor:
    """Logits of every token's decision, one for each KV head.

    Args:
        compression: where decisions come from.
        query: before positions, [batch, heads, new, head_dim].
        keys: before positions, [batch, kv_heads, new, head_dim].
        decided: what the projection gave, [batch, new, kv_heads]; None for a neuron.

    Returns:
        [batch, kv_heads, new], float32 or float64.

    Source:
        DMC (2403.09636), section 3.1, with the last neuron as in its code; DMS (2506.05345).
    """
    if decided is not None:
        raw = decided.transpose(1, 2)
    elif compression.method == "dmc":
        raw = keys[..., -1]
    else:
        raw = query[:, :: query.shape[1] // keys.shape[1], :, -1]
    return _wide(raw) * compression.factor + compression.offset


def project_decision(projection: nn.Linear, hidden: Tensor) -> Tensor:
    """The projection's numbers in float32 at least, [batch, new, kv_heads]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(_wide(hidden), _wide(projection.weight))


def merge_weights(query: Tensor, num_kv_heads: int) -> Tensor:
    """DMC: how much a token counts in the mean of its segment, [batch, kv_heads, new].

    Args:
        query: before positions, [batch, heads, new, head_dim].
        num_kv_heads: heads of the keys.
    """
    borrowed = _wide(query[..., -1]).unflatten(1, (num_kv_heads, -1)).mean(dim=2)
    return torch.sigmoid(borrowed + 5.0) + _TINY


def borrow(
    compression: Compression, query: Tensor, keys: Tensor, left: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose borrowed neuron adds `left` of itself to scores (0: nothing)."""
    if compression.source != "neuron":
        return query, keys
    scale = torch.ones(query.shape[-1], dtype=query.dtype, device=query.device)
    scale[-1] = left
    if compression.method == "dmc":
        return query * scale, keys * scale
    group = query.shape[1] // keys.shape[1]
    lent = (
        query.unflatten(1, (-1, group))[:, :, :1] * scale,
        query.unflatten(1, (-1, group))[:, :, 1:],
    )
    return torch.cat(lent, dim=2).flatten(1, 2), keys


def soft_decisions(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logits with logistic noise, sharpened: their sigmoid is a relaxed decision.

    Source:
        The difference of two Gumbel variables is logistic (DMC, equation 6).
    """
    uniform = torch.rand(
        logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
    ).clamp(1e-6, 1 - 1e-6)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return (logits + noise) / TEMPERATURE


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
