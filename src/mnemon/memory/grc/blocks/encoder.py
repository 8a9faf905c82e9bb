"""A plain pre-norm transformer block."""

from __future__ import annotations

from typing import final

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mnemon.memory.grc.attention import SelfAttention
from mnemon.memory.grc.branch import Grid

__all__ = ["EncoderBlock", "FeedForward"]


@final
class FeedForward(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        dim: channels in and out.
        hidden: channels between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """The same for every token."""
        found: Tensor = self.down(functional.gelu(self.up(x)))
        return found


@final
class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each after a norm and around it a residual.

    Args:
        dim: channels.
        num_heads: heads.
        hidden: channels within the feed-forward.
        dropout: of attention weights, in training.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        *,
        real: Bool[Tensor, "batch tokens"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """See `SelfAttention` for `real` and `grid`."""
        x = x + self.attention(self.attention_norm(x), real=real, grid=grid)
        found: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return found
