"""Attention that reads each stored key and value once, however many query heads share it.

Query heads that share a key head are laid side by side, as rows of one small product:

    query [batch, kv_heads * group, new, head_dim]
       -> [batch, kv_heads, group * new, head_dim]     rows: (g0 t0) (g0 t1) .. (g1 t0) (g1 t1) ..

so keys and values stay [batch, kv_heads, tokens, head_dim], uncopied, however far apart the heads
lie in a buffer with reserve. On a CPU this is several times what ``enable_gqa`` costs, which
repeats the keys for each query head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "explicit_attention",
    "fold_mask",
    "fold_rows",
    "fused_attention",
    "product",
    "spread_attention",
]

# Rows of a score matrix that are held at once when it has to be written out (soft-capping, sinks):
# a long prompt then needs rows * tokens numbers per head instead of tokens ** 2.
_ROWS_AT_ONCE = 512

# Folded rows up to which a product is bound by reading keys, not by arithmetic.
_FEW_ROWS = 64


def fold_rows(query: Tensor, num_kv_heads: int) -> Tensor:
    """Lay the query heads of a group out as rows: [batch, kv_heads, group * new, head_dim]."""
    batch, num_heads, num_new, head_dim = query.shape
    return query.reshape(batch, num_kv_heads, num_heads // num_kv_heads * num_new, head_dim)


def fold_mask(mask: Tensor, num_heads: int, num_kv_heads: int, num_new: int) -> Tensor:
    """Give a mask the rows of `fold_rows`: broadcastable to [batch, kv_heads, group * new, tokens].

    A mask that says the same for each head and row stays as it is; nothing is copied for it.
    """
    batch, mask_heads, mask_rows, num_tokens = mask.shape
    group = num_heads // num_kv_heads
    if mask_heads == 1 and (mask_rows == 1 or group == 1):
        return mask
    if mask_heads == 1:
        folded = mask.expand(batch, group, mask_rows, num_tokens)
        return folded.reshape(batch, 1, group * mask_rows, num_tokens)
    folded = mask.expand(batch, num_heads, num_new, num_tokens)
    return folded.reshape(batch, num_kv_heads, group * num_new, num_tokens)


def fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Folded rows through torch's fused attention: the decode path. [batch, heads, new, value_dim].

    Args:
        query: [batch, heads, new, head_dim].
        keys: [batch, kv_heads, tokens, head_dim], any strides between heads.
        values: [batch, kv_heads, tokens, value_dim].
        mask: None, or a 4-D mask, bool or of the query's dtype.
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
    """
    batch, num_heads, num_new, head_dim = query.shape
    num_kv_heads, value_dim = keys.shape[1], values.shape[-1]
    rows = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads * num_new, head_dim)
    if mask is not None:
        mask = fold_mask(mask, num_heads, num_kv_heads, num_new)
    if query.device.type == "cpu":
        if value_dim != head_dim:
            # Latent attention: torch has no fused CPU kernel for values narrower than keys.
            if query.dtype == torch.float32 or value_dim > head_dim:
                out = _explicit_folded(rows, keys, values, mask, scale, None, None)
                return out.reshape(batch, num_heads, num_new, value_dim)
            values = F.pad(values, (0, head_dim - value_dim))
        if rows.shape[2] == 1 and rows.dtype == torch.bfloat16:
            # torch's CPU kernel takes half the time for two bfloat16 rows that it takes for one.
            rows = rows.repeat(1, 1, 2, 1)
            out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
            return out[:, :, :1, :value_dim].reshape(batch, num_heads, num_new, value_dim)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
    return out[..., :value_dim].reshape(batch, num_heads, num_new, value_dim)


