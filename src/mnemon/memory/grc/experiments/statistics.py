"""Means over seeds, and differences paired by seed, with confidence intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from mnemon.errors import DependencyError
from mnemon.memory.grc.experiments.arms import PLAIN
from mnemon.memory.grc.experiments.training import Result

__all__ = ["Mean", "Row", "mean_of", "rows"]

_CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over seeds.

    Args:
        mean: of the values.
        sd: sample standard deviation; None of a single value.
        half_width: of the 95% confidence interval by Student's t; None of a single value.
        values: in the order of the seeds.
    """

    mean: float
    sd: float | None
    half_width: float | None
    values: tuple[float, ...]


class Row(NamedTuple):
    """What came of an arm.

    Args:
        arm: its name.
        score: over its seeds.
        difference: its score minus plain's of the same seed, over the seeds that both have; None
            for plain itself, or where no seed is shared.
        num_parameters: of its model.
        seconds: mean of a run.
        shares: sigmoid(lambda) at the end, by layer, the mean over seeds.
    """

    arm: str
    score: Mean
    difference: Mean | None
    num_parameters: int
    seconds: float
    shares: tuple[float, ...]


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, deviation and interval of one value or more.

    Raises:
        DependencyError: scipy is not installed.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(mean, None, None, tuple(values))
    sd = statistics.stdev(values)
    return Mean(mean, sd, _quantile(len(values) - 1) * sd / len(values) ** 0.5, tuple(values))


def _quantile(degrees: int) -> float:
    try:
        from scipy import stats  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DependencyError(
            "confidence intervals need scipy, which comes with scikit-learn; "
            "pip install 'mnemon[diffusion]'"
        ) from error
    return float(stats.t.ppf(0.5 + _CONFIDENCE / 2, degrees))


def rows(results: Sequence[Result], order: Sequence[str]) -> list[Row]:
    """A row for each arm that has results, in the order given.

    Args:
        results: of all runs so far.
        order: names of arms.
    """
    found = []
    by_seed = {result.seed: result.score for result in results if result.arm == PLAIN}
    for name in order:
        own = sorted((r for r in results if r.arm == name), key=lambda result: result.seed)
        if not own:
            continue
        paired = [r.score - by_seed[r.seed] for r in own if r.seed in by_seed]
        found.append(
            Row(
                arm=name,
                score=mean_of([result.score for result in own]),
                difference=mean_of(paired) if paired and name != PLAIN else None,
                num_parameters=own[0].num_parameters,
                seconds=statistics.fmean(result.seconds for result in own),
                shares=tuple(
                    statistics.fmean(layer)
                    for layer in zip(*(result.shares for result in own), strict=True)
                ),
            )
        )
    return found
