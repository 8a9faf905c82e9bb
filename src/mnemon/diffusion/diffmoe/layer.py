"""What every mixture of experts is: a router, experts, and a rule of who takes which token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.diffusion.diffmoe.experts import Experts
from mnemon.errors import ModelError

__all__ = ["MoELayer", "Usage"]

ROUTER_STD = 0.006


class Usage(NamedTuple):
    """What one forward of one layer took."""

    num_tokens: int
    tokens_per_expert: tuple[int, ...]

    @property
    def capacity(self) -> float:
        """Experts per token, 1.0 being what a dense feed-forward costs."""
        return sum(self.tokens_per_expert) / self.num_tokens


class MoELayer(nn.Module, ABC):
    """Takes a feed-forward's place: ``y_s = sum of p_i(s) E_i(x_s)`` over the experts that took s.

    p is the softmax over all experts, not normalised again; a token that none took becomes 0, so
    that its block adds nothing to it. Scores are computed in float32 at least.

    Args:
        experts: the feed-forwards.
        capacity: experts per token on average, C; with 1 the multiply-adds of a dense feed-forward.

    Raises:
        ModelError: `capacity` is not in (0, number of experts].

    Source: DiffMoE (arXiv 2503.14487).
    """

    kind: ClassVar[str]

    # Which expert takes a token depends on the others: a cache must not run it on some of them.
    needs_batch: ClassVar[bool] = True

    def __init__(self, experts: Experts, *, capacity: float = 1.0) -> None:
        super().__init__()
        if not 0 < capacity <= experts.num_experts:
            raise ModelError(
                f"capacity {capacity} came; expected more than 0 and at most the number of "
                f"experts, {experts.num_experts}"
            )
        self.capacity = capacity
        self.router = nn.Linear(experts.dim, experts.num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        self.experts = experts
        self.usage: Usage | None = None  # of the last forward
        self.auxiliary: Tensor | None = None  # of the last forward in training, until collected
        self.replaced: tuple[nn.Module, ...] = ()  # in a tuple: not a part of this module

    @property
    def num_experts(self) -> int:
        """How many there are, N."""
        return self.experts.num_experts

    def forward(
        self, hidden: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The feed-forward's output, of the input's shape."""
        scores = self._scores(hidden)
        rows = self._rows(hidden, scores)
        pool = scores.flatten(0, 1)
        weights = [pool[chosen, i] for i, chosen in enumerate(rows)]
        self.usage = Usage(len(pool), tuple(len(chosen) for chosen in rows))
        said: Tensor = self.experts(hidden.flatten(0, 1), rows, weights)
        return said.view_as(hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.router.weight.to(dtype)).softmax(-1)

    @abstractmethod
    def _rows(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        scores: Float[Tensor, "batch tokens experts"],
    ) -> list[Int[Tensor, " chosen"]]:
        """The rows each expert takes, ascending, of the flattened batch."""

    def _share(self, num_tokens: int) -> int:
        """K: how many of so many tokens an expert takes."""
        share = int(num_tokens / self.num_experts * self.capacity)
        if share == 0:
            raise ModelError(
                f"{num_tokens} tokens for {self.num_experts} experts of capacity {self.capacity:g} "
                "leave none for each; give a larger batch or more capacity"
            )
        return share
