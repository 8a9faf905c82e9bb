"""What a self-attention of our own offers, so that a memory can be put into it."""

from __future__ import annotations

import abc

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.branch import Grid, MemoryBranch

__all__ = ["Host", "split_heads"]


class Host(nn.Module, abc.ABC):
    """A self-attention with a place for a `MemoryBranch`.

    Args:
        dim: channels.
        num_heads: heads; `dim` is a multiple.

    Attributes:
        memory: the branch, or None: then this is a plain attention.
    """

    memory: MemoryBranch | None

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise LearnedMemoryError(
                f"{dim} channels and {num_heads} heads came; a multiple of the heads was expected"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.register_module("memory", None)

    def remembered(
        self,
        x: Float[Tensor, "batch tokens channels"],
        attended: Float[Tensor, "batch tokens channels"],
        real: Bool[Tensor, "batch tokens"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """`attended`, with the memory mixed in where there is one."""
        return attended if self.memory is None else self.memory(x, attended, real, grid)


def split_heads(
    x: Float[Tensor, "batch tokens channels"], num_heads: int
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Channels to heads."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)
