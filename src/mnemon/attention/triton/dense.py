"""Split-KV decode over dense keys and values, contiguous or paged.

One program takes one split of tokens of one key head and up to ``BLOCK_R`` query rows that share
it, and leaves an unnormalised output with its top and total. Tiles lie as tensor cores like them
most, tokens and dimensions along the long side, the few rows along the short one:

    scores [tokens, rows]  = keys [tokens, head_dim] x query^T [head_dim, rows]
    out    [value_dim, rows] += values^T [value_dim, tokens] x weights [tokens, rows]
"""

import triton
import triton.language as tl

from mnemon.attention.triton.scores import finish_scores, softmax_step, token_range

__all__ = ["dense_splits"]


@triton.jit(
    do_not_specialize=[
        "first_token", "first_split", "num_local", "num_tokens", "num_splits", "num_rows",
        "num_new", "window", "row_blocks", "table_b", "mask_b", "mask_h", "mask_n", "bias_b",
        "bias_h", "bias_n", "lengths_b", "starts_b",
    ]
)  # fmt: skip
def dense_splits(
    query, keys, values, table, mask, bias, lengths, starts, partial, tops, totals,
    scale, softcap, window,
    first_token, first_split, num_local, num_tokens, num_splits, num_rows, num_new, row_blocks,
    keys_b, keys_h, keys_t, values_b, values_h, values_t, table_b,
    mask_b, mask_h, mask_n, mask_t, bias_b, bias_h, bias_n, bias_t,
    lengths_b, lengths_h, starts_b, starts_h,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Partial outputs of splits of ``SPLIT`` tokens.

    ``first_token`` is the number that masks give to the first token of ``keys``, ``num_local`` how
    many there are, ``num_tokens`` how many there are in all (with packed ones before). ``keys`` is
    ``[batch, kv_heads, tokens, head_dim]``, or with ``PAGE`` > 0 ``[pages, kv_heads, PAGE,
    head_dim]`` with a table ``[batch, pages]``.
    """
    split, batch = tl.program_id(0), tl.program_id(2)
    kv_head, row_block = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    num_kv_heads = tl.num_programs(1) // row_blocks
    first, start, length = token_range(
        lengths, starts, batch, kv_head, lengths_b, lengths_h, starts_b, starts_h,
        num_tokens, num_new, window, WINDOW,
    )  # fmt: skip

    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    pair = batch.to(tl.int64) * num_kv_heads + kv_head
    place = query + (pair * num_rows + rows)[None, :] * HEAD_DIM + dims[:, None]
    inside = (rows < num_rows)[None, :] & (dims < HEAD_DIM)[:, None]
    turned = tl.load(place, mask=inside, other=0.0).to(OPERAND)  # [head_dim, rows]

    low = tl.maximum(first - first_token, 0) // BLOCK_N * BLOCK_N
    low = tl.maximum(low, split * SPLIT)
    high = tl.minimum(tl.minimum(length - first_token, num_local), split * SPLIT + SPLIT)

    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    out = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    if PAGE == 0:
        keys += batch.to(tl.int64) * keys_b + kv_head.to(tl.int64) * keys_h
        values += batch.to(tl.int64) * values_b + kv_head.to(tl.int64) * values_h
    else:
        keys += kv_head.to(tl.int64) * keys_h
        values += kv_head.to(tl.int64) * values_h
        table += batch.to(tl.int64) * table_b
    for begin in range(low, high, BLOCK_N):
        local = begin + tl.arange(0, BLOCK_N)
        held = local < high
        if PAGE == 0:
            far = local.to(tl.int64)
            key_tile, value_tile = keys + far[:, None] * keys_t, values + far[:, None] * values_t
        else:
            # A tile never crosses a page.
            page = tl.load(table + begin // PAGE).to(tl.int64)
            far = local % PAGE
            key_tile = keys + page * keys_b + far[:, None] * keys_t
            value_tile = values + page * values_b + far[:, None] * values_t
        key = tl.load(
            key_tile + dims[None, :], mask=held[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
        )
        value = tl.load(
            value_tile + value_dims[None, :],
            mask=held[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(key.to(OPERAND), turned, input_precision="ieee") * scale
        scores = finish_scores(
            scores, local + first_token, rows, batch, kv_head, start, length,
            mask, mask_b, mask_h, mask_n, mask_t, bias, bias_b, bias_h, bias_n, bias_t,
            softcap, window, num_rows, num_new, SOFTCAP, CAUSAL, WINDOW,
        )  # fmt: skip
        scores = tl.where(held[:, None], scores, -float("inf"))
        weights, top, total, shrink = softmax_step(scores, top, total)
        out = out * shrink[None, :]
        out = tl.dot(tl.trans(value).to(OPERAND), weights.to(OPERAND), out, input_precision="ieee")

    kept = (pair * num_rows + rows) * num_splits + first_split + split
    tl.store(tops + kept, top, mask=rows < num_rows)
    tl.store(totals + kept, tl.sum(total, axis=0), mask=rows < num_rows)
    if low < high:
        target = partial + kept[None, :] * VALUE_DIM + value_dims[:, None]
        tl.store(target, out, mask=(rows < num_rows)[None, :] & (value_dims < VALUE_DIM)[:, None])
