"""When one denoising run ends and another begins, and which evaluation of the model this is.

A transformer is only ever called; nobody tells it about runs, steps or guidance. What is told is
used: the scheduler's `set_timesteps` and the names that pipelines give to guidance branches
(diffusers' `cache_context`). What is not told is read from the timesteps: they fall in a run, so a
rise begins a new one; a further call at the same timestep is another branch, or another evaluation
of a solver that needs several. Branch and count together are the key under which features are
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Clock", "Key", "Step"]

_ROUNDING = 2.0**-7  # of bfloat16, twice


# How models are told of timesteps in a scale that rises: of a schedule that does so itself
# (inversion), or of one that falls, turned round.
_RISING: tuple[Callable[[float], float], ...] = (
    lambda t: t,
    lambda t: t / 1000,
    lambda t: 1 - t,
    lambda t: 1 - t / 1000,
    lambda t: 1000 - t,
)


class Key(NamedTuple):
    """Whose features: a guidance branch, and its how manieth evaluation at one timestep."""

    branch: str
    evaluation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One evaluation of the model, as a method sees it.

    Args:
        index: evaluations of this key before this one, in this run.
        timestep: as the model is told it.
        total: how many there will be, if it is known or can be told from the timesteps so far;
            always more than `index`.
        told: a scheduler said so; what is told from timesteps alone is right where they fall evenly
            to the least above 0, and a guess elsewhere.
    """

    index: int
    timestep: float
    total: int | None = None
    told: bool = False

    def first(self) -> Step:
        """The same, if this key forgets what was before."""
        total = None if self.total is None else self.total - self.index
        return Step(index=0, timestep=self.timestep, total=total, told=self.told)

    @property
    def left(self) -> int:
        """Evaluations after this one, 0 at the last; a run of unknown length counts as 1,000."""
        return (1000 if self.total is None else self.total) - 1 - self.index


class Clock:
    """Follows the calls of one transformer.

    Args:
        ascending: the model is told of noise in a scale that rises in a run (Lumina 2).
    """

    def __init__(self, *, ascending: bool = False) -> None:
        self._own_sign = -1.0 if ascending else 1.0
        self._schedule: tuple[float, ...] = ()
        self.start()

    def announce(self, timesteps: Sequence[float]) -> None:
        """A scheduler begins a run over `timesteps`."""
        distinct: list[float] = []
        for value in timesteps:
            if not distinct or value != distinct[-1]:
                distinct.append(value)
        self._schedule = tuple(distinct)
        self.start()
        self._announced = True

    def start(self) -> None:
        """The next call is the first of a run."""
        self._announced = False
        self._sign = self._own_sign
        self._seen: list[float] = []  # distinct timesteps of this run, in order
        self._calls: dict[str, int] = {}  # by branch, at the latest timestep
        self._indices: dict[Key, int] = {}
        self._before: dict[Key, int] = {}  # of them, those that a key has to forget
        self._first_input: Tensor | None = None
        self.ambiguous = False

    def tick(self, timestep: float, branch: str, hidden: Tensor | None) -> tuple[bool, Key, Step]:
        """Counts one call.

        Returns:
            Whether it begins a new run, its key, and its place.
        """
        begins = not self._seen
        if self._announced and len(self._seen) == 1 and self._rises(timestep):
            self._sign = -1.0
        if self._seen and (timestep - self._seen[-1]) * self._sign > 0:
            self.start()
            begins = True
        if begins or timestep != self._seen[-1]:
            self._seen.append(timestep)
            self._calls = {}
        count = self._calls.get(branch, 0)
        self._calls[branch] = count + 1
        if not self._announced and len(self._seen) == 1 and hidden is not None:
            self._look(count, hidden)
        key = Key(branch, count)
        return begins, key, self._step(key, timestep)

    def instead(self, key: Key, other: Key) -> Step:
        """The call just counted was not one of `key`, but of `other`."""
        self._indices[key] -= 1
        return self._step(other, self._seen[-1])

    def _step(self, key: Key, timestep: float) -> Step:
        count = self._indices.get(key, 0)
        self._indices[key] = count + 1
        told = self._announced and bool(self._schedule)
        total, before = self._total(count), self._before.get(key, 0)
        if total is not None:
            total -= before
        return Step(index=count - before, timestep=timestep, total=total, told=told)

    def _rises(self, timestep: float) -> bool:
        """Whether the announced schedule is told to the model as a scale that rises."""
        if len(self._schedule) < 2 or timestep <= self._seen[0]:
            return False
        told = (self._seen[0], timestep)
        for told_as in _RISING:
            ahead = [told_as(value) for value in self._schedule[:2]]
            near = zip(ahead, told, strict=True)
            if all(abs(a - t) <= _ROUNDING * (1e-3 + abs(a)) for a, t in near):
                return True
        return False

    def restart(self, key: Key) -> None:
        """`key` counts from its latest evaluation on."""
        self._before[key] = self._indices[key] - 1

    @property
    def longest(self) -> int:
        """Evaluations in this run of the key that had most."""
        return max(self._indices.values(), default=0)

    def _look(self, count: int, hidden: Tensor) -> None:
        """Whether a second call at the first timestep could be the first of another run.

        A loop that stopped after its first step begins again where it began. Guidance calls the
        model twice on the same input, another run has other noise.
        """
        if count == 0:
            self._first_input = hidden.detach()
        elif self._first_input is not None:
            same = self._first_input.shape == hidden.shape and torch.equal(
                self._first_input.to(hidden.dtype), hidden
            )
            self.ambiguous = self.ambiguous or not same

    @property
    def settled(self) -> bool:
        """False at the one step that has to forget because its predecessor was ambiguous."""
        return not (self.ambiguous and len(self._seen) == 2)

    def _total(self, index: int) -> int | None:
        first = self._seen[0]
        total: int | None = None
        if self._announced and self._schedule:
            total = len(self._schedule)
            # A pipeline that starts from an image leaves out the first timesteps. Models are told
            # of timesteps or of thousandths, rounded to their own precision; where both would fit,
            # of those that fit better.
            found = []
            for told in (first * 1000.0, first):
                distances = [abs(value - told) for value in self._schedule]
                place = distances.index(min(distances))
                found.append((distances[place] / max(abs(told), 1e-9), place))
            misfit, place = min(found, key=lambda one: one[0])
            if misfit <= _ROUNDING:
                total -= place
        elif len(self._seen) > 1 and self._sign > 0:
            spacing = (first - self._seen[-1]) / (len(self._seen) - 1)
            total = math.ceil(first / spacing - 1e-3)
        return None if total is None else max(total, index + 1)
