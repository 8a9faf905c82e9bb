"""`decode`: attention of a few query rows over dense or packed keys and values, on a GPU.

    splits of the packed blocks  ┐
    splits of the dense tail     ┴─> partial outputs, tops and totals ─> one output

A split has a fixed number of tokens, counted from the sequence's first one, and splits are summed
in their order: neither the batch nor its padding changes a bit of a row.
"""

from typing import Any

import torch
from torch import Tensor

from mnemon.attention.triton import launch
from mnemon.attention.triton.support import half_of, require
from mnemon.errors import CacheError
from mnemon.formats import BLOCK_TOKENS, PackedHalf, PackedSide

__all__ = ["decode"]


def decode(
    query: Tensor,
    keys: Tensor | PackedHalf,
    values: Tensor | PackedHalf,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of up to 32 query rows, each stored number read once and packed ones as they lie.

    Args:
        query: queries, [batch, heads, new, head_dim].
        keys: keys, [batch, kv_heads, tokens, head_dim], or packed (`PackedTensor`, `PackedHalf`).
            With a ``block_table``: pages, [pages, kv_heads, page_size, head_dim], or a
            `PackedHalf` without tail whose blocks are [pages, kv_heads, page_size / 64, ..].
        values: values, [batch, kv_heads, tokens, value_dim]; packed where the keys are.
        mask: bool (True = seen) or numbers added; broadcastable to [batch, heads, new, tokens].
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
        causal: query row i sees the tokens up to ``length - new + i``.
        softcap: bound on the scores, ``tanh(score / softcap) * softcap``.
        sinks: one score per head without a value, [heads].
        bias: numbers added to the scores, broadcastable to [batch, heads, new, tokens].
        lengths: tokens held, int32 or int64 [batch] or [batch, kv_heads]; the rest is not read.
        starts: first token that is seen (left padding), the same shapes.
        window: tokens that a row sees, its own included.
        block_table: int32 [batch, max_pages]: where a sequence's pages lie. A page has a multiple
            of 64 tokens. Entries beyond a sequence's length are not followed.
        return_lse: also return ``log(sum(exp(score)))`` without sinks, float32 [batch, heads, new].

    Returns:
        The output in the query's dtype, [batch, heads, new, value_dim]; zero for a row that sees
        nothing.

    Raises:
        DependencyError: Triton is not installed.
        CacheError: shapes that do not fit together. `supports` says what is not served.

    Source:
        Split-KV decode: Flash-Decoding (Dao et al. 2023); conventions of
        `mnemon.attention.reference.attention`.
    """
    require()
    key_half, value_half = half_of(keys), half_of(values)
    packed: tuple[PackedSide, PackedSide] | None = None
    num_skipped = 0
    if key_half is not None and value_half is not None:
        if key_half.side is not None and value_half.side is not None and key_half.num_blocks:
            packed = key_half.side, value_half.side
            num_skipped = key_half.num_skipped
        dense_keys, dense_values = key_half.tail, value_half.tail
    elif isinstance(keys, Tensor) and isinstance(values, Tensor):
        dense_keys, dense_values = keys, values
    else:
        raise CacheError("one of keys and values is packed: expected both, or none of them")

    batch, num_heads, num_new, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    num_rows = num_heads // num_kv_heads * num_new
    page_tokens, num_packed, num_dense = 0, 0, dense_keys.shape[2]
    if packed is not None:
        num_packed = packed[0].num_tokens
    if block_table is not None:
        if packed is not None and num_dense:
            raise CacheError(
                f"{num_dense} dense tokens behind packed pages: attend to them apart and merge the "
                "two by their lse (return_lse=True)"
            )
        page_tokens = num_packed or num_dense
        if page_tokens % BLOCK_TOKENS or not page_tokens:
            raise CacheError(
                f"pages of {page_tokens} tokens: expected a multiple of {BLOCK_TOKENS}"
            )
        if packed is not None:
            num_packed = block_table.shape[1] * page_tokens
        else:
            num_dense = block_table.shape[1] * page_tokens
    num_tokens = num_packed - num_skipped + num_dense
    _check(query, dense_keys, dense_values, lengths, block_table)

    packed_splits = -(-num_packed // launch.PACKED_SPLIT)
    dense_splits = -(-num_dense // launch.DENSE_SPLIT)
    query = query.contiguous()
    space = launch.Workspace.of(query, num_kv_heads, packed_splits + dense_splits, value_dim)
    arguments = {
        "num_tokens": num_tokens, "num_rows": num_rows, "num_new": num_new, "table": block_table,
        "table_b": 0 if block_table is None else block_table.stride(0),
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "softcap": 1.0 if softcap is None else float(softcap), "SOFTCAP": softcap is not None,
        "window": window or 0, "WINDOW": window is not None, "CAUSAL": causal and num_new > 1,
        **_grid("mask", mask, (batch, num_heads, num_new, num_tokens)),
        **_grid("bias", bias, (batch, num_heads, num_new, num_tokens)),
        **_per_head("lengths", lengths), **_per_head("starts", starts),
    }  # fmt: skip
    if packed is not None:
        launch.packed_parts(
            query, *packed, space, packed_splits, page_tokens // BLOCK_TOKENS,
            {**arguments, "num_skipped": num_skipped, "num_blocks": num_packed // BLOCK_TOKENS},
        )  # fmt: skip
    if num_dense:
        launch.dense_parts(
            query, dense_keys, dense_values, space, dense_splits, page_tokens,
            {**arguments, "first_token": num_packed - num_skipped, "num_local": num_dense,
             "first_split": packed_splits},
        )  # fmt: skip
    out, lse = launch.one_output(query, space, sinks, num_new, with_lse=return_lse)
    return out if lse is None else (out, lse)


def _grid(name: str, given: Tensor | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """A mask or bias as the kernels take it: its numbers, and strides of 0 where it repeats."""
    strides = dict.fromkeys((f"{name}_b", f"{name}_h", f"{name}_n", f"{name}_t"), 0)
    if given is None:
        return {name: None, **strides}
    try:
        whole = given.expand(shape)
    except RuntimeError:
        raise CacheError(
            f"a {name} of shape {tuple(given.shape)} does not cover {shape}: expected one that "
            "broadcasts to [batch, heads, new, tokens]; cut it to the keys"
        ) from None
    if given.dtype == torch.bool:
        whole = whole.view(torch.uint8)
    return {name: whole, **dict(zip(strides, whole.stride(), strict=True))}


def _per_head(name: str, given: Tensor | None) -> dict[str, Any]:
    """Numbers per sequence, or per sequence and key head."""
    if given is None:
        return {name: None, f"{name}_b": 0, f"{name}_h": 0}
    return {
        name: given,
        f"{name}_b": given.stride(0),
        f"{name}_h": given.stride(1) if given.ndim == 2 else 0,
    }


def _check(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, table: Tensor | None
) -> None:
    batch, num_heads, _, head_dim = query.shape
    if num_heads % keys.shape[1] or head_dim != keys.shape[-1] or keys.shape[1] != values.shape[1]:
        raise CacheError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not fit: expected query heads in a multiple of the key "
            "heads, keys as wide as queries, and one count of heads"
        )
    if keys.shape[2] != values.shape[2] or keys.shape[0] != values.shape[0]:
        raise CacheError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit: expected one "
            "batch (or number of pages) and one length"
        )
    if table is None and keys.shape[0] != batch:
        raise CacheError(
            f"{batch} rows of queries and {keys.shape[0]} of keys: expected one batch, or a "
            "block_table for paged keys"
        )
    if table is not None and (table.ndim != 2 or table.shape[0] != batch or lengths is None):
        raise CacheError(
            f"a block table {tuple(table.shape)} for {batch} sequences: expected [batch, "
            "max_pages], and lengths beside it"
        )
