"""Quantizing blocks on the device, and taking them apart: the bytes of `mnemon.formats`."""

import torch
from torch import Tensor

from mnemon.attention.triton.launch import device_of, power_of_two
from mnemon.attention.triton.support import MAX_WIDTH, is_available, is_interpreting, require
from mnemon.errors import CacheError
from mnemon.formats import BLOCK_TOKENS, PackedSide, Scheme, rotate

__all__ = ["pack_blocks", "supports_packing", "unpack_blocks"]


def supports_packing(x: Tensor, width: int) -> bool:
    """Whether `pack_blocks` and `unpack_blocks` serve tensors beside this one."""
    on_device = x.device.type == "cuda" or (x.device.type == "cpu" and is_interpreting())
    return on_device and is_available() and width <= MAX_WIDTH


def pack_blocks(x: Tensor, scheme: Scheme, is_keys: bool) -> tuple[Tensor, Tensor]:
    """Quantize whole blocks of tokens: `mnemon.attention.packing.pack_blocks` on a GPU.

    Raises:
        DependencyError: Triton is not installed.
        CacheError: a number that is not finite.
    """
    require()
    from mnemon.attention.triton.blocks import pack_block

    batch, num_heads, num_tokens, width = x.shape
    num_blocks = num_tokens // BLOCK_TOKENS
    if scheme.rotated:
        x = rotate(x.to(torch.float32))
    if x.stride(-1) != 1:
        x = x.contiguous()
    shape = (batch, num_heads, num_blocks)
    blocks = x.new_zeros((*shape, scheme.block_bytes(width)), dtype=torch.uint8)
    factors = x.new_empty(shape, dtype=torch.float32)
    wrong = x.new_empty(shape, dtype=torch.int32)
    if not blocks.numel():
        return blocks, factors
    channel = scheme.axis == "channel"
    padded = -(-width // 16) * 16
    group = padded if channel else min(scheme.group_size, padded)
    with device_of(x):
        pack_block[(num_blocks, batch * num_heads)](
            x, blocks, blocks.view(torch.float16), factors, wrong,
            x.stride(0), x.stride(1), x.stride(2), *blocks.stride()[:3], num_blocks, num_heads,
            WIDTH=width, BITS=scheme.bits, FP8=scheme.code == "fp8", CHANNEL=channel,
            GROUPS=1 if channel else scheme.num_groups(width), GROUP=group,
            BLOCK_D=max(16, power_of_two(width)), BLOCK_G=max(16, power_of_two(group)),
            IS_KEYS=is_keys, enable_fp_fusion=False,
        )  # fmt: skip
    if bool(wrong.any()):
        raise CacheError(
            "Keys or values hold numbers that are not finite (NaN or infinity), which a packed "
            "format cannot store; nothing was packed. Use the dense format to look at them."
        )
    return blocks, factors


def unpack_blocks(
    side: PackedSide,
    first_block: int,
    num_blocks: int,
    dtype: torch.dtype,
    *,
    unrotate: bool = True,
) -> Tensor:
    """Numbers of blocks: `mnemon.attention.packing.unpack_blocks` on a GPU.

    Raises:
        DependencyError: Triton is not installed.
    """
    require()
    from mnemon.attention.triton.blocks import unpack_block

    batch, num_heads = side.blocks.shape[:2]
    scheme, width = side.scheme, side.width
    turn = unrotate and scheme.rotated
    shape = (batch, num_heads, num_blocks * BLOCK_TOKENS, width)
    out = torch.empty(shape, dtype=torch.float32 if turn else dtype, device=side.blocks.device)
    if out.numel():
        with device_of(out):
            unpack_block[(num_blocks, batch * num_heads)](
                side.blocks, side.blocks.view(torch.float16), side.factors, out,
                *side.blocks.stride()[:3], *side.factors.stride(), first_block, num_blocks,
                num_heads,
                WIDTH=width, BITS=scheme.bits, FP8=scheme.code == "fp8",
                CHANNEL=scheme.axis == "channel", GROUP=max(scheme.group_size, 1),
                BLOCK_D=max(16, power_of_two(width)), IS_KEYS=side.is_keys,
                enable_fp_fusion=False,
            )  # fmt: skip
    return rotate(out).to(dtype) if turn else out
