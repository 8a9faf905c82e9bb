"""What a sampler does with the transformer's answers, found out from runs: a linear map or not.

    x_{i+1}  =  a x_i  +  sum_b  (e_b y_{i,b}  +  f_b y_{i-1,b})

x are the latents, y_b the answer for guidance branch b; one number each per step. DDIM, Euler and
flow matching have no f, second-order multistep solvers have. Whatever does not fit (noise that is
added, thresholds) is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemon.diffusion.recording import Call

__all__ = ["Sampler"]

_MISFIT = 1e-3  # of a step's change: more, and the step is not taken for linear
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Coefficients of one step, and the latents to which the uncached run came."""

    kept: float
    now: tuple[float, ...]
    before: tuple[float, ...]
    target: Tensor


class Sampler:
    """The linear map of each step of recorded runs.

    Args:
        calls: of one uncached run.
        final: what the run returned; the target of the last step if it has the latents' shape.
        num_steps: of the run.
    """

    def __init__(self, calls: Sequence[Call], final: Tensor, num_steps: int) -> None:
        self._steps: dict[int, _Step] = {}
        if len(calls) != num_steps:  # branches are called one by one: their answers never meet here
            return
        latents = [_branches(call.hidden, call.hidden)[0] for call in calls]
        answers = [_branches(call.hidden, call.answer) for call in calls]
        for index in range(num_steps):
            after = latents[index + 1] if index + 1 < num_steps else final
            if after.shape == latents[index].shape:
                before = answers[index - 1] if index else []
                self._fit(index, latents[index], answers[index], before, after)

    def _fit(
        self, index: int, latents: Tensor, now: list[Tensor], before: list[Tensor], after: Tensor
    ) -> None:
        columns = [_flat(latents), *map(_flat, [*_cut(now, latents), *_cut(before, latents)])]
        if any(len(c) != len(columns[0]) for c in columns):
            return
        matrix = torch.stack(columns, 1)
        gram = matrix.T @ matrix
        gram += torch.diag(1e-12 * gram.diagonal() + 1e-30)
        solved = torch.linalg.solve(gram, matrix.T @ _flat(after))
        misfit = (matrix @ solved - _flat(after)).norm()
        if misfit > _MISFIT * (_flat(after) - _flat(latents)).norm():
            return
        kept, *rest = solved.tolist()
        self._steps[index] = _Step(
            kept=kept,
            now=tuple(rest[: len(now)]),
            before=tuple(rest[len(now) :]),
            target=after,
        )

    def correct(
        self,
        index: int,
        hidden: Tensor,
        answer: Tensor,
        before: Sequence[Tensor],
        differences: Sequence[Tensor],
    ) -> list[float]:
        """Factors of `differences`, with which the step ends nearest to where the uncached run did.

        Args:
            index: of the step.
            hidden: the latents as the transformer was given them, of all branches.
            answer: its answer.
            before: answers used at the steps before, the latest first.
            differences: of the answer from those before.
        """
        step = self._steps.get(index)
        if step is None or not differences:
            return []
        latents = _branches(hidden, hidden)[0]
        reached = step.kept * _flat(latents) + _weighed(step.now, hidden, answer)
        if step.before:
            reached = reached + _weighed(step.before, hidden, before[0])
        columns = torch.stack([_weighed(step.now, hidden, d) for d in differences], 1)
        gram = columns.T @ columns
        gram += torch.diag(_RIDGE * gram.diagonal() + 1e-12)
        missing = _flat(step.target) - reached
        factors: list[float] = torch.linalg.solve(gram, columns.T @ missing).tolist()
        return factors


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1).double()


def _branches(hidden: Tensor, value: Tensor) -> list[Tensor]:
    """`value` by guidance branch: two, if both halves of the batch were given the same latents."""
    half = len(hidden) // 2
    if len(hidden) % 2 == 0 and torch.equal(hidden[:half], hidden[half:]):
        return [value[:half], value[half:]]
    return [value]


def _cut(answers: Sequence[Tensor], latents: Tensor) -> list[Tensor]:
    """Answers without the channels that say how uncertain they are."""
    channels = latents.shape[1]
    return [a[:, :channels] if a.shape[1] == 2 * channels else a for a in answers]


def _weighed(factors: Sequence[float], hidden: Tensor, value: Tensor) -> Tensor:
    parts = _branches(hidden, value)
    latents = _branches(hidden, hidden)[0]
    flat = [f * _flat(p) for f, p in zip(factors, _cut(parts, latents), strict=True)]
    return torch.stack(flat).sum(0)
