"""`mnemon diffusion train-router`: a router for the method `l2c`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.diffusion.sources import Device, Pipe, Threads

if TYPE_CHECKING:
    from mnemon.cli.diffusion.sources import Loaded
    from mnemon.diffusion.router_training import RouterTrainer

_CALIBRATION_SEED = 30_261  # other noise than that of demo, bench and eval


def command(
    pipe: Pipe = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write; a picture of the schedule goes beside it. [default: "
            "router-STEPS.safetensors, which demo, bench and eval find beside PIPE]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Of the sampler.")] = 20,
    share: Annotated[
        float,
        typer.Option(
            "--share", min=0, max=1, help="Of the cache steps' attentions and MLPs, computed."
        ),
    ] = 0.5,
    train_steps: Annotated[
        int, typer.Option("--train-steps", min=1, help="Steps of the optimiser.")
    ] = 400,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Recorded runs to learn from.")] = 4,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Images in each.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the training.")] = 0,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="1: none.")] = 2.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Learn which attentions and MLPs every other step may reuse.

    Use it with attach(pipe, "l2c", router=FILE), for the same pipeline, sampler and number of
    steps. A run that is interrupted leaves a checkpoint beside the file, for --resume.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted: no router then.
    """
    target = Path(f"router-{steps}.safetensors") if out is None else out.expanduser()

    from mnemon.cli.diffusion.progress import bar
    from mnemon.cli.diffusion.quiet import quiet_diffusers
    from mnemon.cli.diffusion.sources import check_file, load
    from mnemon.diffusion.router_training import RouterOptions, train

    check_file(target)
    options = RouterOptions(steps=train_steps, share=share, seed=seed)
    loaded = load(pipe, device=device, threads=threads)
    begin = time.perf_counter()
    trained: list[float] = []
    with quiet_diffusers(), bar("train-router", train_steps + 1, quiet=as_json) as progress:
        progress(f"recording {runs} runs")

        def after_step(trainer: RouterTrainer) -> None:
            trained[:] = [trainer.loss]
            progress(f"error {trainer.loss:.2e}")

        router = train(
            loaded.pipe,
            _runs(loaded, steps, runs, samples, guidance),
            target,
            options,
            resume=resume,
            after_step=after_step,
        )
    facts = {
        "command": "diffusion train-router",
        "router": str(target),
        "picture": str(target.with_suffix(".png")),
        "pipe": loaded.facts,
        "steps": steps,
        "train_steps": train_steps,
        "computed_share": sum(map(sum, router.computes())) / router.scores.numel(),
        "threshold": router.threshold,
        "error": trained[0] if trained else None,
        "seconds": time.perf_counter() - begin,
    }
    if as_json:
        output.print_json(facts)
    else:
        print(f"{router}; {train_steps} optimiser steps in {facts['seconds']:.0f} s")
        print(f"wrote {target} and {facts['picture']}")


def _runs(
    loaded: Loaded, steps: int, runs: int, samples: int, guidance: float
) -> list[Callable[[Any], Any]]:
    """Runs of the pipeline, each from noise of its own."""
    from mnemon.cli.diffusion.measure import Studio, Task
    from mnemon.cli.diffusion.settings import uncached

    def calibration(number: int) -> Callable[[Any], Any]:
        task = Task(
            steps=steps,
            samples=samples,
            batch=samples,
            guidance=guidance,
            seed=_CALIBRATION_SEED + number,
        )
        studio = Studio(loaded.pipe, task, loaded.num_classes)
        return lambda _: studio.run(uncached())

    return [calibration(number) for number in range(runs)]
