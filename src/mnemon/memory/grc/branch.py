"""The memory's branch: attention over the cache, mixed into the self-attention's output."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.cache import GatedRecurrentCache, MemoryCache
from mnemon.memory.grc.fifo import FifoCache
from mnemon.memory.grc.settings import Settings

__all__ = ["Grid", "MemoryBranch"]


class Grid(NamedTuple):
    """How tokens lie in an image: `prefix` tokens without a place (a class token), then rows."""

    height: int
    width: int
    prefix: int = 0


@final
class MemoryBranch(nn.Module):
    """What GRC adds to a self-attention.

        o_mem = softmax(Q K^T / sqrt(D_m / H)) V       Q from the tokens, K and V from the cache
        out   = sigmoid(lambda) * o_mem + (1 - sigmoid(lambda)) * o_self         for each head

    The tokens are the first D_m channels of the layer's input ("paper") or of the
    self-attention's output before its projection ("repo"). V has as many channels as a head of the
    self-attention, so that both can be mixed. "repo" adds a 3 x 3 convolution of one channel each
    to the tokens that make Q; tokens that lie in no grid stand in one column. With lambda = -inf
    the self-attention's output comes out, bit for bit.

    Source: arXiv 2312.12742, eq. 2 and 3; its public code for "repo". Where the convolution acts,
    and the width of V, are our choice.

    Args:
        dim: channels of the layer's input; a multiple of `num_heads`.
        num_heads: heads of the self-attention (H).
        settings: the options.
        head_dim: channels of each head's output; dim / num_heads where None.

    Attributes:
        cache: the memory.
        lambdas: one for each head, before the sigmoid.
    """

    def __init__(
        self, dim: int, num_heads: int, settings: Settings, *, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.variant = settings.variant
        self.cache = _made(self.head_dim * num_heads if self._own else dim, num_heads, settings)
        kept = self.cache.kept
        self.query = nn.Linear(kept, kept)
        self.key = nn.Linear(kept, kept)
        self.value = nn.Linear(kept, num_heads * self.head_dim)
        self.lambdas = nn.Parameter(torch.full((num_heads,), settings.start))
        self.position = nn.Conv2d(kept, kept, 3, padding=1, groups=kept) if self._own else None

    @property
    def _own(self) -> bool:
        return self.variant == "repo"

    def tokens(
        self,
        x: Float[Tensor, "batch tokens channels"],
        attended: Float[Tensor, "batch tokens value_channels"],
    ) -> Float[Tensor, "batch tokens summarised"]:
        """What is summarised: the layer's input, or the self-attention's output ("repo")."""
        return attended if self._own else x

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        attended: Float[Tensor, "batch tokens value_channels"],
        real: Bool[Tensor, "batch tokens"] | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Float[Tensor, "batch tokens value_channels"]:
        """Updates the memory, reads it, and mixes what was read into `attended`.

        Args:
            x: the layer's input.
            attended: the self-attention's output, heads side by side, before its projection.
            real: False at padding, which then does not reach the memory.
            grid: how tokens lie in an image; for "repo".
        """
        tokens = self.tokens(x, attended)
        place = None if grid is None else Grid(*grid)  # hosts of other packages give a tuple
        return self.mix(tokens, attended, self.cache(tokens, real), real, place)

    def mix(
        self,
        tokens: Float[Tensor, "batch tokens summarised"],
        attended: Float[Tensor, "batch tokens value_channels"],
        memory: Float[Tensor, "rows slots kept"],
        real: Bool[Tensor, "batch tokens"] | None = None,
        grid: Grid | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "batch tokens value_channels"]:
        """`attended` with what its tokens read in `memory`; nothing is written.

        Args:
            memory: one for each sample, or one for all.
            causal: no token may see a later one: the convolution, which then has no grid, looks
                back only.
        """
        batch, length = attended.shape[:2]
        asking = tokens[..., : self.cache.kept]
        if self.position is not None:
            placed = functional.pad(asking, (0, 0, 1, -1)) if causal else asking
            asking = asking + self._placed(placed, real, grid)
        memory = memory.to(asking.dtype)
        keys, values = (
            self._heads(projection(memory)).expand(batch, -1, -1, -1)
            for projection in (self.key, self.value)
        )
        read = _attend(self._heads(self.query(asking)), keys, values)
        own = attended.view(batch, length, self.num_heads, self.head_dim)
        share = torch.sigmoid(self.lambdas)[:, None].to(attended.dtype)
        mixed = share * read.transpose(1, 2).to(attended.dtype) + (1 - share) * own
        return mixed.reshape(batch, length, -1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _placed(self, x: Tensor, real: Tensor | None, grid: Grid | None) -> Tensor:
        """The convolution over the grid; zero at tokens without a place."""
        assert self.position is not None
        length = x.shape[1]
        grid = Grid(length, 1) if grid is None else grid
        if grid.prefix + grid.height * grid.width != length:
            raise LearnedMemoryError(
                f"{length} tokens and {grid} came; height * width + prefix tokens were expected"
            )
        if real is not None:
            x = torch.where(real[..., None], x, torch.zeros_like(x))
        image = x[:, grid.prefix :].transpose(1, 2).unflatten(2, (grid.height, grid.width))
        placed: Tensor = self.position(image).flatten(2).transpose(1, 2)
        padded: Tensor = functional.pad(placed, (0, 0, grid.prefix, 0))
        return padded


def _attend(
    queries: Float[Tensor, "batch heads tokens kept_dim"],
    keys: Float[Tensor, "batch heads slots kept_dim"],
    values: Float[Tensor, "batch heads slots head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """softmax(Q K^T / sqrt(kept_dim)) V."""
    if queries.is_cuda or queries.shape[-1] == values.shape[-1]:
        return functional.scaled_dot_product_attention(queries, keys, values)
    # torch's fused kernel for CPUs wants equal widths, and what it falls back to checks each row
    # for being hidden as a whole; no slot is ever hidden.
    scores = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    read: Tensor = scores.softmax(dim=-1) @ values
    return read


def _made(dim: int, num_heads: int, settings: Settings) -> MemoryCache:
    kind = GatedRecurrentCache if settings.rule == "gated" else FifoCache
    return kind(
        dim,
        num_heads=num_heads,
        ratio=settings.ratio,
        memory_length=settings.memory_length,
        variant=settings.variant,
        pinned=settings.pinned,
        synchronise=settings.synchronise,
    )
