"""Keys or values of one layer as they lie in memory: packed blocks, then a dense tail.

time ->   [ block 0 | block 1 | ... | block n-1 ][ tail ]
           ^ num_skipped of its tokens are gone (sliding windows)
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.formats.hadamard import rotate
from mnemon.formats.layout import dequantize_blocks
from mnemon.formats.scheme import BLOCK_TOKENS, Scheme

__all__ = ["PackedHalf", "PackedSide"]

_BLOCKS_AT_ONCE = 32


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSide:
    """Whole blocks of one side of a layer.

    Args:
        blocks: uint8 ``[batch, kv_heads, num_blocks, block_bytes]``, any strides between blocks.
        factors: float32 ``[batch, kv_heads, num_blocks]``.
        scheme: how they are stored.
        width: numbers per token and head (head_dim, or value_dim).
        is_keys: keys and values are laid out differently.

    Raises:
        CacheError: tensors that contradict each other.
    """

    blocks: Tensor
    factors: Tensor
    scheme: Scheme
    width: int
    is_keys: bool

    def __post_init__(self) -> None:
        expected = self.scheme.block_bytes(self.width)
        if (
            self.blocks.ndim != 4
            or self.blocks.dtype != torch.uint8
            or self.blocks.shape[-1] != expected
            or self.factors.shape != self.blocks.shape[:-1]
        ):
            raise CacheError(
                f"Blocks {self.blocks.dtype} {list(self.blocks.shape)} with factors "
                f"{list(self.factors.shape)}: expected uint8 [batch, kv_heads, blocks, {expected}] "
                f"for {self.scheme} of width {self.width}, and a factor for each block."
            )

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[2]

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def nbytes(self) -> int:
        return self.blocks.numel() + self.factors.numel() * self.factors.element_size()

    def narrow(self, first: int, count: int) -> "PackedSide":
        """Blocks `first` to ``first + count``; nothing is copied."""
        return PackedSide(
            blocks=self.blocks.narrow(2, first, count),
            factors=self.factors.narrow(2, first, count),
            scheme=self.scheme,
            width=self.width,
            is_keys=self.is_keys,
        )

    def numbers(self, first: int, count: int, *, unrotate: bool = True) -> Tensor:
        """Tokens of blocks `first` to ``first + count``: float32 ``[batch, kv_heads, 64 * count,
        width]``; left rotated on request (a rotated query then gives the same dot products)."""
        found = dequantize_blocks(
            self.blocks.narrow(2, first, count),
            self.factors.narrow(2, first, count),
            self.scheme,
            self.width,
            is_keys=self.is_keys,
        )
        return rotate(found) if unrotate and self.scheme.rotated else found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PackedHalf:
    """What attention reads of one side: packed blocks, then a dense tail, in the order of time.

    Args:
        side: packed blocks; None while there are none.
        tail: newest tokens, ``[batch, kv_heads, num_tail, width]`` in the model's dtype, as the
            model gave them (not rotated).
        num_skipped: leading tokens of the first block that are no longer there, 0..63.

    Raises:
        CacheError: blocks and tail of different rows, heads or width, or too many skipped.
    """

    side: PackedSide | None
    tail: Tensor
    num_skipped: int = 0

    def __post_init__(self) -> None:
        limit = BLOCK_TOKENS if self.side is not None and self.side.num_blocks else 1
        if not 0 <= self.num_skipped < limit:
            raise CacheError(f"{self.num_skipped} tokens skipped; expected 0 to {limit - 1}.")
        side, shape = self.side, self.tail.shape
        if side is not None and (side.blocks.shape[:2] != shape[:2] or side.width != shape[-1]):
            raise CacheError(
                f"Blocks {list(side.blocks.shape)} of width {side.width} and a tail {list(shape)} "
                f"do not belong together."
            )

    @property
    def num_blocks(self) -> int:
        return 0 if self.side is None else self.side.num_blocks

    @property
    def num_packed(self) -> int:
        """Tokens in blocks, without the skipped ones."""
        return self.num_blocks * BLOCK_TOKENS - self.num_skipped

    @property
    def num_tokens(self) -> int:
        return self.num_packed + self.tail.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``[batch, kv_heads, num_tokens, width]``, that of the dense numbers."""
        batch, heads, _, width = self.tail.shape
        return batch, heads, self.num_tokens, width

    @property
    def nbytes(self) -> int:
        """Bytes that hold it."""
        packed = 0 if self.side is None else self.side.nbytes
        return packed + self.tail.numel() * self.tail.element_size()

    def dense(self) -> Tensor:
        """All of it dequantized: ``[batch, kv_heads, num_tokens, width]`` in the tail's dtype."""
        side = self.side
        if side is None or not side.num_blocks:
            return self.tail
        parts = []
        for first in range(0, side.num_blocks, _BLOCKS_AT_ONCE):
            count = min(_BLOCKS_AT_ONCE, side.num_blocks - first)
            parts.append(side.numbers(first, count).to(self.tail.dtype))
        if self.num_skipped:
            parts[0] = parts[0][:, :, self.num_skipped :]
        return torch.cat([*parts, self.tail], dim=2)

    def __call__(self) -> Tensor:
        """What ``tensor.half()`` means to torch, where a `PackedTensor` has this as ``half``."""
        return self.dense().to(torch.float16)
