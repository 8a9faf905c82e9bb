"""Left-out steps predicted by a linear fit made beforehand, at steps chosen beforehand.

A step that is left out runs no block. What its last block would return is predicted, channel by
channel, from what is known without running one: the last blocks' outputs at up to `history`
computed steps, and what enters the first block now and entered it then.

    out_m  =  in_m + add_a  +  sum_i  w_i * term_i          add = out - in, what the blocks add
    terms     1, add_a, add_a - add_b, add_b - add_c, ..., in_m, in_m - in_a, in_a - in_b, ...

with a, b, c, ... the computed steps before m, latest first. What the transformer then answers, at
every step, is corrected by scalars times how far it is from its answers before: at a computed step
that tells how wrong the prediction before it was, and takes back what that did to the sample.

    y_m  <-  y_m  +  sum_j  c_j (y_m - y_{m-j})             j = 1, 2, 3

 The weights (one per step, term and
channel) come from `mnemon.diffusion.fitting`. Reuse is the case of zero weights, extrapolation that
of constant ones.
"""

from __future__ import annotations

import abc
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemon.diffusion.clock import Step
from mnemon.diffusion.hidden import BlockCall
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.skipping import missing_blocks
from mnemon.diffusion.outputs import Output, answer_of, with_answer
from mnemon.diffusion.router import place_of, read_tensors, write_tensors
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

ANSWERS = 3  # that a correction looks back on

__all__ = ["ANSWERS", "Fitted", "History", "Plan", "load_plan", "num_terms"]


def num_terms(history: int) -> int:
    """Terms of a prediction from `history` computed steps."""
    return 2 * history + 2


