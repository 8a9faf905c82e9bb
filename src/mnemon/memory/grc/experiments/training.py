"""One run: a model of one arm from one seed, trained for so many steps and judged once."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mnemon.memory.grc.experiments.arms import Arm
from mnemon.memory.grc.experiments.scales import Scale, Size

__all__ = ["Result", "Run", "Task", "train"]

_WARM_UP = 50  # steps
_LAST_RATE = 0.02  # of the highest


class Run(abc.ABC):
    """A model in training, with what it carries from step to step.

    Attributes:
        model: what is trained.
    """

    model: nn.Module

    @abc.abstractmethod
    def loss(self, step: int) -> Tensor:
        """Of the batch that belongs to `step`: which one depends on the seed and the step alone."""

    @abc.abstractmethod
    def score(self) -> float:
        """On what was held out."""


class Task(abc.ABC):
    """What is learned.

    Args:
        size: "small" for a few minutes of a CPU, "large" for a GPU.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    num_seeds: ClassVar[int]

    def __init__(self, size: Size) -> None:
        self.scale = self.scales()[size]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @staticmethod
    @abc.abstractmethod
    def scales() -> dict[Size, Scale]:
        """By size."""

    @abc.abstractmethod
    def start(self, arm: Arm, seed: int) -> Run:
        """A run with fresh weights."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a reader has to know to judge a score, such as that of a constant answer."""

    @property
    def memory(self) -> dict[str, Any]:
        """Options of `add_grc` that all arms share."""
        return {"ratio": self.scale.ratio, "memory_length": self.scale.memory_length}


class Result(NamedTuple):
    """What came of a run.

    Args:
        arm: its name.
        seed: of weights and order.
        score: on what was held out.
        loss: mean of the last tenth of the steps.
        num_parameters: of the model.
        seconds: of training and judging.
        shares: sigmoid(lambda), the mean over heads, by layer; empty without a memory.
    """

    arm: str
    seed: int
    score: float
    loss: float
    num_parameters: int
    seconds: float
    shares: tuple[float, ...]


def train(
    task: Task, arm: Arm, seed: int, steps: int, tick: Callable[[int], None] = lambda count: None
) -> Result:
    """Trains and judges.

    Args:
        task: what is learned.
        arm: which model.
        seed: of weights and order.
        steps: how many; the learning rate falls to its end with them.
        tick: is told of every ten steps done; what it raises ends the run.
    """
    begin = time.perf_counter()
    run = task.start(arm, seed)
    rate = task.scale.rate
    optimiser = torch.optim.AdamW(
        run.model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    losses = []
    run.model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * _share(step, steps)
        loss = run.loss(step)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % 10 == 0:
            tick(10)
    tick(steps % 10)
    run.model.eval()
    with torch.no_grad():
        score = run.score()
    last = torch.stack(losses[-max(1, steps // 10) :])
    return Result(
        arm=arm.name,
        seed=seed,
        score=score,
        loss=last.mean().item(),
        num_parameters=sum(p.numel() for p in run.model.parameters()),
        seconds=round(time.perf_counter() - begin, 2),
        shares=_shares(run.model),
    )


def _share(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(_WARM_UP, steps))
    return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _shares(model: nn.Module) -> tuple[float, ...]:
    from mnemon.memory.grc.branch import MemoryBranch

    return tuple(
        round(torch.sigmoid(module.lambdas.detach().float()).mean().item(), 4)
        for module in model.modules()
        if isinstance(module, MemoryBranch)
    )
