"""A random choice of tokens: what every other policy has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from mnemon.policies.base import Policy, Slots

__all__ = ["Random"]

# Steps of splitmix64 (Steele et al. 2014), as signed numbers: torch's int64 wraps around.
_GAMMA: Final = 0x9E3779B97F4A7C15 - 2**64
_MIX: Final = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_BITS: Final = 24  # that a float32 holds exactly


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Random(Policy):
    """``random(keep=1024, seed=0)``: a uniform choice among all tokens seen, per layer and head.

    A token's luck depends on seed, layer, head and its place among the row's real tokens, and on
    nothing else: the same prompt keeps the same tokens in any batch, behind any padding, however
    often tokens were dropped on the way.

    Args:
        bound: how many tokens may be held.
        seed: another one makes another choice.

    Source:
        Reservoir sampling by random keys (Vitter 1985; Efraimidis and Spirakis 2006).
    """

    kind: ClassVar[str] = "random"
    keeps_scores: ClassVar[bool] = True

    seed: int = 0

    def rank(self, slots: Slots) -> Tensor:
        assert slots.scores is not None
        return slots.scores

    def first_scores(self, positions: Tensor, num_heads: int, layer_index: int) -> Tensor:
        start = torch.tensor([self.seed, layer_index], dtype=torch.int64, device=positions.device)
        stream = _mixed(_mixed(start[0]) + start[1])
        heads = _mixed(stream + torch.arange(num_heads, device=positions.device))
        drawn = _mixed(heads[None, :, None] + positions[:, None])
        bits = (drawn >> (63 - _BITS)) & (2**_BITS - 1)
        return torch.div(bits.to(torch.float32), 2**_BITS)

    @property
    def settings(self) -> Mapping[str, int | float | str | None]:
        return {"keep": self.bound.keep, "seed": self.seed, "every": self.bound.every}


def _mixed(x: Tensor) -> Tensor:
    """Every number by one that looks random and is different for each."""
    x = (x + 1) * _GAMMA
    for multiplier, shift in zip(_MIX, (30, 27), strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x` as an unsigned number, shifted to the right."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
