"""Makes the plans of the method `fitted`: which steps to compute, and the weights for the others.

fit      the calibration runs once more. At a step that is to be left out all blocks are
         computed all the same, the weights are solved for (ridge regression towards plain
         reuse) against what they return, and the run goes on with the prediction: later steps
         are fitted on runs that drift as they will when the method is used.
search   evenly spread steps, and some that lie closer and closer towards the end, are tried; from
         the best of them one computed step is moved at a time while that brings the results
         closer to the uncached ones
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mnemon.diffusion.attachment import attach
from mnemon.diffusion.clock import Step
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.fitted import ANSWERS, History, OutputSession, Plan, num_terms
from mnemon.diffusion.outputs import answer_of, with_answer
from mnemon.diffusion.recording import record_runs
from mnemon.diffusion.sampler import Sampler
from mnemon.diffusion.sites import Sites, find_sites
from mnemon.errors import DiffusionError

__all__ = ["Fitter", "profiles", "psnr", "spread"]

Run = Callable[[Any], Tensor]


def psnr(came: Tensor, expected: Tensor, *, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; of images in [-1, 1] the peak is 2."""
    error = (came.double() - expected.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def spread(num_steps: int, count: int) -> tuple[bool, ...]:
    """`count` of `num_steps` steps, evenly, the first among them.

    Raises:
        DiffusionError: not 1 to `num_steps`.
    """
    if not 1 <= count <= num_steps:
        raise DiffusionError(f"{count} steps to compute came; 1 to {num_steps} were expected")
    chosen = {round(i * num_steps / count) for i in range(count)}
    return tuple(step in chosen for step in range(num_steps))


def profiles(num_steps: int, count: int, *, most: int = 12) -> list[tuple[bool, ...]]:
    """Choices of `count` steps whose distances never grow towards the end, even ones first.

    An error made late is not mended any more, and predictions from steps that lie closer together
    than the one predicted are poor. Distances go one beyond the even one; of many choices `most`
    are taken, from the evenest to the one that is densest at the end.
    """
    even = spread(num_steps, count)
    longest = -(-num_steps // count) + 1
    found = [
        steps for gaps in _partitions(num_steps, count, longest) if (steps := _from(gaps)) != even
    ]
    kept = [found[i * len(found) // most] for i in range(most)] if len(found) > most else found
    return [even, *kept]


def _partitions(total: int, parts: int, longest: int) -> Iterator[list[int]]:
    """Ways to write `total` as `parts` numbers from 1 to `longest` that do not grow."""
    if parts == 0:
        if total == 0:
            yield []
        return
    for first in range(min(longest, total - parts + 1), 0, -1):
        if first * parts < total:
            return  # those that follow are no larger
        for rest in _partitions(total - first, parts - 1, first):
            yield [first, *rest]


def _from(gaps: Sequence[int]) -> tuple[bool, ...]:
    return tuple(place == 0 for gap in gaps for place in range(gap))


@dataclass(slots=True, kw_only=True)
class _Found:
    """What the sessions of a fitting run find out."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    corrections: dict[int, list[float]] = field(default_factory=dict)
    channels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitting(Method):
    """Computes everything, but goes on with predictions where steps are to be left out."""

    name: ClassVar[str] = "fitting"
    chosen: tuple[bool, ...]
    history: int
    ridge: float
    sampler: Sampler
    found: _Found

    @property
    def levels(self) -> Sequence[Level]:
        return ("block",)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return _FittingSession(sites, self)


class _FittingSession(OutputSession):
    def __init__(self, sites: Sites, method: _Fitting) -> None:
        super().__init__(sites, method.history)
        self._method = method
        self._index = 0

    def begin(self, step: Step) -> None:
        self._index = step.index
        if step.index >= len(self._method.chosen):
            raise DiffusionError(
                f"a calibration run took more than {len(self._method.chosen)} steps this time; it "
                "has to be the same each time"
            )
        # The first guidance branch solves, the others use what it found.
        chosen = self._method.chosen[step.index]
        self.skipping = not chosen and step.index in self._method.found.weights

    def predict(self, entered: Tensor) -> Tensor:
        return self.history.predict(entered, self._method.found.weights[self._index])

    def learn(self, entered: Tensor, left: Tensor) -> Tensor:
        method, found = self._method, self._method.found
        found.channels = left.shape[-1]
        if method.chosen[self._index]:
            return super().learn(entered, left)
        found.weights[self._index] = _solve(self.history, entered, left, method.ridge)
        return self.predict(entered)

    def answer(self, result: Any, hidden: Tensor | None) -> Any:
        assert hidden is not None
        found, index, value = self._method.found.corrections, self._index, answer_of(result)
        if index not in found and all(self._method.chosen[: index + 1]):
            found[index] = []  # nothing was predicted yet: there is nothing to take back
        if index not in found:
            found[index] = self._method.sampler.correct(
                index, hidden, value, self._answers, self.differences(value)
            )
        return with_answer(result, self.corrected(value, found[index]))


def _solve(history: History, entered: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Weights (terms, channels), each channel a least-squares fit of its own, in float64."""
    channels = target.shape[-1]
    terms = history.terms(entered)
    rows = target.numel() // channels
    matrix = target.new_zeros(len(terms) + 1, channels, rows, dtype=torch.float64)
    matrix[0] = 1.0
    for number, term in enumerate(terms, 1):
        if term is not None:
            matrix[number] = term.reshape(rows, channels).T
    wanted = (target - history.base(entered)).reshape(rows, channels).T.double()
    gram = torch.einsum("tcn,scn->cts", matrix, matrix) / rows
    moment = torch.einsum("tcn,cn->ct", matrix, wanted) / rows
    # Towards zero weights, which is reuse; relative to each term's own size, so that a term that
    # is absent or tiny is not blown up.
    scale = gram.diagonal(dim1=-2, dim2=-1)
    penalty = torch.diag_embed(ridge * scale + 1e-12)
    solved = torch.linalg.solve(gram + penalty, moment[..., None])[..., 0].T
    weights: Tensor = solved.to(target.dtype).contiguous()
    return weights


class Fitter:
    """Fits plans for one pipeline.

    Args:
        pipe: the pipeline (or transformer); nothing stays attached to it.
        run: makes the calibration images, always the same ones: takes the pipeline, returns what is
            compared (images or latents in [-1, 1]).
        history: computed steps that a prediction looks back on.
        ridge: of the regression, relative to the size of each term.
    """

    def __init__(self, pipe: Any, run: Run, *, history: int = 3, ridge: float = 1e-4) -> None:
        self._pipe, self._run = pipe, run
        self._history, self._ridge = history, ridge
        model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
        if not isinstance(model, nn.Module):
            raise DiffusionError(f"a {type(pipe).__name__} came; it has no transformer to fit")
        sites = find_sites(model)
        self._model, self._num_blocks = sites.model, len(sites.blocks)
        images: list[Tensor] = []
        calls = record_runs(pipe, model, [lambda p: images.append(run(p).detach().clone())])
        if not calls:
            raise DiffusionError("the calibration run did not call the transformer")
        self._expected = images[0]
        self.num_steps: int = max(call.index for call in calls) + 1
        self._sampler = Sampler(calls, images[0], self.num_steps)
        first = min(call.branch for call in calls)
        self._timesteps = tuple(c.timestep for c in calls if c.branch == first)
        scheduler = getattr(pipe, "scheduler", None)
        self._scheduler = "" if scheduler is None else type(scheduler).__name__

    def fit(self, computed: Sequence[bool]) -> Plan:
        """The plan that computes these steps; costs one uncached run.

        Raises:
            DiffusionError: not one entry per step, or the first step is left out.
        """
        if len(computed) != self.num_steps or not computed[0]:
            raise DiffusionError(
                f"{len(computed)} steps came, the first of them "
                f"{'' if computed and computed[0] else 'not '}computed; the calibration runs have "
                f"{self.num_steps}, and the first is always computed"
            )
        found = _Found()
        method = _Fitting(
            chosen=tuple(computed),
            history=self._history,
            ridge=self._ridge,
            sampler=self._sampler,
            found=found,
        )
        with torch.no_grad(), attach(self._pipe, method):
            came = self._run(self._pipe)
        weights = torch.zeros(self.num_steps, num_terms(self._history), found.channels)
        for step, solved in found.weights.items():
            weights[step] = solved.float().cpu()
        corrections = torch.zeros(self.num_steps, ANSWERS)
        for step, factors in found.corrections.items():
            corrections[step, : len(factors)] = torch.tensor(factors)
        return Plan(
            computed=tuple(computed),
            weights=weights,
            corrections=corrections,
            history=self._history,
            model=self._model,
            num_blocks=self._num_blocks,
            timesteps=self._timesteps,
            sampler=self._scheduler,
            psnr=psnr(came, self._expected),
        )

    def search(self, count: int, *, rounds: int = 2) -> Iterator[tuple[Plan, bool]]:
        """Plans that compute `count` steps, as they are tried, and whether each is the best so far.

        Args:
            count: steps computed, of all.
            rounds: times that every computed step is tried one place earlier and later.
        """
        best: Plan | None = None
        for steps in profiles(self.num_steps, count):
            tried = self.fit(steps)
            better = best is None or tried.psnr > best.psnr
            if better:
                best = tried
            yield tried, better
        assert best is not None
        for _ in range(rounds):
            moved = False
            for step, other in self._moves(best):
                if not best.computed[step] or best.computed[other]:
                    continue  # an earlier move of this round
                moves = list(best.computed)
                moves[step], moves[other] = False, True
                tried = self.fit(moves)
                better = tried.psnr > best.psnr
                if better:
                    best, moved = tried, True
                yield tried, better
            if not moved:
                return

    def _moves(self, plan: Plan) -> Iterator[tuple[int, int]]:
        for step in range(1, self.num_steps):
            for other in (step - 1, step + 1):
                free = 0 < other < self.num_steps and not plan.computed[other]
                if plan.computed[step] and free:
                    yield step, other
