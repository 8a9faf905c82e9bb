"""Blocks in front decide whether those behind them run: what first_block and dbcache share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from mnemon.diffusion.clock import Step
from mnemon.diffusion.hidden import BlockCall
from mnemon.diffusion.methods.skipping import (
    Hidden,
    Stretch,
    StretchSession,
    add,
    residual,
    stretches,
)
from mnemon.diffusion.methods.taylor import Series
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

__all__ = ["FrontSession", "check_front", "relative_change"]


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute change over mean absolute value, over the whole batch."""
    scale = before.float().abs().mean()
    change = (now.float() - before.float()).abs().mean()
    return float(change / scale) if scale > 0 else (0.0 if change == 0 else float("inf"))


def check_front(sites: Sites, *, front: int, back: int) -> None:
    """Raises:
    DiffusionError: so many blocks cannot be compared, or none is left between them.
    """
    blocks = len(sites.stacks[0].blocks)
    if front > blocks:
        raise DiffusionError(
            f"front={front} came; the first stack of {sites.model} has {blocks} blocks, and what "
            "is compared has to lie within it"
        )
    stretches(sites, front=front, back=back)


class FrontSession(StretchSession):
    """Computes `front` blocks, compares what they added with the last computed step's, and leaves
    out the middle if that changed by less than `threshold`. The last `back` blocks always run.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        front: int,
        back: int,
        threshold: float,
        warmup: int,
        longest: int | None,
        order: int,
    ) -> None:
        super().__init__(sites, stretches(sites, front=front, back=back))
        self._front, self._threshold = front, threshold
        self._warmup, self._longest = warmup, longest
        self._stream = sites.stacks[0].returns.index("hidden_states")
        self._index = self._skipped = 0
        self._entered: Tensor | None = None
        self._added: Tensor | None = None  # by the front blocks, at the last computed step
        self._series = {part.first: Series(order) for part in self.parts}

    def begin(self, step: Step) -> None:
        self.skipping = False
        self._index = step.index

    def block(self, index: int, call: BlockCall) -> Output:
        if index == 0:
            self._entered = call.inputs[self._stream]
        output = super().block(index, call)
        if index == self._front - 1:
            self._decide(cast(Tensor, call.parts(output)[self._stream]))
        return output

    def _decide(self, left: Tensor) -> None:
        added = left - cast(Tensor, self._entered)
        self._entered = None
        allowed = self._index >= self._warmup and (
            self._longest is None or self._skipped < self._longest
        )
        if allowed and self._added is not None:
            self.skipping = relative_change(added, self._added) < self._threshold
        if self.skipping:
            self._skipped += 1
        else:
            self._skipped, self._added = 0, added

    def replace(self, part: Stretch) -> Hidden:
        return add(part.entered, cast(Hidden, self._series[part.first].at(self._index)))

    def learn(self, part: Stretch, left: Hidden) -> None:
        if self._threshold > 0:
            change = cast(tuple[Tensor, ...], residual(part.entered, left))
            self._series[part.first].update(self._index, change)

    def held(self) -> Iterator[Any]:
        yield from super().held()
        yield from (self._entered, self._added)
        for series in self._series.values():
            yield from series.held()
