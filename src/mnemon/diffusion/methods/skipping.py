"""Blocks left out a stretch at a time: what methods at the level of stacks share."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from mnemon.diffusion.hidden import BlockCall
from mnemon.diffusion.methods.base import Session
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

__all__ = [
    "Hidden",
    "Stretch",
    "StretchSession",
    "add",
    "missing_blocks",
    "residual",
    "stretches",
]

Hidden = tuple[Tensor | None, ...]


class Stretch:
    """Blocks `first` to `last` (running numbers) of one stack, left out together.

    Attributes:
        entered: the hidden states that came to the first of them, in this evaluation.
    """

    __slots__ = ("entered", "first", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.entered: Hidden = ()


def stretches(sites: Sites, *, front: int = 0, back: int = 0) -> list[Stretch]:
    """All blocks but the first `front` and the last `back` of the model, by stack.

    Raises:
        DiffusionError: nothing is left between them.
    """
    end = len(sites.blocks) - back
    found = []
    for stack in sites.stacks:
        inside = [b.index for b in stack.blocks if front <= b.index < end]
        if inside:
            found.append(Stretch(inside[0], inside[-1]))
    if not found:
        raise DiffusionError(
            f"{front} blocks in front and {back} at the back are always computed, and "
            f"{sites.model} has {len(sites.blocks)} blocks: none could ever be left out"
        )
    return found


def missing_blocks(sites: Sites) -> DiffusionError:
    """What to say where a stretch of blocks is not run from its first one on."""
    return DiffusionError(
        f"blocks of {sites.model} are missing from this call (skip_layers?); this method stands "
        "for whole stretches of them, use one at the level of sublayers"
    )


def residual(entered: Hidden, left: Hidden) -> Hidden:
    """What blocks added to the hidden states; None where they return none."""
    return tuple(
        None if after is None else after if before is None else after - before
        for before, after in zip(entered, left, strict=True)
    )


def add(entered: Hidden, change: Hidden) -> Hidden:
    """The hidden states behind blocks that would add `change`."""
    return tuple(
        None if more is None else more if before is None else before + more
        for before, more in zip(entered, change, strict=True)
    )


class StretchSession(Session):
    """Runs all blocks, or leaves out stretches of them.

    A subclass sets `skipping` before the first block of a stretch is reached, and says what stands
    for one that is left out.
    """

    def __init__(self, sites: Sites, parts: Sequence[Stretch]) -> None:
        super().__init__(sites)
        self.skipping = False
        self.parts = parts
        self._of = {i: p for p in parts for i in range(p.first, p.last + 1)}
        numbers: list[list[int]] = [[] for _ in sites.blocks]
        for number, sublayer in enumerate(sites.sublayers):
            numbers[sublayer.block].append(number)
        self._sublayers = numbers

    @abc.abstractmethod
    def replace(self, part: Stretch) -> Hidden:
        """The hidden states behind a stretch that is left out."""

    @abc.abstractmethod
    def learn(self, part: Stretch, left: Hidden) -> None:
        """A stretch was computed and returned `left`."""

    def block(self, index: int, call: BlockCall) -> Output:
        part = self._of.get(index)
        if part is None:
            return self.run(index, call)
        if index == part.first:
            part.entered = call.inputs
        if self.skipping:
            if not part.entered:
                raise missing_blocks(self.sites)
            self.ran[index] = 0.0
            if index != part.last:
                return call.hand_on()
            replaced = self.replace(part)
            part.entered = ()
            return call.hand_on(replaced)
        output = self.run(index, call)
        if index == part.last:
            if not part.entered:
                raise missing_blocks(self.sites)
            self.learn(part, call.parts(output))
            part.entered = ()
        return output

    def run(self, index: int, call: BlockCall) -> Output:
        """Computes a block, and notes that it did."""
        for number in self._sublayers[index]:
            self.computed[number] = 1.0
        return call.compute()

    def held(self) -> Iterator[Any]:
        yield from (part.entered for part in self.parts)
