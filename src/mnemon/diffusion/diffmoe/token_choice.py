"""Each token takes the one expert it scores highest with."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from mnemon.diffusion.diffmoe.experts import Experts
from mnemon.diffusion.diffmoe.layer import MoELayer
from mnemon.diffusion.diffmoe.ranks import mean_over_ranks
from mnemon.errors import ModelError

__all__ = ["TokenChoice"]

BALANCE = 0.01


@final
class TokenChoice(MoELayer):
    """One expert for each token; none is refused, however many choose the same.

    In training a loss asks for equal loads: ``0.01 N sum of f_i P_i``, f_i the share of tokens that
    chose expert i (over all processes, where there are several) and P_i its mean probability.

    Raises:
        ModelError: a capacity other than 1.

    Source: Switch Transformer (arXiv 2101.03961), equation 4; "TC" of DiffMoE (arXiv 2503.14487).
    """

    kind = "token_choice"

    def __init__(self, experts: Experts, *, capacity: float = 1.0) -> None:
        super().__init__(experts, capacity=capacity)
        if capacity != 1:
            raise ModelError(
                f"capacity {capacity} came; with token_choice a token has one expert, so it is 1"
            )

    def _rows(self, hidden: Tensor, scores: Tensor) -> list[Tensor]:
        best = scores.argmax(-1).flatten()
        if self.training:
            load = torch.bincount(best, minlength=self.num_experts).to(scores.dtype)
            load = mean_over_ranks(load / len(best))
            mean = scores.mean((0, 1))
            self.auxiliary = BALANCE * self.num_experts * (load * mean).sum()
        return [(best == i).nonzero().flatten() for i in range(self.num_experts)]
