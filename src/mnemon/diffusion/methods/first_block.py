"""The first block tells whether the others would change (First Block Cache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.front import FrontSession, check_front
from mnemon.diffusion.methods.options import between
from mnemon.diffusion.sites import Sites

__all__ = ["FirstBlock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBlock(Method):
    """Leaves out all blocks but the first while what the first adds changes little.

    The change is measured over the whole batch, so what is computed for a sample depends on its
    batch mates.

    Args:
        threshold: of the relative change; with 0 everything is computed.

    Source: ParaAttention's first block cache; the measure of TeaCache (arXiv 2411.19108).
    """

    name: ClassVar[str] = "first_block"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        between("threshold", self.threshold, 0)

    @property
    def levels(self) -> Sequence[Level]:
        return ("block",)

    def check(self, sites: Sites) -> None:
        check_front(sites, front=1, back=0)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return FrontSession(
            sites, front=1, back=0, threshold=self.threshold, warmup=0, longest=None, order=0
        )
