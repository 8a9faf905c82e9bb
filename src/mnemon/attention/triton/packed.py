"""Split-KV decode over packed keys and values: codes go to the tensor cores as they are.

A 32-bit word holds four neighbours along the side that a product sums over (four dimensions of a
key, four tokens of a value), of 1, 2 or 4 tokens (``pieces``) where codes have 8, 4 or 2 bits:

    keys    word [slot, quad]: 4 dimensions x pieces       slot: (block, i, lane)
    values  word [dim, step]:  4 tokens x pieces           step: (block, i)

    scores  [piece slot, rows] = codes [piece slot, byte quad] x query [byte quad, rows]
    out     [dim, rows]       += codes [dim, piece byte step] x weights [piece byte step, rows]

Only the order of tokens and dimensions changes, which a sum does not see: no code moves between
threads. A code's bits read as float16 are the subnormal number ``code * 2**-24``, exactly, so
unpacking is a mask; tensor cores take subnormals. A piece that is not shifted down is a larger
multiple of it. Scales of tokens go to the scores (keys) and to the weights (values), where there
are few rows; scales of channels are multiplied into the codes. float32 queries use float32
operands.
"""

# ruff: noqa: RUF005 -- Triton's language adds tuples and knows no unpacking into one.

import triton
import triton.language as tl

from mnemon.attention.triton.scores import finish_scores, softmax_step, token_range

__all__ = ["packed_splits"]


