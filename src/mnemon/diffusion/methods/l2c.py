"""A learned schedule: which sublayers a step may reuse (Learning-to-Cache, arXiv 2406.01733)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mnemon.diffusion.clock import Step
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.options import between
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.router import Router, load_router, place_of
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

__all__ = ["L2C"]


@dataclass(frozen=True, slots=True, kw_only=True)
class L2C(Method):
    """Full steps and cache steps in turn; a cache step computes what the router says.

    A sublayer that is not computed answers with its un-gated output of the full step before, under
    the gates of the current timestep. A last step without a partner is computed in full.

    Args:
        router: a `Router`, or the path of a saved one.
        threshold: a sublayer is computed where the sigmoid of its score is above it; by default the
            router's own. From 1 on none is, below 0 all are.

    Source: Learning-to-Cache (arXiv 2406.01733), inference as in section 3.3.
    """

    name: ClassVar[str] = "l2c"
    made_for_one: ClassVar[bool] = True
    router: Router | str | os.PathLike[str]
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            between("threshold", self.threshold, -1, 2)
        if not isinstance(self.router, Router):
            object.__setattr__(self, "router", load_router(self.router))

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer",)

    @property
    def _router(self) -> Router:
        assert isinstance(self.router, Router)
        return self.router

    def check(self, sites: Sites) -> None:
        self._router.check(sites)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        router = self._router
        return _L2CSession(sites, router, router.computes(self.threshold))


class _L2CSession(Session):
    def __init__(self, sites: Sites, router: Router, computes: list[list[bool]]) -> None:
        super().__init__(sites)
        self._num_steps, self._timesteps = router.num_steps, router.timesteps
        self._rows = computes
        self._last_full = -2
        self._reuse = [False] * len(sites.sublayers)
        self._full = True
        self._kept: list[Output | None] = [None] * len(sites.sublayers)

    def begin(self, step: Step) -> None:
        place = self._place(step)
        # A cache step stands on the full step just before it: one that a run begins with has none.
        self._full = place % 2 == 0 or self._last_full != place - 1
        row = place // 2
        if self._full or row >= len(self._rows):
            self._reuse = [False] * len(self._reuse)
        else:
            self._reuse = [not computes for computes in self._rows[row]]
        if self._full:
            self._last_full = place
        self.computed = [0.0 if reuse else 1.0 for reuse in self._reuse]

    def _place(self, step: Step) -> int:
        if self._timesteps:
            place = place_of(step.timestep, self._timesteps, "router")
            total = place + 1 + step.left
            wrong = step.told and total != self._num_steps
        else:
            place = step.index
            total = step.total or step.index + 1
            wrong = place >= self._num_steps or (step.told and total != self._num_steps)
        if wrong:
            came = total if step.told else f"more than {self._num_steps}"
            raise DiffusionError(
                f"the router was trained for {self._num_steps} steps, this run has {came}; run "
                "that many, or train a router for this number"
            )
        return place

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        kept = self._kept[index]
        if self._reuse[index] and kept is not None:
            return kept
        output = original(*args, **kwargs)
        if self._full:
            self._kept[index] = output
        return output

    def held(self) -> Iterator[Any]:
        return iter(self._kept)
