"""What an experiment has found so far, as a file that an interrupted one goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mnemon.errors import LearnedMemoryError
from mnemon.files.atomic import write_atomically
from mnemon.memory.grc.experiments.statistics import Row, rows
from mnemon.memory.grc.experiments.training import Result

__all__ = ["Plan", "Record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which runs an experiment consists of.

    Args:
        task: "listops", "digits" or "lm".
        size: "small" or "large".
        arms: names, in the order of the tables.
        seeds: 0 to this, without the last.
        steps: of every run.
        scale: the model's and the task's numbers, for the record.
    """

    task: str
    size: str
    arms: tuple[str, ...]
    seeds: int
    steps: int
    scale: dict[str, Any]

    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed of each run; all arms of a seed before the next."""
        return [(arm, seed) for seed in range(self.seeds) for arm in self.arms]

    def identity(self) -> dict[str, Any]:
        """What must be equal for two records to be of the same runs; arms and seeds may grow."""
        scale = {name: value for name, value in self.scale.items() if name != "steps"}
        return {"task": self.task, "size": self.size, "steps": self.steps, "scale": scale}


@final
@dataclass(slots=True, kw_only=True)
class Record:
    """Results as they come, written whole after each run.

    Args:
        plan: what is to be run.
        path: of the JSON file.
        facts: of the task.
        environment: versions, date, threads.
        results: of the runs done.
    """

    plan: Plan
    path: Path
    facts: dict[str, Any]
    environment: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def missing(self) -> list[tuple[str, int]]:
        """The runs that are still to be done."""
        done = {(result.arm, result.seed) for result in self.results}
        return [run for run in self.plan.runs() if run not in done]

    def add(self, result: Result) -> None:
        """Takes a result and writes the file.

        Raises:
            FileError: it cannot be written.
        """
        self.results.append(result)
        self.save()

    def rows(self) -> list[Row]:
        """A row for each arm, of the results so far."""
        return rows(self.results, self.plan.arms)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **self.plan.identity(),
            "arms": list(self.plan.arms),
            "seeds": self.plan.seeds,
            "finished": not self.missing(),
            "environment": self.environment,
            "facts": self.facts,
            "runs": [result._asdict() for result in self.results],
            "summary": [
                {
                    **row._asdict(),
                    "score": row.score._asdict(),
                    "difference": row.difference._asdict() if row.difference else None,
                }
                for row in self.rows()
            ],
        }

    def save(self) -> None:
        """Writes the file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def resume(self) -> None:
        """Takes the results that the file at `path` holds, if there is one.

        Raises:
            LearnedMemoryError: it is not a record, or one of other runs.
        """
        found = read(self.path)
        if found is None:
            return
        expected = json.loads(json.dumps(self.plan.identity()))
        came = {name: found.get(name) for name in expected}
        if came != expected:
            raise LearnedMemoryError(
                f"{self.path} is of runs with {_differing(came, expected)}, this one has "
                f"{_differing(expected, came)}; give the same options, or another --out"
            )
        wanted = set(self.plan.runs())
        results = [Result(**{**run, "shares": tuple(run["shares"])}) for run in found["runs"]]
        self.results = [result for result in results if (result.arm, result.seed) in wanted]

    def check_free(self) -> None:
        """Refuses to write over a record that was interrupted.

        Raises:
            LearnedMemoryError: there is one.
        """
        found = read(self.path)
        if found is not None and found.get("runs") and not found.get("finished"):
            raise LearnedMemoryError(
                f"{self.path} holds {len(found['runs'])} runs of an experiment that was "
                "interrupted; --resume goes on with it, another --out or its removal begins anew"
            )


def read(path: Path) -> dict[str, Any] | None:
    """A record as plain values; None where there is no file.

    Raises:
        LearnedMemoryError: something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LearnedMemoryError(f"{path} is not JSON ({error}); remove it") from error
    if not isinstance(found, dict) or not isinstance(found.get("runs"), list):
        raise LearnedMemoryError(f"{path} is not a record of an experiment; remove it")
    return found


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Sequence[str]:
    return [f"{name}={one[name]!r}" for name in one if one[name] != other[name]]
