"""Results as plain numbers: a row for each setting, and what is best at equal cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mnemon.cli.diffusion.fronts import Point, best_within
from mnemon.cli.diffusion.measure import Outcome
from mnemon.cli.diffusion.settings import FEWER_STEPS, UNCACHED

__all__ = ["AXES", "at_cost", "rows", "working"]

AXES = {"macs_share": "MACs", "time_share": "wall-clock"}
_MEANS = (
    *("psnr", "calls", "macs", "macs_share", "seconds", "time_share", "speedup"),
    *("peak_bytes", "accuracy", "distance"),
)


def rows(by_pipe: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """A row for each setting: means over pipelines, and each pipeline's own figures.

    Args:
        by_pipe: for each pipeline the outcomes of the same settings, the uncached one first.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, outcomes in enumerate(by_pipe):
        base = outcomes[0].seconds
        for outcome in outcomes:
            setting = outcome.setting
            row = found.setdefault(
                setting.name,
                {
                    "name": setting.name,
                    "family": setting.family,
                    "library": setting.library,
                    "note": setting.known_error,
                    "error": None,
                    "pipes": [],
                },
            )
            row["error"] = row["error"] or outcome.error
            row["pipes"].append({"pipe": number, **_figures(outcome, base)})
    for row in found.values():
        row |= {key: _mean(pipe[key] for pipe in row["pipes"]) for key in _MEANS}
        finite = [p["psnr"] for p in row["pipes"] if p["psnr"] is not None]
        row["psnr_sd"] = statistics.stdev(finite) if len(finite) > 1 else None
        row["exact"] = all(pipe["exact"] for pipe in row["pipes"])
    return list(found.values())


def _figures(outcome: Outcome, base: float | None) -> dict[str, Any]:
    seconds, psnr = outcome.seconds, outcome.psnr
    failed = outcome.error is not None
    timed = not failed and base is not None and seconds is not None
    exact = psnr is not None and math.isinf(psnr)
    return {
        "psnr": None if exact or failed else psnr,
        "exact": exact,  # every bit equal: no number of decibels says that
        "calls": outcome.calls,
        "macs": outcome.macs,
        "macs_share": outcome.macs_share,
        "seconds": seconds,
        "time_share": seconds / base if timed else None,  # type: ignore[operator]
        "speedup": base / seconds if timed else None,  # type: ignore[operator]
        "rounds_s": outcome.rounds_s or [],
        "peak_bytes": outcome.peak_bytes,
        "accuracy": outcome.accuracy,
        "distance": outcome.distance,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def working(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a cost and a finite PSNR."""
    return [r for r in found if r["error"] is None and r["psnr"] is not None]


def at_cost(
    found: Sequence[dict[str, Any]], costs: Sequence[float], num_pipes: int
) -> list[dict[str, Any]]:
    """For each axis and cost: every family's best PSNR within it, best first.

    Args:
        found: from `rows`.
        costs: shares of what the uncached run costs.
        num_pipes: families that reach a cost on fewer pipelines are not ranked.
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for row in working(found):
        if row["family"] != UNCACHED:
            families.setdefault(row["family"], []).append(row)
    tables = []
    for axis in AXES:
        if all(row[axis] is None for row in found):
            continue  # nothing was timed
        for cost in costs:
            entries = [_entry(name, rows, axis, cost, num_pipes) for name, rows in families.items()]
            reached = [entry for entry in entries if entry is not None]
            plain = next((e["psnr"] for e in reached if e["family"] == FEWER_STEPS), None)
            for entry in reached:
                entry["gain"] = None if plain is None else entry["psnr"] - plain
            ranked = sorted(reached, key=lambda entry: -entry["psnr"])
            tables.append({"axis": axis, "cost": cost, "families": ranked})
    return tables


def _entry(
    family: str, rows: list[dict[str, Any]], axis: str, cost: float, num_pipes: int
) -> dict[str, Any] | None:
    values = []
    for number in range(num_pipes):
        points = [
            Point(pipe[axis], pipe["psnr"])
            for row in rows
            for pipe in row["pipes"]
            if pipe["pipe"] == number and pipe[axis] is not None and pipe["psnr"] is not None
        ]
        best = best_within(points, cost)
        if best is None:
            return None
        values.append(best)
    return {
        "family": family,
        "library": rows[0]["library"],
        "psnr": statistics.fmean(values),
        "psnr_sd": statistics.stdev(values) if len(values) > 1 else None,
        "by_pipe": values,
    }
