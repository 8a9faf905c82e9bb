"""The oracle: attention as plain float64 maths, written to be read, never to be fast."""

import torch
from torch import Tensor

from mnemon.types import Keys, Queries, Values

__all__ = ["attention"]


def attention(
    query: Queries,
    keys: Keys,
    values: Values,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention in float64, with every option that a model of today uses.

    ``scores = cap(query · keys * scale) + bias + mask``, ``weights = softmax([scores, sinks])``
    without the sink's column, ``out = weights · values``.

    Args:
        query: queries, [batch, heads, new, head_dim].
        keys: keys, [batch, kv_heads, tokens, head_dim]; ``heads`` is a multiple of ``kv_heads``,
            and head ``h`` reads key head ``h // (heads / kv_heads)``.
        values: values, [batch, kv_heads, tokens, value_dim].
        mask: which tokens are seen: bool (True = seen) or a number added to the score;
            broadcastable to [batch, heads, new, tokens].
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
        causal: query row i sees the tokens up to ``tokens - new + i`` (the last row sees all).
        softcap: bound on the scores, ``tanh(score / softcap) * softcap``.
        sinks: one score per head that takes part in the softmax and carries no value, [heads].
        bias: numbers added to the scores, broadcastable to [batch, heads, new, tokens].

    Returns:
        The output, float64, [batch, heads, new, value_dim]. A row that sees nothing is zero.

    Source:
        Vaswani et al. 2017, eq. 1; soft-capping: Gemma 2 report, section 2; sinks: gpt-oss model
        card; a row that sees nothing is zero: `torch.nn.functional.scaled_dot_product_attention`.
    """
    num_heads, num_new, head_dim = query.shape[1:]
    num_kv_heads, num_tokens = keys.shape[1:3]
    group = num_heads // num_kv_heads
    queries64 = query.double()
    keys64 = keys.double().repeat_interleave(group, dim=1)
    values64 = values.double().repeat_interleave(group, dim=1)

    scores = queries64 @ keys64.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        seen = torch.ones(num_new, num_tokens, dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(~seen.tril(num_tokens - num_new), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()

    # The softmax by hand: a row of -inf has weight zero everywhere, instead of NaN.
    top = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    sink_scores = None if sinks is None else sinks.double().view(1, -1, 1, 1)
    if sink_scores is not None:
        top = torch.maximum(top, sink_scores)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sink_scores is not None:
        total = total + torch.exp(sink_scores - top)
    return torch.where(total > 0, weights / total, 0.0) @ values64
