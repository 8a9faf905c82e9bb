"""Blocks in front and at the back always run, those between while they must (DBCache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.front import FrontSession, check_front
from mnemon.diffusion.methods.options import at_least, between
from mnemon.diffusion.sites import Sites

__all__ = ["DBCache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DBCache(Method):
    """Leaves out the blocks between `front` and `back` while what the front adds changes little.

    The change is measured over the whole batch, as in `FirstBlock`.

    Args:
        front: blocks that always run and are compared.
        back: blocks that always run at the end, and mend what was reused.
        threshold: of the relative change; with 0 everything is computed.
        warmup: steps at the beginning that are all computed.
        longest: steps in a row that may leave blocks out; None for any number.
        order: what the middle adds is continued by a series of this order (0: reused).

    Source: dual block cache of cache-dit (documentation; Apache-2.0), TaylorSeer for `order`.
    """

    name: ClassVar[str] = "dbcache"
    front: int = 1
    back: int = 0
    threshold: float = 0.1
    warmup: int = 0
    longest: int | None = None
    order: int = 0

    def __post_init__(self) -> None:
        at_least("front", self.front, 1)
        at_least("back", self.back, 0)
        between("threshold", self.threshold, 0)
        at_least("warmup", self.warmup, 0)
        at_least("order", self.order, 0)
        if self.longest is not None:
            at_least("longest", self.longest, 1)

    @property
    def levels(self) -> Sequence[Level]:
        return ("block",)

    def check(self, sites: Sites) -> None:
        check_front(sites, front=self.front, back=self.back)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return FrontSession(
            sites,
            front=self.front,
            back=self.back,
            threshold=self.threshold,
            warmup=self.warmup,
            longest=self.longest,
            order=self.order,
        )
