"""`mnemon diffusion fit`: a plan for the method `fitted`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.diffusion.sources import Device, Threads
from mnemon.errors import DiffusionError

if TYPE_CHECKING:
    from torch import Tensor

    from mnemon.cli.diffusion.sources import Loaded
    from mnemon.diffusion.methods.fitted import Plan

_CALIBRATION_SEED = 20_261  # other noise than that of demo, bench and eval


def command(
    pipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PIPE]", help="Folder of a saved DiTPipeline; nothing for the bundled one."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write. [default: plan-STEPS-COMPUTE.safetensors, which demo, bench "
            "and eval find beside PIPE]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Of the sampler.")] = 20,
    compute: Annotated[int, typer.Option("--compute", min=1, help="Steps to compute.")] = 10,
    history: Annotated[
        int, typer.Option("--history", min=1, help="Computed steps a prediction looks back on.")
    ] = 3,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Calibration images.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="Passes over the steps that may be moved.")
    ] = 2,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="1: none.")] = 2.0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Choose which steps to compute, and fit the prediction of the others.

    Use it with attach(pipe, "fitted", plan=FILE), for the same pipeline, sampler and number of
    steps.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted: no file then.
    """
    if compute >= steps:
        raise DiffusionError(
            f"--compute {compute} of {steps} steps came; fewer than --steps are computed, or "
            "nothing is saved"
        )
    target = Path(f"plan-{steps}-{compute}.safetensors") if out is None else out.expanduser()

    from mnemon.cli.diffusion.sources import check_file, load

    check_file(target)
    loaded = load(pipe, device=device, threads=threads)
    begin = time.perf_counter()
    plan, tried, first = _search(
        loaded, steps, compute, history, samples, rounds, guidance, quiet=as_json
    )
    plan.save(target)
    facts = {
        "command": "diffusion fit",
        "plan": str(target),
        "pipe": loaded.facts,
        "steps": steps,
        "computed": [step for step, done in enumerate(plan.computed) if done],
        "history": history,
        "samples": samples,
        "psnr": plan.psnr,
        "psnr_evenly_spread": first,
        "tried": tried,
        "size_bytes": target.stat().st_size,
        "seconds": time.perf_counter() - begin,
    }
    if as_json:
        output.print_json(facts)
    else:
        _show(facts, str(plan))


def _search(
    loaded: Loaded,
    steps: int,
    compute: int,
    history: int,
    samples: int,
    rounds: int,
    guidance: float,
    *,
    quiet: bool,
) -> tuple[Plan, int, float]:
    """The best plan, how many were tried, and the PSNR of evenly spread steps."""
    from mnemon.cli.diffusion.measure import Studio, Task
    from mnemon.cli.diffusion.progress import bar
    from mnemon.cli.diffusion.quiet import quiet_diffusers
    from mnemon.cli.diffusion.settings import uncached
    from mnemon.diffusion.fitting import Fitter, profiles

    task = Task(
        steps=steps, samples=samples, batch=samples, guidance=guidance, seed=_CALIBRATION_SEED
    )
    studio = Studio(loaded.pipe, task, loaded.num_classes)

    def run(_: Any) -> Tensor:
        return studio.run(uncached()).images

    best: Plan | None = None
    tried, first = 0, float("nan")
    most = 1 + len(profiles(steps, compute)) + rounds * 2 * compute
    with quiet_diffusers(), bar("fit", most, quiet=quiet) as progress:
        progress("the uncached images")
        fitter = Fitter(loaded.pipe, run, history=history)
        for plan, better in fitter.search(compute, rounds=rounds):
            tried += 1
            if better:
                best = plan
                first = plan.psnr if tried == 1 else first
            assert best is not None
            progress(f"{tried} plans tried, best {best.psnr:.2f} dB")
    assert best is not None
    return best, tried, first


def _show(facts: dict[str, Any], plan: str) -> None:
    from mnemon.cli.diffusion import tables

    console = tables.console()
    console.print(f"{plan}   (x: computed)")
    console.print(
        f"{len(facts['computed'])} of {facts['steps']} steps, history {facts['history']}: "
        f"[bold]{facts['psnr']:.2f} dB[/] on {facts['samples']} calibration images "
        f"({facts['psnr_evenly_spread']:.2f} with evenly spread steps; {facts['tried']} plans "
        f"tried in {facts['seconds']:.0f} s)"
    )
    size = output.format_bytes(facts["size_bytes"])
    console.print(f"wrote [bold]{facts['plan']}[/], {size}", soft_wrap=True)
