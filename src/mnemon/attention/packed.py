"""Attention over packed keys and values in plain torch: some blocks are dequantized at a time.

The path without native kernels, and the one for prompts on a packed past: products of long chunks
are bound by arithmetic, and dequantizing a tile once for all of its rows costs next to nothing.

    tokens   [ tile | tile | ... | rest of the blocks ][ old tail ][ new ]
    query      rotated, where the keys' blocks are       as it is    causal
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mnemon.attention.one_part import FOLDED_ROWS, Part, added_mask, combine, dense_part
from mnemon.attention.packing import unpack_blocks
from mnemon.errors import CacheError
from mnemon.formats import BLOCK_TOKENS, PackedHalf, rotate
from mnemon.types import Queries

__all__ = ["TILE_TOKENS", "attend_packed", "key_tiles", "packed_part"]

TILE_TOKENS = 2048
"""Tokens that are dequantized at once."""


def attend_packed(
    query: Queries,
    keys: PackedHalf,
    values: PackedHalf,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`mnemon.attention.attend` over packed keys and values; the same arguments.

    Returns:
        The output in the query's dtype, [batch, heads, new, value_dim].

    Raises:
        CacheError: head counts, lengths or the mask's shape do not fit together.
    """
    out, lse = packed_part(
        query, keys, values,
        mask=mask, scale=scale, causal=causal, softcap=softcap, bias=bias,
    )  # fmt: skip
    if sinks is not None:
        # A sink takes its share of the softmax and carries no value.
        out = out * torch.sigmoid(lse - sinks.to(torch.float32)[:, None])[..., None]
    return out.to(query.dtype)


def packed_part(
    query: Queries,
    keys: PackedHalf,
    values: PackedHalf,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Part:
    """The same as one part: output and lse, both float32 (see `mnemon.attention.parts`)."""
    _check(query, keys, values, mask)
    num_new, num_tokens = query.shape[2], keys.num_tokens
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    past = num_tokens - num_new
    causal = causal and num_new > 1
    few = num_new <= FOLDED_ROWS
    rotated: Tensor | None = None
    part: Part | None = None
    packed = max(keys.num_packed, values.num_packed)
    cuts = {0, keys.num_packed, values.num_packed, num_tokens}
    if causal and past > packed:
        cuts.add(past)
    skipped = max(keys.num_skipped, values.num_skipped)
    for start, stop in _tiles(sorted(cuts), packed, skipped):
        from_blocks = start < packed
        # Few rows: no rounding to half precision in between. Many: the kernel for the dtype.
        dtype = torch.promote_types(query.dtype, torch.float32) if few else query.dtype
        if not from_blocks and query.dtype is keys.tail.dtype is values.tail.dtype:
            dtype = query.dtype
        used = query
        is_rotated = start < keys.num_packed and keys.side is not None and keys.side.scheme.rotated
        if is_rotated:
            if rotated is None:
                rotated = rotate(query.to(torch.promote_types(query.dtype, torch.float32)))
            used = rotated
        added = added_mask(mask, bias, start, stop, dtype)
        kernel_causal = False
        if causal and stop - 1 > past:
            if start == past and stop == num_tokens and added is None:
                kernel_causal = True
            else:
                seen = torch.ones(num_new, stop - start, dtype=torch.bool, device=query.device)
                hidden = added_mask(seen.tril(past - start), None, 0, stop - start, dtype)
                added = hidden if added is None or hidden is None else added + hidden
        out, lse = dense_part(
            used.to(dtype), _read(keys, start, stop, dtype), _read(values, start, stop, dtype),
            added=added, scale=scale, causal=kernel_causal, softcap=softcap,
        )  # fmt: skip
        if start < values.num_packed and values.side is not None and values.side.scheme.rotated:
            out = rotate(out)
        part = combine(part, (out, lse))
    if part is None:
        out = query.new_zeros((*query.shape[:-1], values.tail.shape[-1]), dtype=torch.float32)
        return out, torch.full_like(out[..., 0], -torch.inf)
    return part


def key_tiles(
    half: PackedHalf, stop: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, bool]]:
    """The first `stop` tokens a tile at a time: where it begins and ends, its numbers, and whether
    they are rotated (a rotated query then gives the same dot products)."""
    cuts = sorted({0, min(half.num_packed, stop), stop})
    is_rotated = half.side is not None and half.side.scheme.rotated
    for start, end in _tiles(cuts, half.num_packed, half.num_skipped):
        yield start, end, _read(half, start, end, dtype), is_rotated and start < half.num_packed


def _tiles(cuts: list[int], packed: int, skipped: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens between cuts, of at most `TILE_TOKENS` before token `packed`."""
    for low, high in pairwise(cuts):
        start = low
        while start < high:
            # Tiles end where blocks end, so that no block is read twice.
            ends = (start + skipped) // TILE_TOKENS * TILE_TOKENS + TILE_TOKENS - skipped
            stop = min(ends, high) if start < packed else high
            yield start, stop
            start = stop


def _read(half: PackedHalf, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Tokens `start` to `stop`, which lie in blocks or in the tail; blocks are left rotated."""
    if start >= half.num_packed:
        return half.tail[:, :, start - half.num_packed : stop - half.num_packed].to(dtype)
    assert half.side is not None
    start, stop = start + half.num_skipped, stop + half.num_skipped
    first, last = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
    numbers = unpack_blocks(half.side, first, last - first, dtype, unrotate=False)
    begin = start - first * BLOCK_TOKENS
    return numbers[:, :, begin : begin + stop - start]


def _check(query: Tensor, keys: PackedHalf, values: PackedHalf, mask: Tensor | None) -> None:
    if query.shape[1] % keys.shape[1]:
        raise CacheError(
            f"{query.shape[1]} query heads cannot share {keys.shape[1]} key heads: expected a "
            "multiple; check that keys come as [batch, kv_heads, tokens, head_dim]"
        )
    if keys.shape[:3] != values.shape[:3] or query.shape[-1] != keys.shape[-1]:
        raise CacheError(
            f"query {tuple(query.shape)}, keys {keys.shape} and values {values.shape} do not fit: "
            "expected keys and values of one batch, head count and length, and keys as wide as "
            "queries; pass them as the cache layer returned them"
        )
    if mask is not None and (mask.ndim != 4 or mask.shape[-1] not in (1, keys.num_tokens)):
        raise CacheError(
            f"a mask of shape {tuple(mask.shape)} does not cover {keys.num_tokens} stored tokens: "
            "expected [batch or 1, heads or 1, new or 1, tokens]; build it from the lengths that "
            "the cache's get_mask_sizes gives, or cut it to the keys"
        )
