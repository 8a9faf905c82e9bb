"""Tokens as codes, one by one, so that they move between blocks without being quantized again.

Possible along the axis ``token``, whose groups lie within a token; a block's factor must be 1, as
it is unless numbers would not fit float16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.formats.hadamard import rotate
from mnemon.formats.layout import read_block, write_block
from mnemon.formats.quantize import Quantized, quantize
from mnemon.formats.scheme import BLOCK_TOKENS, Scheme
from mnemon.formats.sides import PackedSide

__all__ = ["QuantizedTokens", "blocks_of", "quantize_tokens", "tokens_of"]


class QuantizedTokens(NamedTuple):
    """Codes and scales of tokens.

    Args:
        codes: uint8 ``[batch, kv_heads, tokens, padded]``.
        scales: float16 ``[batch, kv_heads, tokens, groups, 1 or 2]``.
    """

    codes: Tensor
    scales: Tensor

    def narrow(self, start: int, count: int) -> "QuantizedTokens":
        return QuantizedTokens(*(x.narrow(2, start, count) for x in self))

    def gather(self, index: Tensor) -> "QuantizedTokens":
        """Tokens at `index` ``[batch, kv_heads, kept]``."""
        scales = self.scales.flatten(3)
        codes, scales = (
            x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
            for x in (self.codes, scales)
        )
        return QuantizedTokens(codes, scales.unflatten(3, self.scales.shape[3:]))

    def pad_left(self, num_tokens: int) -> "QuantizedTokens":
        """`num_tokens` tokens, zeros on the left."""
        missing = num_tokens - self.codes.shape[2]
        codes = F.pad(self.codes, (0, 0, missing, 0))
        return QuantizedTokens(codes, F.pad(self.scales, (0, 0, 0, 0, missing, 0)))

    @staticmethod
    def cat(parts: "Sequence[QuantizedTokens]") -> "QuantizedTokens":
        return QuantizedTokens(*(torch.cat(column, dim=2) for column in zip(*parts, strict=True)))


def tokens_of(side: PackedSide) -> QuantizedTokens | None:
    """The tokens of all blocks; None where a factor is not 1."""
    assert side.scheme.axis == "token"
    if not bool((side.factors == 1).all()):
        return None
    found = read_block(side.blocks, side.factors, side.scheme, side.width, is_keys=side.is_keys)
    # [batch, heads, blocks, groups, 1 or 2, 64] -> [batch, heads, tokens, groups, 1 or 2]
    scales = found.scales.movedim(-1, 3).flatten(2, 3)
    return QuantizedTokens(found.codes.flatten(2, 3), scales)


def quantize_tokens(x: Tensor, scheme: Scheme) -> QuantizedTokens | None:
    """Dense tokens ``[batch, kv_heads, tokens, width]``; None where they need a factor."""
    missing = -x.shape[2] % BLOCK_TOKENS
    grouped = F.pad(x, (0, 0, 0, missing)).to(torch.float32).unflatten(2, (-1, BLOCK_TOKENS))
    found = quantize(rotate(grouped) if scheme.rotated else grouped, scheme)
    if not bool((found.factors == 1).all()):
        return None
    scales = found.scales.movedim(-1, 3).flatten(2, 3)
    return QuantizedTokens(found.codes.flatten(2, 3), scales).narrow(0, x.shape[2])


def blocks_of(
    found: QuantizedTokens, scheme: Scheme, width: int, is_keys: bool
) -> tuple[Tensor, Tensor]:
    """Blocks and factors (all 1) of a whole number of blocks of tokens."""
    codes = found.codes.unflatten(2, (-1, BLOCK_TOKENS))
    scales = found.scales.unflatten(2, (-1, BLOCK_TOKENS)).movedim(3, -1)
    factors = torch.ones(codes.shape[:3], dtype=torch.float32, device=codes.device)
    blocks = write_block(Quantized(codes, scales, factors), scheme, width, is_keys=is_keys)
    return blocks, factors
