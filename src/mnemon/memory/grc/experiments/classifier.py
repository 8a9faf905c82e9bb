"""A small encoder that classifies sequences or small images."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemon.memory.grc.blocks.encoder import EncoderBlock
from mnemon.memory.grc.branch import Grid

__all__ = ["ImageClassifier", "SequenceClassifier"]


@final
class SequenceClassifier(nn.Module):
    """Tokens to a class: embedding, learned positions, blocks, and the mean over real tokens.

    Args:
        vocab_size: different tokens.
        longest: tokens at most.
        classes: classes.
        dim: channels.
        num_heads: heads.
        num_layers: blocks.
        hidden: channels within a feed-forward.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        longest: int,
        classes: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(longest, dim) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads, hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], real: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits. `real` is False at padding."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, real=real)
        weight = real[..., None].to(x.dtype)
        found: Tensor = self.head((self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1))
        return found


@final
class ImageClassifier(nn.Module):
    """A small ViT: patches, learned positions, blocks, and the mean over patches.

    Args:
        side: of the image, pixels; a multiple of `patch`.
        patch: side of a patch, pixels.
        classes: classes.
        dim: channels.
        num_heads: heads.
        num_layers: blocks.
        hidden: channels within a feed-forward.
    """

    def __init__(
        self,
        *,
        side: int,
        patch: int,
        classes: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.grid = Grid(side // patch, side // patch)
        self.patches = nn.Conv2d(1, dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(self.grid.height * self.grid.width, dim) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads, hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(
        self, images: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, grid=self.grid)
        found: Tensor = self.head(self.norm(x).mean(dim=1))
        return found
