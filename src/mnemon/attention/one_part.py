"""Attention over one part of the tokens, with what merging it with other parts takes.

A part's result is normalised within the part, and ``lse = log(sum(exp(score)))`` says how much of
the softmax it holds:

    out = (out_1 * exp(lse_1) + out_2 * exp(lse_2)) / (exp(lse_1) + exp(lse_2))
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.attention.grouped import fold_mask, fold_rows

__all__ = ["FOLDED_ROWS", "Part", "added_mask", "combine", "dense_part"]

Part = tuple[Tensor, Tensor]
"""Output, float32 [batch, heads, new, value_dim], and lse, float32 [batch, heads, new]."""

FOLDED_ROWS = 16
"""Up to this many query rows, the heads of a group are folded under one key head."""

_ROWS_AT_ONCE = 512  # of a score matrix that is written out


def dense_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    added: Tensor | None = None,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
) -> Part:
    """Attention over dense keys and values of one part.

    Args:
        query: [batch, heads, new, head_dim].
        keys: [batch, kv_heads, tokens, head_dim], in the query's dtype.
        values: [batch, kv_heads, tokens, value_dim], in the query's dtype.
        added: numbers added to the scores (-inf hides), 4-D, broadcastable.
        scale: factor on the dot products.
        causal: row i sees the tokens up to i; needs ``tokens == new`` and no `added`.
        softcap: bound on the scores before `added`.
    """
    batch, num_heads, num_new, _ = query.shape
    if not keys.shape[2]:
        out = query.new_zeros((batch, num_heads, num_new, values.shape[-1]), dtype=torch.float32)
        return out, torch.full_like(out[..., 0], -torch.inf)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    if softcap is not None or query.device.type != "cpu" or tracked:
        return _explicit(query, keys, values, added, scale, causal, softcap)
    out, lse = _fused(query, keys, values, added, scale, causal)
    if added is not None:
        # torch's kernel says 0 of a row that sees nothing.
        blind = (added == -torch.inf).all(dim=-1)
        if bool(blind.any()):
            lse = lse.masked_fill(blind, -torch.inf)
    return out, lse


def combine(first: Part | None, second: Part) -> Part:
    """Two parts as one."""
    if first is None:
        return second
    (out, lse), (other, other_lse) = first, second
    both = torch.logaddexp(lse, other_lse)
    base = both.masked_fill(both == -torch.inf, 0.0)  # nothing seen in either: both weights 0
    mine, others = torch.exp(lse - base)[..., None], torch.exp(other_lse - base)[..., None]
    # They sum to 1, apart from scores so low that a float does not hold their sum (masks of the
    # lowest number there is).
    total = (mine + others).clamp(min=torch.finfo(mine.dtype).tiny)
    return (out * mine + other * others) / total, both


def added_mask(
    mask: Tensor | None, bias: Tensor | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor | None:
    """Columns `start` to `stop` of mask and bias as numbers to add; None if they say nothing."""
    added = None
    for given in (mask, bias):
        if given is None:
            continue
        part = given if given.shape[-1] == 1 else given[..., start:stop]
        if part.shape[-1] != stop - start:
            part = part.expand(*part.shape[:-1], stop - start)
        while part.ndim < 4:
            part = part[None]
        if part.dtype == torch.bool:
            if part.device.type == "cpu" and bool(part.all()):
                continue
            numbers = torch.zeros(part.shape, dtype=dtype, device=part.device)
            part = numbers.masked_fill_(~part, -torch.inf)
        added = part.to(dtype) if added is None else added + part.to(dtype)
    return added


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, scale: float, causal: bool
) -> Part:
    """torch's own CPU kernel, which hands out the lse; keys are read in place."""
    batch, num_heads, num_new, head_dim = query.shape
    num_kv_heads, num_tokens, value_dim = keys.shape[1], keys.shape[2], values.shape[-1]
    if value_dim < head_dim:
        values = F.pad(values, (0, head_dim - value_dim))
    elif value_dim > head_dim:  # zeros change no dot product
        query, keys = (F.pad(x, (0, value_dim - head_dim)) for x in (query, keys))
    width = query.shape[-1]
    group = num_heads // num_kv_heads
    if num_new <= FOLDED_ROWS and not causal:
        rows = fold_rows(query, num_kv_heads)
        if added is not None:
            added = fold_mask(added, num_heads, num_kv_heads, num_new)
    else:
        pairs = batch * num_kv_heads
        rows = query.reshape(pairs, group, num_new, width)
        keys = keys.reshape(pairs, 1, num_tokens, width).expand(pairs, group, num_tokens, width)
        values = values.reshape(pairs, 1, num_tokens, width).expand_as(keys)
        if added is not None and added.shape[0] * added.shape[1] > 1:
            heads = group if added.shape[1] > 1 else 1
            added = added.expand(batch, num_kv_heads * heads, *added.shape[2:])
            added = added.reshape(pairs, heads, *added.shape[2:])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, causal, attn_mask=added, scale=scale
    )
    out = out[..., :value_dim].reshape(batch, num_heads, num_new, value_dim)
    return out.to(torch.float32), lse.reshape(batch, num_heads, num_new).to(torch.float32)


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    added: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Part:
    """Scores written out, some rows at a time: soft-capping, gradients, other devices."""
    num_new, num_tokens, num_kv_heads = query.shape[2], keys.shape[2], keys.shape[1]
    outs, lses = [], []
    for start in range(0, num_new, _ROWS_AT_ONCE):
        rows = query[:, :, start : start + _ROWS_AT_ONCE]
        batch, num_heads, count, _ = rows.shape
        scores = torch.matmul(fold_rows(rows, num_kv_heads), keys.transpose(-1, -2))
        scores = scores.to(torch.float32) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(batch, num_heads, count, num_tokens)
        if added is not None:
            part = added if added.shape[2] == 1 else added[:, :, start : start + count]
            scores = scores + part
        if causal:
            seen = torch.ones(count, num_tokens, dtype=torch.bool, device=query.device).tril(start)
            scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        base = lse.masked_fill(lse == -torch.inf, 0.0)
        weights = torch.exp(scores - base[..., None])
        weights = fold_rows(weights, num_kv_heads).to(values.dtype)
        outs.append(torch.matmul(weights, values).view(batch, num_heads, count, -1).float())
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
