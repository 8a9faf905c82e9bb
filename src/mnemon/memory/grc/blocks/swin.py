"""Attention within windows of an image, shifted in every second block."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.blocks.encoder import FeedForward
from mnemon.memory.grc.branch import Grid
from mnemon.memory.grc.hosts import Host, split_heads

__all__ = ["SwinBlock", "WindowAttention"]


@final
class WindowAttention(Host):
    """Attention within windows, with a learned bias for each distance; the memory sees the image.

    Windows end at the image's border; shifted ones wrap around, and their parts do not see each
    other. The memory stands outside: it is fed and read by all tokens of the image, row by row.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2.

    Args:
        dim: channels; a multiple of `num_heads`.
        num_heads: heads.
        window: side of a window, in tokens.
        shift: how far windows are moved, below `window`; 0 not at all.
    """

    distance: Int[Tensor, "inside inside"]

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0) -> None:
        super().__init__(dim, num_heads)
        if not 0 <= shift < window:
            raise LearnedMemoryError(
                f"window {window} and shift {shift} came; a shift from 0 to below the window was "
                "expected"
            )
        self.window, self.shift = window, shift
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("distance", _distances(window), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], grid: Grid
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attention over the image.

        Args:
            x: the tokens, row by row.
            grid: the image's sides, multiples of the window; no prefix.

        Raises:
            LearnedMemoryError: sides that do not fit.
        """
        if grid.prefix or grid.height % self.window or grid.width % self.window:
            raise LearnedMemoryError(
                f"{grid} came; sides that are multiples of {self.window} and no prefix were "
                "expected"
            )
        windows = self._cut(x, grid)
        q, k, v = (
            split_heads(p(windows), self.num_heads) for p in (self.query, self.key, self.value)
        )
        bias = self.bias[self.distance].permute(2, 0, 1)[None]
        if self.shift:
            apart = self._apart(grid, x.device).repeat(x.shape[0], 1, 1)[:, None]
            bias = bias.masked_fill(apart, float("-inf"))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        together = self._joined(attended.transpose(1, 2).flatten(2), x.shape[0], grid)
        found: Tensor = self.out(self.remembered(x, together, grid=grid))
        return found

    def _cut(self, x: Tensor, grid: Grid) -> Tensor:
        """``(batch, tokens, channels)`` to ``(batch * windows, window ** 2, channels)``."""
        side = self.window
        image: Tensor = x.unflatten(1, (grid.height, grid.width))
        if self.shift:
            image = image.roll((-self.shift, -self.shift), dims=(1, 2))
        tiles: Tensor = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return tiles.transpose(2, 3).reshape(-1, side * side, x.shape[-1])

    def _joined(self, windows: Tensor, batch: int, grid: Grid) -> Tensor:
        """What `_cut` did, undone."""
        side = self.window
        down, across = grid.height // side, grid.width // side
        tiles = windows.view(batch, down, across, side, side, -1).transpose(2, 3)
        image = tiles.reshape(batch, grid.height, grid.width, -1)
        if self.shift:
            image = image.roll((self.shift, self.shift), dims=(1, 2))
        return image.flatten(1, 2)

    def _apart(self, grid: Grid, device: torch.device) -> Bool[Tensor, "windows inside inside"]:
        """True between tokens of one shifted window that come from opposite borders."""

        def region(length: int) -> Tensor:
            place = torch.arange(length, device=device)
            return (place >= length - self.window).long() + (place >= length - self.shift).long()

        regions = region(grid.height)[:, None] * 3 + region(grid.width)[None, :]
        side = self.window
        tiles: Tensor = regions.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
        numbers = tiles.reshape(-1, side * side)
        return numbers[:, :, None] != numbers[:, None, :]


def _distances(window: int) -> Int[Tensor, "inside inside"]:
    """For each pair of tokens of a window the row of the bias table."""
    place = torch.arange(window)
    rows, columns = (part.flatten() for part in torch.meshgrid(place, place, indexing="ij"))
    down = rows[:, None] - rows[None, :] + window - 1
    across = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + across


@final
class SwinBlock(nn.Module):
    """Window attention and feed-forward.

    Args:
        dim: channels.
        num_heads: heads.
        hidden: channels within the feed-forward.
        window: side of a window, in tokens.
        shift: how far windows are moved; usually 0 and window // 2 in turn.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, window: int, shift: int = 0
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window, shift)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], grid: Grid
    ) -> Float[Tensor, "batch tokens channels"]:
        """See `WindowAttention`."""
        x = x + self.attention(self.attention_norm(x), grid)
        found: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return found
