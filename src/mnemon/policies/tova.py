"""Token omission via attention: what the last token attended to stays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from mnemon.attention.watched import Wants
from mnemon.policies.base import Policy, Slots

__all__ = ["Tova"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tova(Policy):
    """``tova(keep=1024)``: the highest weights of the last query, averaged over a layer's heads.

    One choice per layer, as in the paper: all its heads keep the same tokens. Nothing protects the
    newest token, which may go as well.

    Source:
        TOVA (arXiv 2401.06104, section 3).
    """

    kind: ClassVar[str] = "tova"
    wants: ClassVar[Wants] = "last"

    def rank(self, slots: Slots) -> Tensor:
        assert slots.weights is not None
        return slots.weights.sum(dim=1, keepdim=True)

    @property
    def settings(self) -> Mapping[str, int | float | str | None]:
        return {"keep": self.bound.keep, "every": self.bound.every}
