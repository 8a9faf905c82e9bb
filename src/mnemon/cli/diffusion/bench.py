"""`mnemon diffusion bench`: seconds, multiply-accumulates and bytes held, by method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.diffusion.sources import Device, Pipe, Threads
from mnemon.errors import DiffusionError


def command(
    pipe: Pipe = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only this and the uncached: 'taylor(order=1)'; repeatable."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The whole grid of eval.")] = False,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="A contenders.py with other packages' caches, or its folder."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Of all these, with this word in their name; repeatable."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Images in each turn, in one batch.")
    ] = 16,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Of the sampler.")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns that each takes.")] = 5,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="1: none.")] = 2.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write bench.html, .md, .json and charts here."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """How long each method takes, what it computes and what it keeps in memory.

    All settings take turns in one process, every other round in reverse; the figures are medians.
    MACs are counted in a run of their own, below whatever a cache replaces.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    if out is not None:
        output.check_writable(out)

    from mnemon.cli.diffusion import bench_report, record, settings
    from mnemon.cli.diffusion.measure import Studio, Task
    from mnemon.cli.diffusion.progress import bar
    from mnemon.cli.diffusion.quiet import quiet_diffusers
    from mnemon.cli.diffusion.sources import load
    from mnemon.cli.environment import environment

    notes: list[str] = []
    loaded = load(pipe, device=device, threads=threads)
    if method:
        chosen = [settings.of_method(text) for text in method]
    else:
        chosen = settings.grid(steps) if every else settings.showcase(steps)
        learned, notes = settings.learned(loaded.folder, steps, every=every)
        chosen += learned
    if peers is not None:
        from mnemon.cli.diffusion.peers import load_peers

        chosen += load_peers(peers, steps)
    if only:
        chosen = [each for each in chosen if any(word in each.name for word in only)]
    if not chosen:
        raise DiffusionError(f"no name has {' or '.join(only or ())} in it; try without --only")
    chosen = list({each.name: each for each in chosen}.values())
    task = Task(steps=steps, samples=samples, batch=samples, guidance=guidance, seed=seed)
    studio = Studio(loaded.pipe, task, loaded.num_classes)
    units = len(chosen) * (rounds + 1) + 1
    with quiet_diffusers(), bar("bench", units, quiet=as_json) as progress:
        outcomes = studio.quality(chosen, progress)
        studio.clock(outcomes, rounds, progress)
    found: dict[str, Any] = {
        "command": "diffusion bench",
        "pipe": loaded.facts,
        "settings": {
            **{"steps": steps, "samples": samples, "rounds": rounds},
            **{"guidance": guidance, "seed": seed},
        },
        "environment": environment("diffusers", "cache-dit"),
        "notes": notes,
        "results": record.rows([outcomes]),
    }
    if out is not None:
        bench_report.write(found, out)
    if as_json:
        output.print_json(found)
    else:
        bench_report.show(found, out)
