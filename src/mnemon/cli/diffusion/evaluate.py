"""`mnemon diffusion eval`: quality at equal cost, by family of methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.diffusion.sources import Device, Loaded, Pipes, Threads
from mnemon.errors import DiffusionError

if TYPE_CHECKING:
    from mnemon.cli.diffusion.measure import Outcome, Progress, Task
    from mnemon.cli.diffusion.settings import Setting
    from mnemon.diffusion.digits.classifier import Classifier

PICTURES = 8


def command(
    pipes: Pipes = None,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="A contenders.py with other packages' caches, or its folder."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Images for the quality.")
    ] = 128,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Of the sampler.")] = 20,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images at a time.")] = 64,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="Timed turns of each setting; 0 times nothing.")
    ] = 3,
    timed: Annotated[
        int, typer.Option("--timed", min=1, help="Images made in each timed turn.")
    ] = 16,
    costs: Annotated[
        str, typer.Option("--at", help="Shares of the uncached cost at which families compete.")
    ] = "0.35,0.5,0.7",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only families with this word in their name; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="One more setting: 'taylor(order=2)'; repeatable."),
    ] = None,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="1: none.")] = 2.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for eval.html, .md, .json and charts.")
    ] = Path("diffusion-eval"),
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """What every family of methods makes of the same noise, at equal cost.

    PSNR is against the uncached images of the same noise (they span 2). The line to beat is the
    same sampler with fewer steps. On the digits, images are also judged by a classifier. Several
    PIPEs are training seeds: means and standard deviations over them.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    shares = _shares(costs)
    output.check_writable(out)

    from mnemon.cli.diffusion import settings as known
    from mnemon.cli.diffusion.measure import Task
    from mnemon.cli.diffusion.sources import load_all

    loaded = load_all(pipes, device=device, threads=threads)
    task = Task(
        steps=steps, samples=samples, batch=min(batch, samples), guidance=guidance, seed=seed
    )
    extra = [known.of_method(text) for text in method or ()]
    common = _distinct([*known.grid(steps), *extra])
    if peers is not None:
        from mnemon.cli.diffusion.peers import load_peers

        common += load_peers(peers, steps)
    lists, notes = _own(common, loaded, steps, only)
    units = sum(len(each) * (rounds + 1) + 2 for each in lists)
    record = _evaluate(loaded, lists, task, rounds, timed, units, quiet=as_json)
    record |= {"notes": notes}
    from mnemon.cli.diffusion import evaluate_report
    from mnemon.cli.diffusion import record as numbers

    record["at_cost"] = numbers.at_cost(record["results"], shares, len(loaded))
    evaluate_report.write(record, record.pop("pictures"), out)
    if as_json:
        output.print_json(record)
    else:
        evaluate_report.show(record, out)


def _shares(text: str) -> list[float]:
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise typer.BadParameter(f"{text!r}: expected shares between 0 and 1, as in 0.35,0.5,0.7")
    return found


def _distinct(settings: Sequence[Setting]) -> list[Setting]:
    return list({setting.name: setting for setting in settings}.values())


def _own(
    common: Sequence[Setting], loaded: Sequence[Loaded], steps: int, only: list[str] | None
) -> tuple[list[list[Setting]], list[str]]:
    """For each pipeline the common settings and those learned for it."""
    from mnemon.cli.diffusion.settings import FEWER_STEPS, learned

    lists, notes = [], []
    for each in loaded:
        own, missing = learned(each.folder, steps, every=True)
        notes += [f"{each.name}: {line}" for line in missing]
        chosen = [
            setting
            for setting in [*common, *own]
            if only is None
            or setting.family == FEWER_STEPS
            or any(word in setting.family for word in only)
        ]
        lists.append(chosen)
    if all(len(chosen) == sum(s.family == FEWER_STEPS for s in chosen) for chosen in lists):
        raise DiffusionError(f"no family has {' or '.join(only or ())} in its name; try without")
    return lists, notes


def _evaluate(
    loaded: Sequence[Loaded],
    lists: Sequence[Sequence[Setting]],
    task: Task,
    rounds: int,
    timed: int,
    units: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from mnemon.cli.diffusion import record as numbers
    from mnemon.cli.diffusion.progress import bar
    from mnemon.cli.diffusion.quiet import quiet_diffusers
    from mnemon.cli.environment import environment

    by_pipe: list[list[Outcome]] = []
    with quiet_diffusers(), bar("eval", units, quiet=quiet) as progress:
        classifier = _classifier(loaded[0])
        for each, settings in zip(loaded, lists, strict=True):
            by_pipe.append(_one(each, settings, task, rounds, timed, classifier, progress))
    results = numbers.rows(by_pipe)
    return {
        "command": "diffusion eval",
        "pipes": [each.facts for each in loaded],
        "settings": {
            **{name: getattr(task, name) for name in ("steps", "samples", "batch", "guidance")},
            "seed": task.seed,
            "rounds": rounds,
            "timed_samples": timed,
        },
        "environment": environment("diffusers", "cache-dit"),
        "classifier_accuracy": None if classifier is None else classifier.accuracy,
        "floor": results[0]["distance"],  # the uncached images, against those of other noise
        "results": results,
        "pictures": by_pipe[0],
    }


def _classifier(loaded: Loaded) -> Classifier | None:
    if not loaded.digits:
        return None
    from mnemon.diffusion.digits.classifier import train_classifier

    return train_classifier()


def _one(
    loaded: Loaded,
    settings: Sequence[Setting],
    task: Task,
    rounds: int,
    timed: int,
    classifier: Classifier | None,
    progress: Progress,
) -> list[Outcome]:
    """All settings on one pipeline: quality first, then seconds."""
    from mnemon.cli.diffusion.judging import Judge
    from mnemon.cli.diffusion.measure import Studio
    from mnemon.cli.diffusion.settings import uncached

    studio = Studio(loaded.pipe, task, loaded.num_classes)
    judge = None
    progress(f"{loaded.name}: other noise")
    if classifier is not None:
        others = studio.at(seed=task.seed + 1).run(uncached()).images
        judge = Judge(classifier, studio.labels, others)

    def named(doing: str) -> None:
        progress(f"{loaded.name}: {doing}")

    outcomes = studio.quality(settings, named, judge=judge, keep=PICTURES)
    if rounds:
        studio.at(samples=timed, batch=min(timed, task.batch)).clock(outcomes, rounds, named)
    return outcomes
