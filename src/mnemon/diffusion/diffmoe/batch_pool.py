"""DiffMoE: experts choose among all tokens of the batch, and a predictor says how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.diffusion.diffmoe.experts import Experts
from mnemon.diffusion.diffmoe.layer import MoELayer
from mnemon.diffusion.diffmoe.ranks import mean_over_ranks

__all__ = ["DiffMoE", "Rule"]

Rule = Literal["topk", "threshold"]
TAU_DECAY = 0.95


@final
class DiffMoE(MoELayer):
    """Each expert takes the tokens of the batch that score highest with it.

    In training it takes exactly ``K = int(BS / N * C)``. A capacity predictor learns which those
    are, from inputs through which no gradient returns; tau follows, for each expert, the K-th
    largest of what it predicts. In inference, as `rule` says:

    - "topk" (the paper's): as many tokens as predictions are above tau, those of highest score.
      What a sample becomes depends on the batch it is in.
    - "threshold": the tokens whose predictions are above tau. It does not.

    `tau_scale` and `tau_offset` shift the threshold, for more or less capacity than trained:
    ``tau * tau_scale + tau_offset``. In several processes the pool is each process's own part of
    the batch, while tau is the same in all: it follows the mean over them. A forward in training
    mode moves tau only where gradients are recorded.

    Source: DiffMoE (arXiv 2503.14487), section 3.
    """

    kind = "diffmoe"
    tau: Tensor

    def __init__(self, experts: Experts, *, capacity: float = 1.0) -> None:
        super().__init__(experts, capacity=capacity)
        self.predictor = nn.Sequential(
            nn.Linear(experts.dim, experts.dim), nn.SiLU(), nn.Linear(experts.dim, self.num_experts)
        )
        self.register_buffer("tau", torch.zeros(self.num_experts))
        self.rule: Rule = "topk"
        self.tau_scale, self.tau_offset = 1.0, 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffMoE:
        # A twentieth of a step is lost in 16 bits: tau stays in float32 at least.
        before = self.tau
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.tau.dtype != before.dtype and self.tau.dtype.itemsize < 4:
            self.tau = before.to(self.tau.device, torch.promote_types(before.dtype, torch.float32))
        return self

    def _rows(self, hidden: Tensor, scores: Tensor) -> list[Tensor]:
        by_expert = scores.detach().flatten(0, 1).T  # [experts, tokens]
        logits: Tensor = self.predictor(hidden.detach().flatten(0, 1))
        logits = logits.to(scores.dtype).T
        if self.training:
            return self._train_rows(by_expert, logits)
        wanted = logits.sigmoid() > (self.tau * self.tau_scale + self.tau_offset)[:, None]
        if self.rule == "threshold":
            return [mask.nonzero().flatten() for mask in wanted]
        counts = wanted.sum(-1).tolist()
        return [
            row.topk(count).indices.sort().values
            for row, count in zip(by_expert, counts, strict=True)
        ]

    def _train_rows(self, by_expert: Tensor, logits: Tensor) -> list[Tensor]:
        share = self._share(by_expert.shape[1])
        chosen = by_expert.topk(share).indices.sort().values  # [experts, K]
        mask = torch.zeros_like(logits).scatter_(1, chosen, 1.0)
        self.auxiliary = F.binary_cross_entropy_with_logits(logits, mask)
        if torch.is_grad_enabled():
            least = logits.detach().sigmoid().topk(share).values[:, -1]
            least = mean_over_ranks(least).to(self.tau.dtype)
            self.tau.mul_(TAU_DECAY).add_(least, alpha=1 - TAU_DECAY)
        return list(chosen)

    def extra_repr(self) -> str:
        """For printing."""
        return f"capacity={self.capacity:g}, rule={self.rule}"
