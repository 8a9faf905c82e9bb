"""How much attention every stored token gets: sums of weights, never all weights at once.

    weights    [batch, heads, rows, tokens]     some rows at a time, float32
       sums    [batch, kv_heads, tokens]        over the rows and the heads that share a key head

Keys are read once more than attention reads them; values are not.
"""

import torch
from torch import Tensor

from mnemon.attention.grouped import fold_mask, fold_rows, product
from mnemon.attention.packed import key_tiles
from mnemon.formats import PackedTensor, rotate

__all__ = ["HIDDEN_BELOW", "column_weights", "last_weights"]

#: An additive mask hides where its number is at most this.
HIDDEN_BELOW = -1e4

_WEIGHTS_AT_ONCE = 1 << 23  # numbers, 32 MiB


def column_weights(
    query: Tensor,
    keys: Tensor,
    *,
    num_new: int,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention weights summed over queries, and over the query heads of each key head.

    Args:
        query: [batch, heads, rows, head_dim]; rows of one token may be heads of a group.
        keys: [batch, kv_heads, tokens, head_dim]; a `PackedTensor` is dequantized in tiles.
        num_new: tokens that the rows stand for, the newest of `keys`.
        padding: bool [batch, num_new]; queries that do not count.
        mask, scale, causal, softcap, sinks, bias: as `mnemon.attention.attend` takes them.

    Returns:
        float32 [batch, kv_heads, tokens]; a query counts 1 per head, less what its sink takes.

    Source:
        The accumulated scores of H2O (arXiv 2306.14048, section 4). Products are in the dtype of
        queries and keys, as in eager attention; softmax and sums in float32.
    """
    batch, num_heads, num_rows, _ = query.shape
    num_kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    past = num_tokens - num_new
    sums = torch.zeros(batch, num_kv_heads, num_tokens, dtype=torch.float32, device=query.device)
    at_once = max(1, _WEIGHTS_AT_ONCE // max(1, batch * num_heads * num_tokens))
    for first in range(0, num_rows, at_once):
        rows = slice(first, min(first + at_once, num_rows))
        steps = causal and num_new > 1
        stop = past + rows.stop if steps else num_tokens
        weights = _weights(
            query[:, :, rows], keys, stop,
            mask=_rows(mask, rows), scale=scale, softcap=softcap, sinks=sinks,
            bias=_rows(bias, rows), first_unseen=past + first + 1 if steps else None,
        )  # fmt: skip
        if padding is not None:
            hidden = padding[:, rows] if num_new > 1 else padding.expand(-1, rows.stop - first)
            weights = weights.unflatten(2, (-1, rows.stop - first))
            weights = weights.masked_fill(hidden[:, None, None, :, None], 0.0).flatten(2, 3)
        sums[..., :stop] += weights.sum(dim=2)
    return sums


def last_weights(
    query: Tensor,
    keys: Tensor,
    *,
    num_new: int,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`column_weights` of every row's last query that is no padding; it sees all tokens.

    Source:
        TOVA (arXiv 2401.06104, section 3).
    """
    if num_new > 1:
        last = torch.full((query.shape[0],), num_new - 1, device=query.device)
        if padding is not None:
            last = last - padding.flip(-1).to(torch.int64).cumprod(-1).sum(-1).clamp(max=last)
        query = _at(query, last)
        mask, bias = (None if x is None else _at(x, last) for x in (mask, bias))
        padding = None
    return column_weights(
        query, keys,
        num_new=1, padding=padding, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias,
    )  # fmt: skip


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """Row ``rows[b]`` of every batch row b of ``[batch or 1, heads, rows or 1, width]``."""
    x = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    if x.shape[2] == 1:
        return x
    x = x.expand(rows.shape[0], *x.shape[1:])
    return x.gather(2, rows[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3]))


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    if x is None:
        return None
    x = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    return x if x.shape[2] == 1 else x[:, :, rows]


def _weights(
    query: Tensor,
    keys: Tensor,
    stop: int,
    *,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    first_unseen: int | None,
) -> Tensor:
    """float32 ``[batch, kv_heads, group * rows, stop]``; 0 in rows that see nothing.

    `first_unseen`: the first of these rows does not see tokens from there on, the next one sees
    one more.
    """
    batch, num_heads, num_rows, width = query.shape
    num_kv_heads = keys.shape[1]
    rows = fold_rows(query, num_kv_heads)
    scores = _scores(rows, keys, stop)
    scores *= width**-0.5 if scale is None else scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    for given in (bias, mask):
        if given is None:
            continue
        added = given.expand(*given.shape[:3], keys.shape[2])
        added = fold_mask(added, num_heads, num_kv_heads, num_rows)[..., :stop]
        if added.dtype == torch.bool:
            scores.masked_fill_(~added, -torch.inf)
        else:
            scores += added
    if first_unseen is not None:
        seen = torch.ones(num_rows, stop, dtype=torch.bool, device=query.device)
        unseen = ~seen.tril(first_unseen - 1)
        scores.unflatten(2, (-1, num_rows)).masked_fill_(unseen, -torch.inf)
    if sinks is not None:
        column = sinks.to(torch.float32).view(1, num_kv_heads, -1, 1)
        column = column.repeat_interleave(num_rows, dim=2).expand(batch, -1, -1, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = torch.nan_to_num_(weights, nan=0.0)
    return weights if sinks is None else weights[..., :-1]


def _scores(rows: Tensor, keys: Tensor, stop: int) -> Tensor:
    """Dot products with the first `stop` keys, float32 ``[batch, kv_heads, rows, stop]``."""
    if not isinstance(keys, PackedTensor):
        return product(rows, keys[:, :, :stop].transpose(-1, -2)).to(torch.float32)
    scores = torch.empty(*rows.shape[:3], stop, dtype=torch.float32, device=rows.device)
    rotated: Tensor | None = None
    for start, end, tile, is_rotated in key_tiles(keys.half, stop, rows.dtype):
        used = rows
        if is_rotated:
            if rotated is None:
                rotated = rotate(rows.to(torch.float32)).to(rows.dtype)
            used = rotated
        scores[..., start:end] = product(used, tile.transpose(-1, -2))
    return scores
