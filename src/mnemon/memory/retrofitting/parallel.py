"""All tokens at once: the pooled keys and values of DMC, and the masks of DMC and DMS.

The same functions serve training (relaxed decisions, gradients) and evaluation (0 and 1), and the
cache's prefill, chunk by chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["drop_scores", "pool", "shift_left"]


def pool(x: Tensor, weights: Tensor, merged: Tensor, window: int) -> Tensor:
    """The weighted mean of every token's segment up to the token, over `window` tokens at most.

    A token that merges continues the segment of the one before it::

        merged      0 1 1 0 1
        segments   |a b c|d e|      pooled: a, ab, abc, d, de

    Args:
        x: keys or values, [batch, kv_heads, tokens, width], in the dtype to compute in.
        weights: [batch, kv_heads, tokens], positive where a token is real.
        merged: how much of it is merged into the one before, 0 to 1, [batch, kv_heads, tokens].
        window: tokens of a segment that its mean covers, the newest ones.

    Returns:
        [batch, kv_heads, tokens, width]; x itself, bit for bit, where nothing is merged.

    Source:
        DMC (2403.09636), equations 2 to 4, and the window of its training code.
    """
    total, pulled, reach = weights, torch.zeros_like(x), torch.ones_like(weights)
    for back in range(1, min(window, x.shape[-2])):
        # What the token `back` places before counts for this one: all between have merged.
        reach = reach * _shift(merged, back - 1)
        share = reach * _shift(weights, back)
        total = total + share
        pulled = pulled + share[..., None] * (
            _shift(x.transpose(-1, -2), back).transpose(-1, -2) - x
        )
    return x + pulled / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]


def shift_left(decisions: Tensor, last: float | bool = 0.0) -> Tensor:
    """What the next token decides of each: ``[..., j]`` is ``decisions[..., j + 1]``."""
    return F.pad(decisions[..., 1:], (0, 1), value=float(last)).to(decisions.dtype)


def drop_scores(log_kept: Tensor, window: int, num_new: int, sliding: int | None = None) -> Tensor:
    """What is added to the scores of the last `num_new` queries: causality and what was dropped.

    Args:
        log_kept: log of how much of every key is kept once its time has come,
            [batch, kv_heads, tokens]: 0 for all of it, -inf for none.
        window: keys up to so many tokens before the query are seen anyway (0: itself only).
        num_new: queries, the newest of the tokens.
        sliding: tokens that a query sees at most, itself included.

    Returns:
        [batch, kv_heads, num_new, tokens].
    """
    tokens = log_kept.shape[-1]
    keys = torch.arange(tokens, device=log_kept.device)
    ages = keys[tokens - num_new :, None] - keys  # [new, tokens]
    scores = torch.where(ages > window, log_kept[:, :, None], 0.0)
    hidden = ages < 0
    if sliding is not None:
        hidden = hidden | (ages >= sliding)
    return scores.masked_fill(hidden, -torch.inf)


def _shift(x: Tensor, places: int) -> Tensor:
    """`x` moved to the right along its last axis, zeros on the left."""
    if not places:
        return x
    return F.pad(x[..., : x.shape[-1] - places], (places, 0))
