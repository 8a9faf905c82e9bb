"""Heavy hitters: the tokens that got most attention so far, and the newest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from mnemon.attention.watched import Wants
from mnemon.policies.base import Policy, Slots

__all__ = ["H2O"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(Policy):
    """``h2o(keep=1024)``: per key head, the highest sums of attention weights, and the newest.

    Weights are summed over all queries so far and over the query heads that share the key head.

    Args:
        bound: how many tokens may be held.
        recent: share of the newest tokens in what stays; a half as in the paper.

    Source:
        H2O (arXiv 2306.14048, algorithm 1).
    """

    kind: ClassVar[str] = "h2o"
    wants: ClassVar[Wants] = "sums"
    keeps_scores: ClassVar[bool] = True

    recent: float = 0.5

    def rank(self, slots: Slots) -> Tensor:
        assert slots.scores is not None
        num_recent = int(slots.kept * self.recent)
        if slots.padding is None:
            places = torch.arange(slots.num_stored, device=slots.device)
            is_recent = places >= slots.num_stored - num_recent
        else:
            later = (~slots.padding).flip(-1).cumsum(-1).flip(-1)  # real tokens from it on
            is_recent = later <= num_recent
        return slots.scores.masked_fill(is_recent, torch.inf)

    @property
    def settings(self) -> Mapping[str, int | float | str | None]:
        return {"keep": self.bound.keep, "recent": self.recent, "every": self.bound.every}
