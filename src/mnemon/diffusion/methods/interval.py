"""Every n-th step in full, the last outputs in between (FORA, arXiv 2407.01425)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mnemon.diffusion.clock import Step
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.options import at_least, one_of
from mnemon.diffusion.methods.skipping import (
    Hidden,
    Stretch,
    StretchSession,
    add,
    residual,
    stretches,
)
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Sites

__all__ = ["Interval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval(Method):
    """Computes steps 0, n, 2n, ... and reuses what they returned in the steps between.

    Args:
        interval: n; with 1 everything is computed.
        level: "sublayer" reuses the un-gated outputs of attentions and MLPs, under the gates of the
            current timestep. "stack" reuses what all blocks together added, and runs none of them:
            coarser, but norms and modulations are not paid for.

    Source: FORA (arXiv 2407.01425).
    """

    name: ClassVar[str] = "interval"
    interval: int = 2
    level: str = "sublayer"

    def __post_init__(self) -> None:
        at_least("interval", self.interval, 1)
        one_of("level", self.level, ("sublayer", "stack"))

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer",) if self.level == "sublayer" else ("block",)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        if self.level == "sublayer":
            return _Sublayers(sites, self.interval)
        return _Stacks(sites, self.interval)


class _Sublayers(Session):
    def __init__(self, sites: Sites, interval: int) -> None:
        super().__init__(sites)
        self._interval = interval
        self._reuse = False
        self._kept: list[Output | None] = [None] * len(sites.sublayers)

    def begin(self, step: Step) -> None:
        self._reuse = step.index % self._interval != 0
        self.computed = [0.0 if self._reuse else 1.0] * len(self.computed)

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        kept = self._kept[index]
        if self._reuse and kept is not None:
            return kept
        output = original(*args, **kwargs)
        if self._interval > 1:
            self._kept[index] = output
        return output

    def held(self) -> Iterator[Any]:
        return iter(self._kept)


class _Stacks(StretchSession):
    def __init__(self, sites: Sites, interval: int) -> None:
        super().__init__(sites, stretches(sites))
        self._interval = interval
        self._kept: dict[int, Hidden] = {}

    def begin(self, step: Step) -> None:
        self.skipping = step.index % self._interval != 0

    def replace(self, part: Stretch) -> Hidden:
        return add(part.entered, self._kept[part.first])

    def learn(self, part: Stretch, left: Hidden) -> None:
        if self._interval > 1:
            self._kept[part.first] = residual(part.entered, left)

    def held(self) -> Iterator[Any]:
        yield from super().held()
        yield from self._kept.values()