class History:
    """What entered the first block and left the last, at the latest computed steps."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._entered: list[Tensor] = []
        self._left: list[Tensor] = []
        self._same = True

    def update(self, entered: Tensor, left: Tensor) -> None:
        """A step was computed."""
        self._same = entered.shape == left.shape  # else text joined it on the way
        self._entered = [entered, *self._entered][: self._length]
        self._left = [left, *self._left][: self._length]

    @property
    def empty(self) -> bool:
        """No step was computed yet."""
        return not self._left

    @property
    def latest(self) -> Tensor:
        """What left the last block at the latest computed step."""
        return self._left[0]

    def base(self, entered: Tensor) -> Tensor:
        """What would leave the last block if the blocks added what they added last."""
        return entered + (self.latest - self._entered[0]) if self._same else self.latest

    def terms(self, entered: Tensor) -> list[Tensor | None]:
        """The terms of a prediction but for the constant; None, which counts as zero, for those of
        computed steps that are not (yet) there.
        """
        absent: list[Tensor | None] = [None] * (self._length + 1)
        if not self._same:
            added = self._left
            return [*_differences(added), *absent][: self._length] + absent
        added = [a - b for a, b in zip(self._left, self._entered, strict=True)]
        found = [*_differences(added), *absent][: self._length]
        inputs = _differences([entered, *self._entered])
        return found + [*inputs, *absent][: self._length + 1]

    def predict(self, entered: Tensor, weights: Float[Tensor, "terms channels"]) -> Tensor:
        """What would leave the last block now."""
        value = self.base(entered)
        weights = weights.to(value.dtype)
        value = value + weights[0]
        for weight, term in zip(weights[1:], self.terms(entered), strict=True):
            if term is not None:
                value = torch.addcmul(value, term, weight)
        return value

    def held(self) -> Iterator[Any]:
        """The tensors kept."""
        yield from (self._entered, self._left)


def _differences(values: Sequence[Tensor]) -> list[Tensor]:
    """The latest value, and how much each differs from the one before."""
    return [values[0], *(a - b for a, b in itertools.pairwise(values))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Which steps are computed, and how the others are predicted.

    Args:
        computed: by step; the first is.
        weights: zeros for steps that are computed.
        corrections: c_1, c_2, c_3 by step; zeros where answers are left as they are.
        history: computed steps that a prediction looks back on.
        model: the class of the transformer.
        num_blocks: of that transformer.
        timesteps: of the runs that it was fitted on, as the model is told them.
        sampler: the class of their scheduler; "" if it was not known.
        psnr: in dB, what the fit reached on its own runs.
    """

    computed: tuple[bool, ...]
    weights: Float[Tensor, "steps terms channels"]
    corrections: Float[Tensor, "steps answers"]
    history: int
    model: str
    num_blocks: int
    timesteps: tuple[float, ...]
    sampler: str = ""
    psnr: float = float("nan")

    def __post_init__(self) -> None:
        expected = (len(self.computed), num_terms(self.history))
        if self.history < 1 or tuple(self.weights.shape[:2]) != expected or self.weights.ndim != 3:
            raise DiffusionError(
                f"weights of shape {tuple(self.weights.shape)} came; {len(self.computed)} steps "
                f"and a history of {self.history} need {expected} and the channels"
            )
        if len(self.timesteps) != len(self.computed):
            raise DiffusionError(
                f"{len(self.timesteps)} timesteps came for {len(self.computed)} steps"
            )
        if not self.computed or not self.computed[0]:
            raise DiffusionError("a plan has to compute its first step; this one does not")
        if tuple(self.corrections.shape) != (len(self.computed), ANSWERS):
            raise DiffusionError(
                f"corrections of shape {tuple(self.corrections.shape)} came, "
                f"{(len(self.computed), ANSWERS)} was expected"
            )
        if not bool(torch.isfinite(self.weights).all() and torch.isfinite(self.corrections).all()):
            raise DiffusionError("a plan's weights have to be finite; some of these are not")

    def __str__(self) -> str:
        steps = "".join("x" if done else "." for done in self.computed)
        return f"plan {steps}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        write_tensors(
            path,
            {
                "weights": self.weights.float().contiguous(),
                "corrections": self.corrections.float().contiguous(),
            },
            kind="fitted-plan",
            fields={
                "computed": [int(done) for done in self.computed],
                "history": self.history,
                "model": self.model,
                "num_blocks": self.num_blocks,
                "timesteps": list(self.timesteps),
                "sampler": self.sampler,
                "psnr": self.psnr if math.isfinite(self.psnr) else None,
            },
        )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan.

    Raises:
        DiffusionError: no plan is there, or not a whole one.
    """
    found, fields = read_tensors(path, kind="fitted-plan", names=("weights", "corrections"))
    with fields.naming():
        return Plan(
            computed=tuple(bool(flag) for flag in fields.numbers("computed")),
            weights=found["weights"].float(),
            corrections=found["corrections"].float(),
            history=fields.whole("history"),
            model=fields.text("model"),
            num_blocks=fields.whole("num_blocks"),
            timesteps=fields.numbers("timesteps"),
            sampler=fields.text("sampler"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Method):
    """Computes the steps of a plan and predicts the others.

    Args:
        plan: a `Plan`, or the path of a saved one (`mnemon diffusion fit`).
    """

    name: ClassVar[str] = "fitted"
    made_for_one: ClassVar[bool] = True
    plan: Plan | str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            object.__setattr__(self, "plan", load_plan(self.plan))

    @property
    def levels(self) -> Sequence[Level]:
        return ("block",)

    @property
    def _plan(self) -> Plan:
        assert isinstance(self.plan, Plan)
        return self.plan

    def check(self, sites: Sites) -> None:
        plan = self._plan
        if sites.model != plan.model or len(sites.blocks) != plan.num_blocks:
            raise DiffusionError(
                f"the plan is of a {plan.model} with {plan.num_blocks} blocks, this is a "
                f"{sites.model} with {len(sites.blocks)}; fit one for it"
            )

    def check_sampler(self, name: str) -> None:
        made = self._plan.sampler
        if made and name != made:
            raise DiffusionError(
                f"the plan was fitted for {made}, the pipeline has {name}; fit a plan for it"
            )

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return _FittedSession(sites, self._plan)


class OutputSession(Session):
    """Runs all blocks, or none and predicts what the last of them returns.

    A subclass sets `skipping` and says what is predicted.
    """

    def __init__(self, sites: Sites, history: int) -> None:
        super().__init__(sites)
        self.skipping = False
        self.history = History(history)
        self._entered: Tensor | None = None
        self._kept: tuple[Tensor | None, ...] = ()
        self._answers: list[Tensor] = []  # the latest first, corrected
        self._streams = [s.returns.index("hidden_states") for s in sites.stacks]
        self._last = len(sites.blocks) - 1

    @abc.abstractmethod
    def predict(self, entered: Tensor) -> Tensor:
        """What the last block would return, given what entered the first."""

    def learn(self, entered: Tensor, left: Tensor) -> Tensor:
        """All blocks were computed; what is handed on."""
        self.history.update(entered, left)
        return left

    def block(self, index: int, call: BlockCall) -> Output:
        if index == 0:
            self._entered = call.inputs[self._streams[0]]
        entered, stream = self._entered, self._streams[-1]
        if entered is None:
            raise missing_blocks(self.sites)
        if self.skipping:
            self.ran[index] = 0.0
            if index < self._last:
                return call.hand_on()
            self._entered = None
            left = list(self._kept)  # other streams, if any, end here: nothing reads them
            left[stream] = self.predict(entered)
            return call.hand_on(tuple(left))
        output = call.compute()
        if index == self._last:
            self._entered, parts = None, list(call.parts(output))
            left_now = parts[stream]
            assert left_now is not None
            parts[stream] = self.learn(entered, left_now)
            if parts[stream] is not left_now:
                return call.hand_on(tuple(parts))
            self._kept = tuple(parts)
        return output

    def differences(self, answer: Tensor) -> list[Tensor]:
        """How far `answer` is from the answers before it, the latest first."""
        return [answer - before for before in self._answers]

    def corrected(self, answer: Tensor, factors: Sequence[float]) -> Tensor:
        """`answer` with its correction; later ones look back on it."""
        value = answer
        for factor, difference in zip(factors, self.differences(answer), strict=False):
            if factor:
                value = value.add(difference, alpha=factor)
        self._answers = [value, *self._answers][:ANSWERS]
        return value

    def held(self) -> Iterator[Any]:
        yield from (self._entered, self._kept, self._answers)
        yield from self.history.held()


class _FittedSession(OutputSession):
    def __init__(self, sites: Sites, plan: Plan) -> None:
        super().__init__(sites, plan.history)
        self._plan = plan
        self._weights: Tensor | None = None
        self._corrections: list[list[float]] = plan.corrections.tolist()
        self._factors: list[float] = []
        self._corrects = bool(plan.corrections.any())

    def begin(self, step: Step) -> None:
        plan = self._plan
        total, place = len(plan.computed), place_of(step.timestep, plan.timesteps, "plan")
        coming = place + 1 + step.left
        if step.told and coming != total:
            raise DiffusionError(
                f"the plan was fitted for {total} steps, this run has {coming}; run that many, or "
                "fit a plan for this number"
            )
        # A run that begins in the middle, or changes its batch there, has nothing to predict from.
        self.skipping = not plan.computed[place] and not self.history.empty
        self.computed = [0.0 if self.skipping else 1.0] * len(self.computed)
        self._weights = plan.weights[place] if self.skipping else None
        self._factors = self._corrections[place]

    def predict(self, entered: Tensor) -> Tensor:
        assert self._weights is not None
        latest = self.history.latest
        if self._weights.shape[-1] != latest.shape[-1]:
            raise DiffusionError(
                f"the plan has weights for {self._weights.shape[-1]} channels, the model "
                f"{latest.shape[-1]}; fit a plan for it"
            )
        return self.history.predict(entered, self._weights.to(latest.device))

    def answer(self, result: Any, hidden: Tensor | None) -> Any:
        if not self._corrects:
            return result
        return with_answer(result, self.corrected(answer_of(result), self._factors))
