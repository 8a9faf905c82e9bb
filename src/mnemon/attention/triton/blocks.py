"""Kernels that quantize whole blocks and take them apart, byte for byte as `mnemon.formats` does.

One program takes one block of 64 tokens of one head. All arithmetic is float32 without fused
multiply-adds, divisions are correctly rounded, and nothing else may change: files and caches of
one device are read on another.
"""

import triton
import triton.language as tl

__all__ = ["pack_block", "unpack_block"]


@triton.jit
def _half_below(x):
    """The largest float16 that is no larger."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    below = tl.where(bits > 0, bits - 1, tl.where(bits == 0, -32767, bits + 1))
    bits = tl.where(nearest.to(tl.float32) > x, below, bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _half_above(x):
    """The smallest float16 that is no smaller, of numbers >= 0."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    bits = tl.where(nearest.to(tl.float32) < x, bits + 1, bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _inverse(scale):
    """``1 / scale`` in float32, 0 where the scale is 0."""
    numbers = scale.to(tl.float32)
    return tl.where(numbers > 0, tl.div_rn(1.0, tl.where(numbers > 0, numbers, 1.0)), 0.0)


@triton.jit
def _rounded(x):
    """The nearest whole number, ties to even, of numbers below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x):
    """Bits of e4m3, ties to even, of numbers up to 448 in size."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
    small = _rounded(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(size < 0x3C800000, small, normal - (120 << 3))
    return code | tl.where(bits < 0, 0x80, 0)


@triton.jit
def _byte_place(
    slot, dim, WIDE: tl.constexpr, PIECES: tl.constexpr, IS_KEYS: tl.constexpr
):  # fmt: skip
    """Where the byte of a slot and dimension lies; a slot is a token without its piece."""
    if IS_KEYS:
        place = (dim // 4 * (64 // PIECES) + slot) * 4 + dim % 4
    else:
        place = ((dim // 16 * (16 // PIECES) + slot // 4) * 16 + dim % 16) * 4 + slot % 4
    return place


@triton.jit(do_not_specialize=["num_blocks", "num_heads"])
def pack_block(
    x, blocks, scales, factors, wrong,
    x_b, x_h, x_t, blocks_b, blocks_h, blocks_n, num_blocks, num_heads,
    WIDTH: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, CHANNEL: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    IS_KEYS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and the factor of a block; `wrong` gets 1 where a number is not finite.

    ``blocks`` is uint8 with strides in bytes, ``scales`` the same memory in float16.
    """
    PIECES: tl.constexpr = 8 // BITS
    PADDED: tl.constexpr = (WIDTH + 15) // 16 * 16
    SLOTS: tl.constexpr = 64 // PIECES
    LEVELS: tl.constexpr = 2**BITS - 1
    AXIS: tl.constexpr = 0 if CHANNEL else 1  # that a group lies along
    PER: tl.constexpr = 1 if FP8 else 2
    number, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    token = tl.arange(0, 64)
    x += batch * x_b + head * x_h + (number * 64 + token).to(tl.int64)[:, None] * x_t

    dims = tl.arange(0, BLOCK_D)
    whole = tl.load(x + dims[None, :], mask=(dims < WIDTH)[None, :], other=0.0).to(tl.float32)
    bits = whole.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top_bits = tl.max(tl.max(bits, axis=1), axis=0)  # also of NaN: above infinity
    largest = top_bits.to(tl.float32, bitcast=True)
    finite = top_bits < 0x7F800000
    outside = (top_bits != 0) & ((largest < 0.015625) | (largest > 16384.0)) & finite
    exponent = tl.maximum((top_bits >> 23) - 127 - 10, -126)
    exponent = tl.where(outside, exponent, 0)
    factor = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(factors + pair.to(tl.int64) * num_blocks + number, factor)
    tl.store(wrong + pair.to(tl.int64) * num_blocks + number, tl.where(finite, 0, 1))

    start = batch * blocks_b + head * blocks_h + number.to(tl.int64) * blocks_n
    blocks += start
    scales += start // 2 + 4 * PADDED * BITS
    group_dims, slot = tl.arange(0, BLOCK_G), tl.arange(0, SLOTS)
    for group in tl.static_range(GROUPS):
        dim = group * GROUP + group_dims
        real = ((group_dims < GROUP) & (dim < WIDTH))[None, :]
        stored = (group_dims < GROUP) & (dim < PADDED)
        y = tl.load(x + dim[None, :], mask=real, other=0.0).to(tl.float32)
        y = tl.where(finite, tl.div_rn(y, tl.zeros_like(y) + factor), 0.0)
        if FP8:
            high = tl.max(tl.abs(y), axis=AXIS)
            fine = _half_above(tl.div_rn(high, tl.zeros_like(high) + 448.0))
            zero = fine
            steps = y * tl.expand_dims(_inverse(fine), AXIS)
            codes = _e4m3(steps)
        else:
            low = tl.min(tl.where(real, y, float("inf")), axis=AXIS)
            high = tl.max(tl.where(real, y, -float("inf")), axis=AXIS)
            if CHANNEL:  # dimensions of the padding
                low = tl.where(dim < WIDTH, low, 0.0)
                high = tl.where(dim < WIDTH, high, 0.0)
            low, high = low + 0.0, high + 0.0  # -0 counts as 0
            zero = _half_below(low)
            base = zero.to(tl.float32)
            fine = _half_above(tl.div_rn(high - base, tl.zeros_like(high) + LEVELS))
            steps = (y - tl.expand_dims(base, AXIS)) * tl.expand_dims(_inverse(fine), AXIS)
            codes = tl.minimum(tl.maximum(_rounded(steps), 0.0), LEVELS).to(tl.int32)
        codes = tl.where(real, codes, 0)
        if CHANNEL:
            tl.store(scales + dim, fine, mask=stored)
            if not FP8:
                tl.store(scales + PADDED + dim, zero, mask=stored)
        else:
            tl.store(scales + group * (PER * 64) + token, fine)
            if not FP8:
                tl.store(scales + group * (PER * 64) + 64 + token, zero)
        # Tokens of keys are (i, piece, lane), of values (piece, slot).
        if PIECES == 1:
            packed = codes
        else:
            if IS_KEYS:
                parts = tl.reshape(codes, (4 // PIECES, PIECES, 16, BLOCK_G))
                parts = tl.permute(parts, (0, 2, 3, 1))
            else:
                parts = tl.permute(tl.reshape(codes, (PIECES, SLOTS, BLOCK_G)), (1, 2, 0))
            parts = tl.reshape(parts, (SLOTS, BLOCK_G, PIECES))
            shift = tl.arange(0, PIECES) * BITS
            packed = tl.sum(parts << shift[None, None, :], axis=2)
        place = _byte_place(slot[:, None], dim[None, :], PADDED, PIECES, IS_KEYS)
        tl.store(
            blocks + place, packed.to(tl.uint8), mask=stored[None, :] & (slot < SLOTS)[:, None]
        )


@triton.jit(
    do_not_specialize=[
        "factors_b", "factors_h", "factors_n", "first_block", "num_blocks", "num_heads",
    ]
)  # fmt: skip
def unpack_block(
    blocks, scales, factors, out,
    blocks_b, blocks_h, blocks_n, factors_b, factors_h, factors_n, first_block, num_blocks,
    num_heads,
    WIDTH: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, CHANNEL: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, IS_KEYS: tl.constexpr,
):  # fmt: skip
    """Numbers of a block, ``[batch, kv_heads, 64 * num_blocks, width]`` contiguous."""
    PIECES: tl.constexpr = 8 // BITS
    PADDED: tl.constexpr = (WIDTH + 15) // 16 * 16
    number, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    block = (first_block + number).to(tl.int64)
    start = batch * blocks_b + head * blocks_h + block * blocks_n
    token, dim = tl.arange(0, 64), tl.arange(0, BLOCK_D)
    if IS_KEYS:
        sub = token // 16
        slot, piece = sub // PIECES * 16 + token % 16, sub % PIECES
    else:
        slot, piece = token % (64 // PIECES), token // (64 // PIECES)
    place = _byte_place(slot[:, None], dim[None, :], PADDED, PIECES, IS_KEYS)
    held = (dim < WIDTH)[None, :] & (token < 64)[:, None]
    byte = tl.load(blocks + start + place, mask=held, other=0).to(tl.int32)
    code = (byte >> (piece * BITS)[:, None]) & (2**BITS - 1)
    scales += start // 2 + 4 * PADDED * BITS
    if CHANNEL:
        line = tl.zeros_like(token)[:, None] + dim[None, :]
        NEXT: tl.constexpr = PADDED
    else:
        PER: tl.constexpr = 1 if FP8 else 2
        line = token[:, None] + (dim // GROUP * (PER * 64))[None, :]
        NEXT: tl.constexpr = 64
    fine = tl.load(scales + line, mask=held, other=0.0).to(tl.float32)
    if FP8:
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        numbers = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        numbers = numbers * fine
    else:
        zero = tl.load(scales + line + NEXT, mask=held, other=0.0).to(tl.float32)
        numbers = code.to(tl.float32) * fine
        numbers = numbers + zero
    factor = tl.load(factors + batch * factors_b + head * factors_h + block * factors_n)
    numbers = numbers * factor
    row = (pair.to(tl.int64) * num_blocks + number) * 64 + token
    tl.store(out + row[:, None] * WIDTH + dim[None, :], numbers.to(out.dtype.element_ty), mask=held)
