"""Spatial-reduction attention: every token asks, a smaller image answers."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.blocks.encoder import FeedForward
from mnemon.memory.grc.branch import Grid
from mnemon.memory.grc.hosts import Host, split_heads

__all__ = ["PVTBlock", "SpatialReductionAttention"]


@final
class SpatialReductionAttention(Host):
    """Attention whose keys and values come from the image, reduced by a strided convolution.

    Source: Pyramid Vision Transformer, arXiv 2102.12122, section 3.3.

    Args:
        dim: channels; a multiple of `num_heads`.
        num_heads: heads.
        reduction: side of the square of tokens that becomes one; 1 reduces nothing.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int = 1) -> None:
        super().__init__(dim, num_heads)
        self.reduction = reduction
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], grid: Grid
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attention over the image.

        Args:
            x: the tokens, row by row.
            grid: the image's sides, multiples of `reduction`; no prefix.

        Raises:
            LearnedMemoryError: sides that do not fit.
        """
        if grid.prefix or grid.height % self.reduction or grid.width % self.reduction:
            raise LearnedMemoryError(
                f"{grid} came; sides that are multiples of {self.reduction} and no prefix were "
                "expected"
            )
        seen = x
        if self.reduce is not None and self.norm is not None:
            image = x.transpose(1, 2).unflatten(2, (grid.height, grid.width))
            seen = self.norm(self.reduce(image).flatten(2).transpose(1, 2))
        attended = functional.scaled_dot_product_attention(
            split_heads(self.query(x), self.num_heads),
            split_heads(self.key(seen), self.num_heads),
            split_heads(self.value(seen), self.num_heads),
        )
        together = attended.transpose(1, 2).reshape(x.shape)
        found: Tensor = self.out(self.remembered(x, together, grid=grid))
        return found


@final
class PVTBlock(nn.Module):
    """Spatial-reduction attention and feed-forward.

    Args:
        dim: channels.
        num_heads: heads.
        hidden: channels within the feed-forward.
        reduction: see `SpatialReductionAttention`.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, reduction: int = 1) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SpatialReductionAttention(dim, num_heads, reduction)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], grid: Grid
    ) -> Float[Tensor, "batch tokens channels"]:
        """See `SpatialReductionAttention`."""
        x = x + self.attention(self.attention_norm(x), grid)
        found: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return found
