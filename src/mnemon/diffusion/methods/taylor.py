"""Outputs continued by their finite differences (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

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
from mnemon.diffusion.outputs import Output, combine
from mnemon.diffusion.sites import Sites

__all__ = ["Series", "Taylor"]


class Series:
    """A quantity at some steps, as differences: value, first, second, ... per step.

    Differences are taken backwards over the distance between the last two updates, as the paper
    does, so irregular intervals give slopes per step.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._at = 0
        self._differences: list[Output] = []

    def update(self, index: int, value: Output) -> None:
        """The quantity is `value` at step `index`."""
        distance = index - self._at
        fresh = [value]
        for before in self._differences[: self._order]:
            fresh.append(combine(lambda new, old: (new - old) / distance, fresh[-1], before))
        self._differences, self._at = fresh, index

    def at(self, index: int) -> Output:
        """The quantity expected at step `index`."""
        distance = index - self._at
        value = self._differences[0]
        for order, difference in enumerate(self._differences[1:], 1):
            factor = distance**order / math.factorial(order)
            value = combine(functools.partial(_add, factor), value, difference)
        return value

    def held(self) -> Iterator[Any]:
        """The tensors kept."""
        return iter(self._differences)


def _add(factor: float, value: Tensor, difference: Tensor) -> Tensor:
    return value.add(difference, alpha=factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taylor(Method):
    """Computes every n-th step and extrapolates in between.

    Args:
        order: of the series; 0 reuses what was computed last, like `Interval`.
        interval: n; with 1 everything is computed.
        warmup: steps at the beginning that are all computed.
        level: "sublayer" or "stack", as in `Interval`.

    Source: TaylorSeer (arXiv 2503.06923), eq. 5 and 6.
    """

    name: ClassVar[str] = "taylor"
    order: int = 1
    interval: int = 3
    warmup: int = 1
    level: str = "sublayer"

    def __post_init__(self) -> None:
        at_least("order", self.order, 0)
        at_least("interval", self.interval, 1)
        at_least("warmup", self.warmup, 1)
        one_of("level", self.level, ("sublayer", "stack"))

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer",) if self.level == "sublayer" else ("block",)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return _Sublayers(sites, self) if self.level == "sublayer" else _Stacks(sites, self)

    def skips(self, step: Step) -> bool:
        """Whether nothing is computed at this step."""
        after = step.index - (self.warmup - 1)
        return after > 0 and after % self.interval != 0


class _Sublayers(Session):
    def __init__(self, sites: Sites, method: Taylor) -> None:
        super().__init__(sites)
        self._method = method
        self._skip = False
        self._index = 0
        self._series = [Series(method.order) for _ in sites.sublayers]

    def begin(self, step: Step) -> None:
        self._skip, self._index = self._method.skips(step), step.index
        self.computed = [0.0 if self._skip else 1.0] * len(self.computed)

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        if self._skip:
            return self._series[index].at(self._index)
        output = original(*args, **kwargs)
        if self._method.interval > 1:
            self._series[index].update(self._index, output)
        return output

    def held(self) -> Iterator[Any]:
        for series in self._series:
            yield from series.held()


class _Stacks(StretchSession):
    def __init__(self, sites: Sites, method: Taylor) -> None:
        super().__init__(sites, stretches(sites))
        self._method = method
        self._index = 0
        self._series = {part.first: Series(method.order) for part in self.parts}

    def begin(self, step: Step) -> None:
        self.skipping, self._index = self._method.skips(step), step.index

    def replace(self, part: Stretch) -> Hidden:
        return add(part.entered, cast(Hidden, self._series[part.first].at(self._index)))

    def learn(self, part: Stretch, left: Hidden) -> None:
        if self._method.interval > 1:
            change = cast(tuple[Tensor, ...], residual(part.entered, left))
            self._series[part.first].update(self._index, change)

    def held(self) -> Iterator[Any]:
        yield from super().held()
        for series in self._series.values():
            yield from series.held()
