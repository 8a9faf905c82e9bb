"""How a training run goes from short rows to long ones, and when its rate falls."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mnemon.errors import ZooError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the length curriculum.

    Attributes:
        length: tokens per row at most.
        step_tokens: tokens per optimiser step on a CPU.
        shares: the share of chunks, needles and text rows.
        leave_by: fraction of the budget after which the stage ends whatever its accuracy.
    """

    length: int
    step_tokens: int
    shares: tuple[float, float, float]
    leave_by: float


STAGES = (
    Stage(length=256, step_tokens=4096, shares=(0.20, 0.40, 0.40), leave_by=0.10),
    Stage(length=512, step_tokens=4096, shares=(0.15, 0.40, 0.45), leave_by=0.20),
    Stage(length=1024, step_tokens=4096, shares=(0.15, 0.40, 0.45), leave_by=0.30),
    Stage(length=2048, step_tokens=4096, shares=(0.15, 0.45, 0.40), leave_by=0.40),
    Stage(length=4096, step_tokens=4096, shares=(0.20, 0.45, 0.35), leave_by=1.01),
)


@dataclass(slots=True, kw_only=True)
class Curriculum:
    """Which stage a run is in; part of a checkpoint.

    Attributes:
        stage: index into `STAGES`.
        accuracy: a running mean of the recall accuracy on chunks rows of the stage's length.
        steps_here: steps of the stage's length since it began.
        history: [stage, tokens seen] at each change.
    """

    stage: int = 0
    accuracy: float = 0.0
    steps_here: int = 0
    history: list[list[int]] = field(default_factory=list)

    @property
    def current(self) -> Stage:
        """The stage in force."""
        return STAGES[self.stage]

    def stage_for_step(self, *, seed: int, step: int) -> Stage:
        """The stage a step draws its rows from: often the current one, else one of three before."""
        rng = np.random.default_rng([seed, step])
        if self.stage == 0 or rng.random() < 0.4:
            return self.current
        return STAGES[int(rng.integers(max(0, self.stage - 3), self.stage))]

    def record(self, *, accuracy: float, progress: float, num_tokens: int) -> bool:
        """Take one step's accuracy at the current length, and move on when it is learnt.

        Args:
            accuracy: the fraction of recalled tokens of chunks rows that were right.
            progress: the fraction of the budget that is spent.
            num_tokens: tokens seen so far, for the history.

        Returns:
            True when the stage changed.
        """
        self.steps_here += 1
        self.accuracy += (accuracy - self.accuracy) * max(0.05, 1 / self.steps_here)
        learnt = self.accuracy > 0.95 and self.steps_here >= 40
        if self.stage + 1 == len(STAGES) or not (learnt or progress > self.current.leave_by):
            return False
        self.stage, self.accuracy, self.steps_here = self.stage + 1, 0.0, 0
        self.history.append([self.stage, num_tokens])
        return True

    def state(self) -> dict[str, Any]:
        """The checkpoint's form: plain numbers and lists."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When a run ends: after so many tokens, or so many minutes, whichever is first.

    Attributes:
        num_tokens: the run's tokens, or None.
        minutes: the run's wall-clock minutes over all its resumptions, or None.
        decay_share: the last fraction of the budget, over which the rate falls to zero.
    """

    num_tokens: int | None = None
    minutes: float | None = None
    decay_share: float = 0.3

    def __post_init__(self) -> None:
        if self.num_tokens is None and self.minutes is None:
            raise ZooError("a training run needs --tokens or --minutes (got neither)")

    def progress(self, *, num_tokens: int, elapsed_s: float) -> float:
        """The fraction of the budget that is spent, 0 to 1 and beyond."""
        by_tokens = num_tokens / self.num_tokens if self.num_tokens else 0.0
        by_time = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return max(by_tokens, by_time)

    def rate(self, progress: float, *, step: int, warmup_steps: int = 40) -> float:
        """The factor on the learning rate: warm-up by steps, flat, then linear to zero."""
        warm = min(1.0, (step + 1) / warmup_steps)
        return warm * min(1.0, max(0.0, (1.0 - progress) / self.decay_share))