@triton.jit
def _codes(
    words, BYTE: tl.constexpr, PIECE: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Codes times ``2 ** (BITS * PIECE) / _unit``."""
    code = (words >> (8 * BYTE)).to(tl.int16) & ((2**BITS - 1) << (BITS * PIECE))
    if FP8:
        # e4m3 is float16 without its low bits, its exponent 8 too small.
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        operand = bits.to(tl.float16, bitcast=True).to(OPERAND)
    elif OPERAND == tl.float16:
        operand = code.to(tl.float16, bitcast=True)
    else:
        operand = code.to(OPERAND)
    return operand


@triton.jit
def _numbers(
    words, scale, zero, BYTE: tl.constexpr, PIECE: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``scale * code + zero``, for scales that vary along the sum."""
    if FP8:
        operand = _codes(words, BYTE, 0, BITS, True, OPERAND) * (scale * 256.0).to(OPERAND)
    else:
        code = (words >> (8 * BYTE + BITS * PIECE)) & (2**BITS - 1)
        if OPERAND == tl.float16:
            code = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
        operand = code.to(OPERAND) * scale.to(OPERAND) + zero.to(OPERAND)
    return operand


@triton.jit
def _unit(FP8: tl.constexpr, OPERAND: tl.constexpr):
    if FP8:
        unit: tl.constexpr = 256.0
    elif OPERAND == tl.float16:
        unit: tl.constexpr = 16777216.0
    else:
        unit: tl.constexpr = 1.0
    return unit


@triton.jit
def _block_places(
    blocks, num_blocks, table, batch, table_b, side_b, side_n, PER_PAGE: tl.constexpr
):
    """Offsets of blocks by their number in the sequence, int64."""
    if PER_PAGE == 0:
        places = batch.to(tl.int64) * side_b + blocks.to(tl.int64) * side_n
    else:
        entry = table + batch.to(tl.int64) * table_b + blocks // PER_PAGE
        page = tl.load(entry, mask=blocks < num_blocks, other=0)
        places = page.to(tl.int64) * side_b + (blocks % PER_PAGE).to(tl.int64) * side_n
    return places


@triton.jit
def _joined(parts, NUM: tl.constexpr):
    """A tuple of ``NUM`` tensors ``[m, n]`` as the only one of a tuple, ``[m, n, 2, 2, ..]``."""
    if NUM == 1:
        out = parts
    else:
        out = ()
        for j in tl.static_range(NUM // 2):
            out = out + (tl.join(parts[j], parts[j + NUM // 2]),)
        out = _joined(out, NUM // 2)
    return out


@triton.jit
def _in_order(
    x, KEY_PIECES: tl.constexpr, VALUE_PIECES: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weights in the order of the keys' products as the values' products take them.

    keys    (piece, block, i, lane)      token 16 * (pieces * i + piece) + lane
    values  (piece, byte, block, step)   token 4 * (16 / pieces * piece + step) + byte
    """
    x = tl.reshape(x, (KEY_PIECES, BLOCKS, 4 // KEY_PIECES, 16, ROWS))
    x = tl.permute(x, (1, 2, 0, 3, 4))
    x = tl.reshape(x, (BLOCKS, VALUE_PIECES, 16 // VALUE_PIECES, 4, ROWS))
    return tl.reshape(tl.permute(x, (1, 3, 0, 2, 4)), (BLOCKS * 64, ROWS))


@triton.jit(
    do_not_specialize=[
        "num_skipped", "num_blocks", "num_tokens", "num_splits", "num_rows", "num_new", "window",
        "row_blocks", "table_b", "mask_b", "mask_h", "mask_n", "bias_b", "bias_h", "bias_n",
        "lengths_b", "starts_b", "key_factors_b", "key_factors_h", "value_factors_b",
        "value_factors_h",
    ]
)  # fmt: skip
def packed_splits(
    query, key_words, key_scales, key_factors, value_words, value_scales, value_factors,
    table, mask, bias, lengths, starts, partial, tops, totals,
    scale, softcap, window,
    num_skipped, num_blocks, num_tokens, num_splits, num_rows, num_new, row_blocks,
    keys_b, keys_h, keys_n, key_factors_b, key_factors_h, key_factors_n,
    values_b, values_h, values_n, value_factors_b, value_factors_h, value_factors_n, table_b,
    mask_b, mask_h, mask_n, mask_t, bias_b, bias_h, bias_n, bias_t,
    lengths_b, lengths_h, starts_b, starts_h,
    HEAD_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_FP8: tl.constexpr,
    KEY_CHANNEL: tl.constexpr, KEY_GROUPS: tl.constexpr, KEY_GROUP: tl.constexpr,
    KEY_QUADS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_FP8: tl.constexpr,
    VALUE_CHANNEL: tl.constexpr, VALUE_GROUPS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PER_PAGE: tl.constexpr, OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Partial outputs of splits of ``SPLIT`` stored tokens, `num_skipped` ones included.

    ``key_words`` and ``key_scales`` are the same bytes ``[batch, kv_heads, blocks, block_bytes]``
    as int32 and float16, with strides in words; with ``PER_PAGE`` > 0 ``[pages, kv_heads, PER_PAGE,
    block_bytes]``. ``query`` is rotated already. ``KEY_QUADS`` (``VALUE_DIMS``) is the power of two
    that holds a group's words.
    """
    KEY_PIECES: tl.constexpr = 8 // KEY_BITS
    VALUE_PIECES: tl.constexpr = 8 // VALUE_BITS
    KEY_PADDED: tl.constexpr = (HEAD_DIM + 15) // 16 * 16
    VALUE_PADDED: tl.constexpr = (VALUE_DIM + 15) // 16 * 16
    KEY_CODES: tl.constexpr = 4 * KEY_PADDED * KEY_BITS  # of a block, in float16
    VALUE_CODES: tl.constexpr = 4 * VALUE_PADDED * VALUE_BITS
    PER_KEY: tl.constexpr = 1 if KEY_FP8 else 2  # scale, or scale and zero
    PER_VALUE: tl.constexpr = 1 if VALUE_FP8 else 2
    IN_BLOCK: tl.constexpr = 64 // KEY_PIECES  # slots of a block
    SLOTS: tl.constexpr = BLOCK_N // KEY_PIECES
    PER_BLOCK: tl.constexpr = 16 // VALUE_PIECES  # steps of a block
    STEPS: tl.constexpr = BLOCK_N // 4 // VALUE_PIECES
    BLOCKS: tl.constexpr = BLOCK_N // 64

    split, batch = tl.program_id(0), tl.program_id(2)
    kv_head, row_block = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    num_kv_heads = tl.num_programs(1) // row_blocks
    first, start, length = token_range(
        lengths, starts, batch, kv_head, lengths_b, lengths_h, starts_b, starts_h,
        num_tokens, num_new, window, WINDOW,
    )  # fmt: skip
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_held = rows < num_rows
    pair = batch.to(tl.int64) * num_kv_heads + kv_head
    query += pair * num_rows * HEAD_DIM

    # Rows of the query by a power of two, so that they fit float16.
    dims = tl.arange(0, BLOCK_D)
    place = query + rows[None, :] * HEAD_DIM + dims[:, None]
    whole = tl.load(place, mask=row_held[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    size = tl.max(tl.abs(whole.to(tl.float32)), axis=0)
    unit = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where((unit > 0) & (size < float("inf")), unit, 1.0)
    if OPERAND == tl.float32:
        unit = tl.full((BLOCK_R,), 1.0, tl.float32)

    quads = tl.arange(0, KEY_QUADS)
    summed = tl.arange(0, 4 * KEY_QUADS)  # (byte, quad)
    in_group = summed % KEY_QUADS * 4 + summed // KEY_QUADS
    turned = ()  # of each group: [byte quad, rows]
    sums = ()  # of each group: [rows]
    for group in tl.static_range(KEY_GROUPS):
        dim = group * KEY_GROUP + in_group
        place = query + rows[None, :] * HEAD_DIM + dim[:, None]
        inside = (in_group < KEY_GROUP) & (dim < HEAD_DIM)
        part = tl.load(place, mask=row_held[None, :] & inside[:, None], other=0.0)
        part = part.to(tl.float32) / unit[None, :]
        sums = sums + (tl.sum(part, axis=0),)
        turned = turned + (part.to(OPERAND),)

    low = tl.maximum(first + num_skipped, 0) // BLOCK_N * BLOCK_N
    low = tl.maximum(low, split * SPLIT)
    high = tl.minimum(tl.minimum(length + num_skipped, num_blocks * 64), split * SPLIT + SPLIT)

    key_words += kv_head.to(tl.int64) * keys_h
    key_scales += kv_head.to(tl.int64) * keys_h * 2 + KEY_CODES
    key_factors += kv_head.to(tl.int64) * key_factors_h
    value_words += kv_head.to(tl.int64) * values_h
    value_scales += kv_head.to(tl.int64) * values_h * 2 + VALUE_CODES
    value_factors += kv_head.to(tl.int64) * value_factors_h

    # Tokens of a tile in the order of the keys' products: (piece, block, i, lane).
    order = tl.arange(0, BLOCK_N)
    piece, within = order // SLOTS, order % IN_BLOCK
    near = (within // 16 * KEY_PIECES + piece) * 16 + within % 16  # in its block
    near_block = order % SLOTS // IN_BLOCK
    # What codes that are not shifted down are too large by, and weights too small.
    key_shift = tl.exp2((-KEY_BITS * piece).to(tl.float32)) * _unit(KEY_FP8, OPERAND)
    value_piece = near // (64 // VALUE_PIECES)
    value_shift = tl.exp2((VALUE_BITS * (VALUE_PIECES - 1 - value_piece)).to(tl.float32))
    VALUE_UNIT: tl.constexpr = 1 if VALUE_CHANNEL else 2 ** (VALUE_BITS * (VALUE_PIECES - 1))

    # Words of a group lie one after the other in a block.
    KEY_WORDS: tl.constexpr = KEY_GROUP // 4 * IN_BLOCK
    VALUE_WORDS: tl.constexpr = VALUE_GROUP * PER_BLOCK
    key_line = tl.arange(0, KEY_QUADS * IN_BLOCK)
    value_line = tl.arange(0, VALUE_DIMS * PER_BLOCK)
    value_dims = tl.arange(0, VALUE_DIMS)

    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    outs = ()
    offsets = ()  # sums of weights times the values' zeros, per token of a tile
    for _ in tl.static_range(VALUE_GROUPS):
        outs = outs + (tl.zeros((VALUE_DIMS, BLOCK_R), tl.float32),)
        offsets = offsets + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)

    for begin in range(low, high, BLOCK_N):
        block = begin // 64
        stored = begin + near_block * 64 + near
        blocks = block + near_block
        held = blocks < num_blocks
        key_place = _block_places(
            blocks, num_blocks, table, batch, table_b, keys_b, keys_n, PER_PAGE
        )
        value_place = _block_places(
            blocks, num_blocks, table, batch, table_b, values_b, values_n, PER_PAGE
        )
        factor_place = _block_places(
            blocks, num_blocks, table, batch, table_b, key_factors_b, key_factors_n, PER_PAGE
        )
        key_factor = tl.load(key_factors + factor_place, mask=held, other=0.0)
        factor_place = _block_places(
            blocks, num_blocks, table, batch, table_b, value_factors_b, value_factors_n, PER_PAGE
        )
        value_factor = tl.load(value_factors + factor_place, mask=held, other=0.0)

        own = block + tl.arange(0, BLOCKS)
        own_held = own < num_blocks
        own_keys = _block_places(own, num_blocks, table, batch, table_b, keys_b, keys_n, PER_PAGE)
        own_values = _block_places(
            own, num_blocks, table, batch, table_b, values_b, values_n, PER_PAGE
        )

        # Scores.
        scores = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for group in tl.static_range(KEY_GROUPS):
            quad = group * (KEY_GROUP // 4) + quads
            quad_held = (quads < KEY_GROUP // 4) & (quad < KEY_PADDED // 4)
            key_line_held = key_line < min(
                KEY_WORDS, KEY_PADDED // 4 * IN_BLOCK - group * KEY_WORDS
            )
            words = tl.load(
                key_words + own_keys[:, None] + (group * KEY_WORDS + key_line)[None, :],
                mask=own_held[:, None] & key_line_held[None, :],
                other=0,
            )
            words = tl.permute(tl.reshape(words, (BLOCKS, KEY_QUADS, IN_BLOCK)), (0, 2, 1))
            words = tl.reshape(words, (SLOTS, KEY_QUADS))
            codes = ()
            for j in tl.static_range(4 * KEY_PIECES):
                if KEY_CHANNEL:
                    own_place = key_scales + own_keys[:, None] * 2 + (4 * quad + j % 4)[None, :]
                    fine_held = own_held[:, None] & quad_held[None, :]
                    fine = tl.load(own_place, mask=fine_held, other=0.0)
                    zero = fine
                    if not KEY_FP8:
                        zero = tl.load(own_place + KEY_PADDED, mask=fine_held, other=0.0)
                    fine = tl.broadcast_to(fine[:, None, :], (BLOCKS, IN_BLOCK, KEY_QUADS))
                    zero = tl.broadcast_to(zero[:, None, :], (BLOCKS, IN_BLOCK, KEY_QUADS))
                    operand = _numbers(
                        words,
                        tl.reshape(fine, (SLOTS, KEY_QUADS)),
                        tl.reshape(zero, (SLOTS, KEY_QUADS)),
                        j % 4, j // 4, KEY_BITS, KEY_FP8, OPERAND,
                    )  # fmt: skip
                else:
                    operand = _codes(words, j % 4, j // 4, KEY_BITS, KEY_FP8, OPERAND)
                codes = codes + (operand,)
            both = tl.reshape(_joined(codes, 4 * KEY_PIECES)[0], (SLOTS, KEY_QUADS, KEY_PIECES, 4))
            both = tl.reshape(tl.permute(both, (2, 0, 3, 1)), (BLOCK_N, 4 * KEY_QUADS))
            product = tl.dot(both, turned[group], input_precision="ieee")
            if KEY_CHANNEL:
                scores += product * key_factor[:, None]
            else:
                scale_place = key_scales + key_place * 2 + group * (PER_KEY * 64) + near
                fine = tl.load(scale_place, mask=held, other=0.0).to(tl.float32)
                scores += product * (fine * (key_factor * key_shift))[:, None]
                if not KEY_FP8:
                    zero = tl.load(scale_place + 64, mask=held, other=0.0).to(tl.float32)
                    scores += (zero * key_factor)[:, None] * sums[group][None, :]
        tokens = stored - num_skipped
        scores = finish_scores(
            scores * (unit * scale)[None, :], tokens, rows, batch, kv_head, start, length,
            mask, mask_b, mask_h, mask_n, mask_t, bias, bias_b, bias_h, bias_n, bias_t,
            softcap, window, num_rows, num_new, SOFTCAP, CAUSAL, WINDOW,
        )  # fmt: skip
        seen = (tokens >= 0) & (stored < high)
        scores = tl.where(seen[:, None], scores, -float("inf"))
        weights, top, total, shrink = softmax_step(scores, top, total)

        # Values: the weights carry the scales of tokens.
        grown = ()
        shifted = ()
        for group in tl.static_range(VALUE_GROUPS):
            own_dims = group * VALUE_GROUP + value_dims
            own_dims_held = (value_dims < VALUE_GROUP) & (own_dims < VALUE_PADDED)
            value_line_held = value_line < min(
                VALUE_WORDS, VALUE_PADDED * PER_BLOCK - group * VALUE_WORDS
            )
            ratio = value_factor
            offset = offsets[group]
            if not VALUE_CHANNEL:
                scale_place = value_scales + value_place * 2 + group * (PER_VALUE * 64) + near
                fine = tl.load(scale_place, mask=held, other=0.0).to(tl.float32)
                ratio = fine * value_factor
                if not VALUE_FP8:
                    zero = tl.load(scale_place + 64, mask=held, other=0.0).to(tl.float32)
                    offset = offset * shrink[None, :] + weights * (zero * value_factor)[:, None]
            shifted = shifted + (offset,)
            # Weights times scales lie in 0..1 by the largest scale of the tile.
            largest = tl.max(ratio, axis=0)
            ratio = ratio / tl.where(largest > 0, largest, 1.0)
            if not VALUE_CHANNEL:
                ratio *= value_shift
                largest *= _unit(VALUE_FP8, OPERAND) / VALUE_UNIT
            scaled = _in_order(
                (weights * ratio[:, None]).to(OPERAND), KEY_PIECES, VALUE_PIECES, BLOCKS, BLOCK_R
            )
            words = tl.load(
                value_words + own_values[:, None] + (group * VALUE_WORDS + value_line)[None, :],
                mask=own_held[:, None] & value_line_held[None, :],
                other=0,
            )
            words = tl.reshape(words, (BLOCKS, VALUE_DIMS // 16, PER_BLOCK, 16))
            words = tl.reshape(tl.permute(words, (1, 3, 0, 2)), (VALUE_DIMS, STEPS))
            codes = ()
            for j in tl.static_range(4 * VALUE_PIECES):
                if VALUE_CHANNEL:
                    own_place = value_scales + own_values[None, :] * 2 + own_dims[:, None]
                    fine_held = own_held[None, :] & own_dims_held[:, None]
                    fine = tl.load(own_place, mask=fine_held, other=0.0)
                    zero = fine
                    if not VALUE_FP8:
                        zero = tl.load(own_place + VALUE_PADDED, mask=fine_held, other=0.0)
                    fine = tl.broadcast_to(fine[:, :, None], (VALUE_DIMS, BLOCKS, PER_BLOCK))
                    zero = tl.broadcast_to(zero[:, :, None], (VALUE_DIMS, BLOCKS, PER_BLOCK))
                    operand = _numbers(
                        words,
                        tl.reshape(fine, (VALUE_DIMS, STEPS)),
                        tl.reshape(zero, (VALUE_DIMS, STEPS)),
                        j % 4, j // 4, VALUE_BITS, VALUE_FP8, OPERAND,
                    )  # fmt: skip
                else:
                    operand = _codes(words, j % 4, j // 4, VALUE_BITS, VALUE_FP8, OPERAND)
                codes = codes + (operand,)
            both = tl.reshape(
                _joined(codes, 4 * VALUE_PIECES)[0], (VALUE_DIMS, STEPS, 4 * VALUE_PIECES)
            )
            both = tl.reshape(tl.permute(both, (0, 2, 1)), (VALUE_DIMS, BLOCK_N))
            product = tl.dot(both, scaled, input_precision="ieee")
            grown = grown + (outs[group] * shrink[None, :] + product * largest,)
        outs = grown
        offsets = shifted

    kept = (pair * num_rows + rows) * num_splits + split
    tl.store(tops + kept, top, mask=row_held)
    tl.store(totals + kept, tl.sum(total, axis=0), mask=row_held)
    if low < high:
        for group in tl.static_range(VALUE_GROUPS):
            last_dims = group * VALUE_GROUP + value_dims
            last_held = (value_dims < VALUE_GROUP) & (last_dims < VALUE_DIM)
            target = partial + kept[None, :] * VALUE_DIM + last_dims[:, None]
            result = outs[group] + tl.sum(offsets[group], axis=0)[None, :]
            tl.store(target, result, mask=row_held[None, :] & last_held[:, None])
