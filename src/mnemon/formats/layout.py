"""Codes and scales as the bytes of a block of 64 tokens, in the order in which kernels read them.

block:   [ codes: 64 * padded * bits / 8 ][ scales: float16 ][ to a multiple of 64 bytes ]

keys     16 tokens in the lanes, four dimensions beside each other (one dot product of bytes)
  8 bit  [padded/4 quad][4 sub][16 lane][4 dim]         token = 16 * sub + lane
  4 bit  [quad][2 i][16][4]       sub 2i | sub 2i+1 << 4
  2 bit  [quad][16][4]            sub 0 | sub 1 << 2 | sub 2 << 4 | sub 3 << 6
values   16 dimensions in the lanes, four tokens beside each other
  8 bit  [padded/16 chunk][16 tq][16 dim][4 tok]        token = 4 * tq + tok
  4 bit  [chunk][8 i][16][4]      tq i | tq i+8 << 4
  2 bit  [chunk][4 i][16][4]      tq i | tq i+4 << 2 | tq i+8 << 4 | tq i+12 << 6
scales   axis token:   [groups][scale, offset][64 tokens]
         axis channel: [scale, offset][padded]
"""

import torch
from torch import Tensor

from mnemon.formats.hadamard import rotate
from mnemon.formats.quantize import Quantized, dequantize, quantize
from mnemon.formats.scheme import BLOCK_TOKENS, Scheme, padded_width

__all__ = [
    "dequantize_blocks",
    "pack_codes",
    "quantize_blocks",
    "read_block",
    "unpack_codes",
    "write_block",
]

_SUBS, _LANES = 4, 16
_BLOCKS_AT_ONCE = 32  # scratch memory is a few times this many blocks in float32


def pack_codes(codes: Tensor, bits: int, *, is_keys: bool) -> Tensor:
    """Codes ``[..., 64, padded]`` (uint8) as bytes ``[..., 64 * padded * bits / 8]``."""
    lead, padded = codes.shape[:-2], codes.shape[-1]
    if is_keys:
        lanes = codes.reshape(-1, _SUBS, _LANES, padded // 4, 4).permute(0, 3, 1, 2, 4)
    else:
        lanes = codes.reshape(-1, 16, 4, padded // _LANES, _LANES).permute(0, 3, 1, 4, 2)
    if bits == 4 and is_keys:
        lanes = lanes[:, :, 0::2] | lanes[:, :, 1::2] * 16
    elif bits == 4:
        lanes = lanes[:, :, :8] | lanes[:, :, 8:] * 16
    elif bits == 2:
        quarter = lanes.shape[2] // 4
        first, second, third, fourth = lanes.split(quarter, dim=2)
        lanes = first | second * 4 | third * 16 | fourth * 64
    return lanes.reshape(*lead, BLOCK_TOKENS * padded * bits // 8)


def unpack_codes(data: Tensor, bits: int, padded: int, *, is_keys: bool) -> Tensor:
    """The inverse of `pack_codes`: uint8 ``[..., 64, padded]``."""
    lead = data.shape[:-1]
    outer, inner = (padded // 4, _SUBS) if is_keys else (padded // _LANES, 16)
    lanes = data.reshape(-1, outer, inner * bits // 8, _LANES, 4)
    if bits == 4 and is_keys:
        lanes = torch.stack([lanes & 15, _shifted(lanes, 4)], dim=3).flatten(2, 3)
    elif bits == 4:
        lanes = torch.cat([lanes & 15, _shifted(lanes, 4)], dim=2)
    elif bits == 2:
        lanes = torch.cat([_shifted(lanes, shift) & 3 for shift in (0, 2, 4, 6)], dim=2)
    order = (0, 2, 3, 1, 4) if is_keys else (0, 2, 4, 1, 3)
    return lanes.permute(order).reshape(*lead, BLOCK_TOKENS, padded)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """``x >> shift``; in a graph a division, for ONNX's exporter makes signed bytes of a shift."""
    if torch.compiler.is_compiling():
        return torch.div(x, 1 << shift, rounding_mode="floor")
    return x >> shift


def write_block(found: Quantized, scheme: Scheme, width: int, *, is_keys: bool) -> Tensor:
    """Blocks as bytes, uint8 ``[..., block_bytes]``."""
    codes = pack_codes(found.codes, scheme.bits, is_keys=is_keys)
    lead = codes.shape[:-1]
    scales = found.scales.contiguous().view(torch.uint8).reshape(*lead, scheme.scales_bytes(width))
    missing = scheme.block_bytes(width) - codes.shape[-1] - scales.shape[-1]
    return torch.cat([codes, scales, codes.new_zeros(*lead, missing)], dim=-1)


def read_block(
    blocks: Tensor, factors: Tensor, scheme: Scheme, width: int, *, is_keys: bool
) -> Quantized:
    """Codes and scales of blocks ``[..., block_bytes]``."""
    padded, num_codes = padded_width(width), scheme.codes_bytes(width)
    codes = unpack_codes(blocks[..., :num_codes], scheme.bits, padded, is_keys=is_keys)
    data = blocks[..., num_codes : num_codes + scheme.scales_bytes(width)]
    scales = data.contiguous().view(torch.float16)
    if scheme.axis == "channel":
        shape: tuple[int, ...] = (scheme.scales_per_group, padded)
    else:
        shape = (scheme.num_groups(width), scheme.scales_per_group, BLOCK_TOKENS)
    return Quantized(codes, scales.unflatten(-1, shape), factors)


@torch.no_grad()
def quantize_blocks(x: Tensor, scheme: Scheme, *, is_keys: bool) -> tuple[Tensor, Tensor]:
    """Pack whole blocks of tokens.

    Args:
        x: ``[batch, kv_heads, 64 * n, width]``, any float dtype, not rotated.
        scheme: how.
        is_keys: keys and values are laid out differently.

    Returns:
        Blocks, uint8 ``[batch, kv_heads, n, block_bytes]``, and factors, float32
        ``[batch, kv_heads, n]``.

    Raises:
        CacheError: a number that is not finite.
    """
    width = x.shape[-1]
    grouped = x.unflatten(-2, (-1, BLOCK_TOKENS))
    blocks, factors = [], []
    for part in torch.split(grouped, _BLOCKS_AT_ONCE, dim=2):
        numbers = part.to(torch.float32)
        found = quantize(rotate(numbers) if scheme.rotated else numbers, scheme)
        blocks.append(write_block(found, scheme, width, is_keys=is_keys))
        factors.append(found.factors)
    return torch.cat(blocks, dim=2), torch.cat(factors, dim=2)


def dequantize_blocks(
    blocks: Tensor, factors: Tensor, scheme: Scheme, width: int, *, is_keys: bool
) -> Tensor:
    """Numbers of blocks ``[batch, kv_heads, n, block_bytes]``: float32
    ``[batch, kv_heads, 64 * n, width]``, rotated still where the scheme rotates."""
    found = read_block(blocks, factors, scheme, width, is_keys=is_keys)
    return dequantize(found, scheme, width).flatten(2, 3)
