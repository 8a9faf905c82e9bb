"""What is compared: the same model with different memories, and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.adding import add_grc

__all__ = ["ARMS", "PLAIN", "Arm", "assemble", "chosen_arms"]

PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One of the compared models.

    Args:
        name: short, as on the command line.
        note: what it is, for a table.
        memory: options of `add_grc`; None adds nothing.
        wide: a feed-forward that makes up for the parameters of "grc-paper".
        recurrence: in a language model, Transformer-XL's memory of as many tokens as GRC has slots.
    """

    name: str
    note: str
    memory: Mapping[str, Any] | None = None
    wide: bool = False
    recurrence: bool = False
    only: tuple[str, ...] = field(default=("listops", "digits", "lm"))


ARMS = (
    Arm(name=PLAIN, note="no memory"),
    Arm(name="grc-paper", note="GRC as in the paper", memory={"variant": "paper"}),
    Arm(name="grc-repo", note="GRC as in its public code", memory={"variant": "repo"}),
    Arm(name="wide", note="no memory, wider feed-forward, parameters of grc-paper", wide=True),
    Arm(
        name="zero",
        note="grc-paper, the cache pinned at zero",
        memory={"variant": "paper", "pinned": True},
    ),
    Arm(
        name="closed",
        note="grc-paper with sigmoid(lambda) = 0",
        memory={"variant": "paper", "initial_lambda": float("-inf")},
    ),
    Arm(
        name="fifo",
        note="the latest tokens as cache, no gates",
        memory={"variant": "paper", "rule": "fifo"},
        only=("listops", "digits"),
    ),
    Arm(name="fifo", note="Transformer-XL's cache", recurrence=True, only=("lm",)),
    Arm(
        name="fifo-grc",
        note="Transformer-XL's cache and GRC",
        memory={"variant": "paper"},
        recurrence=True,
        only=("lm",),
    ),
)


def chosen_arms(task: str, names: Iterable[str] | None = None) -> tuple[Arm, ...]:
    """The arms of a task in their order; "plain" is always among them.

    Raises:
        LearnedMemoryError: a name that is not an arm of this task.
    """
    known = {arm.name: arm for arm in ARMS if task in arm.only}
    if names is None:
        return tuple(known.values())
    wanted = set(names)
    if wanted - set(known):
        raise LearnedMemoryError(
            f"no arm of {task} is called {', '.join(map(repr, sorted(wanted - set(known))))}; "
            f"known: {', '.join(known)}"
        )
    return tuple(arm for name, arm in known.items() if name in wanted | {PLAIN})


def assemble(
    factory: Callable[[int], nn.Module],
    arm: Arm,
    seed: int,
    *,
    hidden: int,
    memory: Mapping[str, Any],
) -> nn.Module:
    """The model of an arm. All arms of a seed share the weights that they have in common.

    Args:
        factory: makes the plain model with so many channels in its feed-forwards.
        arm: which.
        seed: of the initial weights.
        hidden: channels of the feed-forwards, where the arm is not wide.
        memory: options of `add_grc` that all arms share.
    """
    if arm.wide:
        hidden = _matching(factory, hidden, memory)
    torch.manual_seed(seed)
    model = factory(hidden)
    if arm.memory is not None:
        torch.manual_seed(seed + 1_000_003)
        add_grc(model, **{**memory, **arm.memory})
    return model


def _matching(factory: Callable[[int], nn.Module], hidden: int, memory: Mapping[str, Any]) -> int:
    """The width with which a plain model has as many parameters as one with GRC."""
    model = factory(hidden)
    base = _count(model)
    add_grc(model, **{**memory, "variant": "paper"})
    per_channel = _count(factory(hidden + 1)) - base
    return hidden + round((_count(model) - base) / per_channel)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
