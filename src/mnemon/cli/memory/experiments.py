"""What `listops`, `digits` and `lm` share: their options, and one function that runs them."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.errors import LearnedMemoryError

if TYPE_CHECKING:
    from mnemon.memory.grc.experiments.record import Record

__all__ = ["Arms", "AsJson", "Jobs", "Out", "Resume", "Seeds", "Size", "Sizes", "Steps", "run"]


class Sizes(StrEnum):
    """How large a model."""

    SMALL = "small"
    LARGE = "large"


Seeds = Annotated[
    int | None,
    typer.Option("--seeds", min=1, help="Runs of each arm. [default: the experiment's]"),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Of training, in each run. [default: the size's]"),
]
Arms = Annotated[
    str | None,
    typer.Option("--arms", help="Only these, as in grc-paper,fifo; plain always. [default: all]"),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for grc_NAME.json, .md and .png.")]
Size = Annotated[
    Sizes, typer.Option("--size", help="small: minutes on a CPU; large: 6 layers, for a GPU.")
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Runs at a time. [default: the cores; on a GPU 1]"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def run(
    task: str,
    *,
    seeds: int | None,
    steps: int | None,
    arms: str | None,
    out: Path,
    size: Sizes,
    jobs: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Runs an experiment, shows it and writes it."""
    out = out.expanduser()
    output.check_writable(out)
    record = _record(task, seeds, steps, arms, out, size)
    if resume:
        record.resume()
    else:
        record.check_free()

    from mnemon.cli.memory import report

    if not as_json:
        report.announce(record)
    _do(record, jobs, quiet=as_json)
    report.write(record, out)
    if as_json:
        output.print_json(record.as_dict())
    else:
        report.show(record, out)


def _record(
    name: str, seeds: int | None, steps: int | None, arms: str | None, out: Path, size: Sizes
) -> Record:
    from mnemon.cli.environment import environment
    from mnemon.memory.grc.experiments.arms import chosen_arms
    from mnemon.memory.grc.experiments.record import Plan, Record
    from mnemon.memory.grc.experiments.tasks import make_task

    names = None if arms is None else [word.strip() for word in arms.split(",") if word.strip()]
    if names == []:
        raise LearnedMemoryError(f"--arms {arms!r} came; names such as grc-paper,fifo are expected")
    chosen = chosen_arms(name, names)
    task = make_task(name, size.value)
    plan = Plan(
        task=name,
        size=size.value,
        arms=tuple(arm.name for arm in chosen),
        seeds=seeds or task.num_seeds,
        steps=steps or task.scale.steps,
        scale=task.scale.as_dict(),
    )
    found = environment("scikit-learn", "scipy") | {"threads_per_run": 1}
    return Record(plan=plan, path=out / f"grc_{name}.json", facts=task.facts(), environment=found)


def _do(record: Record, jobs: int | None, *, quiet: bool) -> None:
    from mnemon.cli.memory.progress import bar
    from mnemon.memory.grc.experiments.runner import run_all

    missing = len(record.missing())
    steps = record.plan.steps
    with bar(record.plan.task, missing * steps, quiet=quiet) as shown:

        def done(result: Any) -> None:
            left = len(record.missing())
            shown.say(f"{result.arm}, seed {result.seed}: {result.score:.4f}; {left} runs to go")

        run_all(record, jobs or _usual_jobs(), shown.advance, done)


def _usual_jobs() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
