"""What a policy is: settings and a rule. State lives in the layer that carries it out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mnemon.attention.watched import Wants
from mnemon.bounds import Bound

__all__ = ["Policy", "Slots"]


class Slots(NamedTuple):
    """The stored tokens of one layer, in the order of time.

    Attributes:
        num_stored: how many there are.
        kept: how many of them will stay.
        device: where they are.
        padding: bool ``[batch, kv_heads, stored]``; None: none of them is padding.
        scores: float32 ``[batch, kv_heads, stored]``; None under a policy that keeps none.
        weights: float32 ``[batch, kv_heads, stored]``, what the last call of attention gave; None
            under a policy that does not want the last query's.
    """

    num_stored: int
    kept: int
    device: torch.device
    padding: Tensor | None
    scores: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(ABC):
    """A rule that ranks stored tokens; the lowest go first, padding before all others.

    Args:
        bound: how many tokens may be held.
    """

    #: The kind of a layer under this policy.
    kind: ClassVar[str]
    #: What attention has to tell.
    wants: ClassVar[Wants] = "nothing"
    #: Whether every token and key head has a score of its own.
    keeps_scores: ClassVar[bool] = False

    bound: Bound

    @abstractmethod
    def rank(self, slots: Slots) -> Tensor:
        """float32 ``[batch or 1, kv_heads or 1, stored]``: the highest `slots.kept` stay.

        Of equals the newer one stays. What the rank of padding is does not matter.
        """

    def first_scores(self, positions: Tensor, num_heads: int, layer_index: int) -> Tensor:
        """Scores of new tokens, float32 ``[batch or 1, num_heads, new]``.

        Args:
            positions: int64 ``[batch or 1, new]``, counted from the row's first real token.
            num_heads: key heads.
            layer_index: of the layer in its model.
        """
        return torch.zeros(
            (positions.shape[0], num_heads, positions.shape[1]), device=positions.device
        )

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, int | float | str | None]:
        """All that decides what it keeps, JSON-able: what a saved layer is compared with."""
