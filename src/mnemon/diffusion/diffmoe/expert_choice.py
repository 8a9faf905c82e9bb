"""Each expert takes the tokens of each sample that score highest with it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from mnemon.diffusion.diffmoe.layer import MoELayer

__all__ = ["ExpertChoice"]


@final
class ExpertChoice(MoELayer):
    """``K = int(S / N * C)`` tokens of every sample for each expert, in training and inference.

    Loads are equal by construction, so there is no auxiliary loss.

    Source: Expert Choice (arXiv 2202.09368); "EC" of DiffMoE (arXiv 2503.14487).
    """

    kind = "expert_choice"

    def _rows(self, hidden: Tensor, scores: Tensor) -> list[Tensor]:
        batch, tokens, _ = scores.shape
        chosen = scores.detach().topk(self._share(tokens), dim=1).indices.sort(1).values
        first = torch.arange(batch, device=scores.device)[:, None, None] * tokens
        rows = (chosen + first).flatten(0, 1)  # [batch * K, experts]
        return list(rows.T)