def spread_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Many query rows at once: the group becomes the head axis, and keys repeat by a stride of 0.

    ``query [batch * kv_heads, group, new, head_dim]`` against
    ``keys [batch * kv_heads, group (stride 0), tokens, head_dim]``: torch's kernel sees ordinary
    heads (so its own causal flag works), and nothing is copied. ``causal`` needs ``tokens == new``.
    """
    batch, num_heads, num_new, head_dim = query.shape
    num_kv_heads, num_tokens, value_dim = keys.shape[1], keys.shape[2], values.shape[-1]
    group = num_heads // num_kv_heads
    pairs = batch * num_kv_heads
    shape = (pairs, group, num_tokens)
    if mask is not None and mask.shape[0] * mask.shape[1] > 1:
        # One mask per (row of the batch, key head), shared or not by the heads of the group.
        mask_group = group if mask.shape[1] > 1 else 1
        mask = mask.expand(batch, num_kv_heads * mask_group, *mask.shape[2:])
        mask = mask.reshape(pairs, mask_group, *mask.shape[2:])
    out = F.scaled_dot_product_attention(
        query.reshape(pairs, group, num_new, head_dim),
        keys.reshape(pairs, 1, num_tokens, head_dim).expand(*shape, head_dim),
        values.reshape(pairs, 1, num_tokens, value_dim).expand(*shape, value_dim),
        mask,
        is_causal=causal,
        scale=scale,
    )
    return out.reshape(batch, num_heads, num_new, value_dim)


def explicit_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with the scores written out, for what the fused kernel cannot do.

    Soft-capping and sinks change the scores between product and softmax. Keys are still read in
    place; the softmax is in float32. Long queries are taken a few hundred rows at a time.
    """
    num_new = query.shape[2]
    if num_new <= _ROWS_AT_ONCE:
        return _explicit_rows(query, keys, values, mask, scale, softcap, sinks)
    parts = []
    for start in range(0, num_new, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        parts.append(_explicit_rows(query[:, :, rows], keys, values, part, scale, softcap, sinks))
    return torch.cat(parts, dim=2)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for [batch, kv_heads, ..], where heads may lie far apart in memory."""
    few = left.shape[2] <= _FEW_ROWS
    if not few or left.dtype == torch.float32 or left.device.type != "cpu":
        return torch.matmul(left, right)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.matmul(left, right)
    # Half-precision products of heads that are not neighbours leave torch's fast kernel on a CPU:
    # one product per head is several times as fast.
    heads = [torch.mm(a, b) for a, b in zip(left.flatten(0, 1), right.flatten(0, 1), strict=True)]
    return torch.stack(heads).reshape(*left.shape[:3], right.shape[-1])


def _explicit_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, num_heads, num_new, _ = query.shape
    num_kv_heads = keys.shape[1]
    rows = fold_rows(query, num_kv_heads)
    if mask is not None:
        mask = fold_mask(mask, num_heads, num_kv_heads, num_new)
    if sinks is not None:
        per_row = sinks.float().view(num_kv_heads, -1, 1).expand(-1, -1, num_new)
        sinks = per_row.reshape(1, num_kv_heads, -1, 1)
    out = _explicit_folded(rows, keys, values, mask, scale, softcap, sinks)
    return out.reshape(batch, num_heads, num_new, values.shape[-1])


def _explicit_folded(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The maths of `explicit_attention` on folded rows; ``sinks`` is [1, kv_heads, rows, 1]."""
    scores = product(rows, keys.transpose(-1, -2)).float()
    scores = scores * (rows.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    unseen = None
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: a row that sees nothing must come out as zero, in the backward pass too.
        unseen = ~mask
        scores = scores.masked_fill(unseen, lowest)
    elif mask is not None:
        scores = scores + mask.float()
    top = scores.amax(dim=-1, keepdim=True).detach().clamp(min=lowest)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    weights = torch.exp(scores - top)
    if unseen is not None:
        weights = weights.masked_fill(unseen, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    weights = weights / total.clamp(min=torch.finfo(scores.dtype).tiny)
    return product(weights.to(values.dtype), values)
