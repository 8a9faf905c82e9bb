"""The newest tokens, and the first ones, on which softmax rests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from mnemon.policies.base import Policy, Slots

__all__ = ["WindowSinks"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSinks(Policy):
    """``window(4096)``, ``sinks(4) + window(4096)``: the row's first real tokens and the newest.

    Keys keep the positions at which the model computed them; the paper counts positions inside the
    cache instead, which matters beyond the length that a model was made for.

    Source:
        StreamingLLM (arXiv 2309.17453).
    """

    kind: ClassVar[str] = "window_sinks"

    def rank(self, slots: Slots) -> Tensor:
        places = torch.arange(slots.num_stored, dtype=torch.float32, device=slots.device)
        if not self.bound.sinks:
            return places[None, None]
        if slots.padding is None:
            is_sink = (places < self.bound.sinks)[None, None]
        else:
            is_sink = (~slots.padding).cumsum(-1) <= self.bound.sinks
        return places.expand(is_sink.shape).masked_fill(is_sink, torch.inf)

    @property
    def settings(self) -> Mapping[str, int | float | str | None]:
        return {"window": self.bound.keep, "sinks": self.bound.sinks, "every": self.bound.every}
