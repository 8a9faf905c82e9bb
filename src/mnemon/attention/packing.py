"""Packing blocks of tokens and taking them apart: the one door to the codes of packed formats."""

import torch
from torch import Tensor

from mnemon.attention import cpu
from mnemon.attention.triton import packing as triton_packing
from mnemon.formats import BLOCK_TOKENS, PackedSide, Scheme, quantize_blocks, rotate

__all__ = ["pack_blocks", "pack_into", "unpack_blocks"]


def pack_blocks(x: Tensor, scheme: Scheme, is_keys: bool) -> tuple[Tensor, Tensor]:
    """Quantize whole blocks of tokens.

    Args:
        x: ``[batch, kv_heads, 64 * n, width]``, not rotated, any float dtype.
        scheme: how.
        is_keys: keys and values are laid out differently.

    Returns:
        Blocks, uint8 ``[batch, kv_heads, n, block_bytes]``, and factors, float32
        ``[batch, kv_heads, n]``.

    Raises:
        CacheError: a number that is not finite.
    """
    if x.device.type == "cuda" and triton_packing.supports_packing(x, x.shape[-1]):
        return triton_packing.pack_blocks(x, scheme, is_keys)
    if not cpu.serves_packing(x):
        return quantize_blocks(x, scheme, is_keys=is_keys)
    batch, kv_heads, num_tokens, width = x.shape
    shape = (batch, kv_heads, num_tokens // BLOCK_TOKENS)
    blocks = torch.zeros((*shape, scheme.block_bytes(width)), dtype=torch.uint8)
    side = PackedSide(
        blocks=blocks, factors=torch.ones(shape), scheme=scheme, width=width, is_keys=is_keys
    )
    if not cpu.pack(x, side):
        return quantize_blocks(x, scheme, is_keys=is_keys)  # which says what is wrong with them
    return side.blocks, side.factors


def pack_into(x: Tensor, side: PackedSide) -> None:
    """`pack_blocks` into memory that is there: the blocks and factors of `side`.

    Raises:
        CacheError: a number that is not finite; what `side` holds then means nothing.
    """
    if cpu.serves_packing(x):
        side.blocks.zero_()  # what fills a block up to whole cache lines is written too
        if cpu.pack(x, side):
            return
    blocks, factors = pack_blocks(x, side.scheme, side.is_keys)
    side.blocks.copy_(blocks)
    side.factors.copy_(factors)


def unpack_blocks(
    side: PackedSide,
    first_block: int,
    num_blocks: int,
    dtype: torch.dtype,
    *,
    unrotate: bool = True,
) -> Tensor:
    """Numbers of blocks, ``[batch, kv_heads, 64 * num_blocks, width]``.

    Args:
        side: where they lie.
        first_block: the first of them.
        num_blocks: how many.
        dtype: of the result.
        unrotate: False leaves them rotated where the scheme rotates; a rotated query then gives
            the same dot products.
    """
    blocks = side.blocks
    if blocks.device.type == "cuda" and triton_packing.supports_packing(blocks, side.width):
        return triton_packing.unpack_blocks(side, first_block, num_blocks, dtype, unrotate=unrotate)
    if blocks.device.type == "cpu" and cpu.serves_unpacking(side, dtype):
        shape = (*blocks.shape[:2], num_blocks * BLOCK_TOKENS, side.width)
        target = torch.empty(shape, dtype=dtype)
        cpu.unpack(side, first_block, target, unrotate=unrotate)
        return target
    numbers = side.numbers(first_block, num_blocks, unrotate=False)
    if unrotate and side.scheme.rotated:
        numbers = rotate(numbers)
    return numbers.to(dtype)
