"""`mnemon diffusion demo`: every method from the same noise, beside the uncached images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mnemon.cli import output
from mnemon.cli.diffusion.sources import Device, Pipe, Threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mnemon.cli.diffusion.measure import Outcome

PAGE, PICTURE = "diffusion.html", "diffusion.png"
_COLUMNS = 8


def command(
    pipe: Pipe = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, max=256, help="Images from each method.")
    ] = 16,
    steps: Annotated[int, typer.Option("--steps", min=2, max=1000, help="Of the sampler.")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed turns of each.")] = 3,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="One more: 'taylor(order=2, interval=4)'; repeatable."),
    ] = None,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="1: none.")] = 2.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help=f"Folder for {PAGE} and {PICTURE}.")
    ] = Path("."),
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the same images with every caching method, and set them side by side.

    Everything starts from the same noise, the methods take turns while they are timed, and PSNR is
    against the uncached images. Prints a table and writes diffusion.html, which needs no network.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    output.check_writable(out)

    from mnemon.cli.diffusion import record, settings
    from mnemon.cli.diffusion.measure import Studio, Task
    from mnemon.cli.diffusion.progress import bar
    from mnemon.cli.diffusion.quiet import quiet_diffusers
    from mnemon.cli.diffusion.sources import load
    from mnemon.cli.environment import environment

    chosen = [*settings.showcase(steps), *(settings.of_method(text) for text in method or ())]
    with bar("loading torch and the pipeline", None, quiet=as_json) as start:
        start("loading torch and the pipeline")
        loaded = load(pipe, device=device, threads=threads)
    learned, notes = settings.learned(loaded.folder, steps, every=False)
    chosen += learned
    task = Task(steps=steps, samples=samples, batch=samples, guidance=guidance, seed=seed)
    studio = Studio(loaded.pipe, task, loaded.num_classes)
    units = len(chosen) * (rounds + 1) + 1
    with quiet_diffusers(), bar("demo", units, quiet=as_json) as progress:
        outcomes = studio.quality(chosen, progress, keep=_COLUMNS)
        studio.clock(outcomes, rounds, progress)
    found = {
        "command": "diffusion demo",
        "pipe": loaded.facts,
        "settings": {
            **{"steps": steps, "samples": samples, "rounds": rounds},
            **{"guidance": guidance, "seed": seed},
        },
        "environment": environment("diffusers", "cache-dit"),
        "notes": notes,
        "results": record.rows([outcomes]),
        "report": str(out / PAGE),
    }
    _write(found, outcomes, out)
    if as_json:
        output.print_json(found)
    else:
        _show(found)


def _note(found: dict[str, Any]) -> str:
    chosen = found["settings"]
    return (
        f"{chosen['samples']} images, {chosen['steps']} steps, guidance {chosen['guidance']:g}. s: "
        f"median of {chosen['rounds']} rounds in turn. calls, MACs: the share of attentions and "
        "MLPs, of multiply-accumulates, that was computed. PSNR: to the uncached images of the "
        "same noise, in dB; higher is nearer. held: features kept at most."
    )


def _show(found: dict[str, Any]) -> None:
    from mnemon.cli.diffusion import tables

    console = tables.console()
    console.print(f"\n{tables.title(found['pipe'], found['environment'])}", style="bold")
    tables.show_rows(console, found["results"], tables.columns(found["results"]))
    for line in (_note(found), *found["notes"]):
        console.print(line, style="dim")
    console.print(f"report: [bold]{found['report']}[/]", soft_wrap=True)


def _write(found: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> None:
    from mnemon.cli.diffusion import charts, pages, pictures, tables
    from mnemon.cli.diffusion.record import AXES

    rows = found["results"]
    running = [row for row in rows if row["error"] is None]
    by_name = {row["name"]: row for row in rows}
    strips = [
        pictures.Strip(o.setting.name, pictures.caption(by_name[o.setting.name]), o.images)
        for o in outcomes
        if o.images is not None and by_name[o.setting.name]["error"] is None
    ]
    picture = pictures.grid(strips)
    families = list(dict.fromkeys(row["family"] for row in rows if row["library"]))
    drawings = [
        (
            f"Quality against {word}",
            charts.svg(charts.quality(rows, axis, families, title=f"Quality against {word}")),
        )
        for axis, word in AXES.items()
    ]
    keys = tables.columns(rows)
    table = pages.Table(
        headings=["", *keys.values()],
        rows=[[row["name"], *tables.cells(row, list(keys))] for row in running],
        ours=frozenset(i for i, row in enumerate(running) if row["library"]),
    )
    page = pages.page(
        kicker="mnemon diffusion demo",
        heading="The same noise, with and without a cache between denoising steps",
        lede="A diffusion transformer is called once for each step, and from step to step most of "
        "what it computes changes little. A cache reuses or continues it. Here each method made "
        "the same images from the same noise; everything on this page was measured in one run.",
        tiles=_tiles(running),
        sections=[
            pages.Section(
                title="The images",
                text="The uncached first, then each method's, and at the right what it changed.",
                picture=picture,
            ),
            pages.Section(title="Every method", tables=[table], lines=[_note(found)]),
            pages.Section(
                title="Quality against cost",
                text="Up and to the left is better; the dashed black line is fewer steps.",
                charts=drawings,
                lines=[*tables.notes(rows), *found["notes"]],
            ),
        ],
        environment={"pipeline": found["pipe"]["name"], **found["environment"]},
    )
    pages.write_files(folder, {PICTURE: picture, PAGE: page})


def _tiles(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The nearest among those that save most of the time, and fewer steps beside it."""
    from mnemon.cli.wording import times

    made = []
    cached = [row for row in rows if row["library"] and row["psnr"] is not None]
    for least in (1.5, 2.0):
        fast = [row for row in cached if row["speedup"] >= least]
        if fast:
            best = max(fast, key=lambda row: row["psnr"])
            made.append(
                (times(best["speedup"]), f"as fast at {best['psnr']:.1f} dB: {best['name']}")
            )
    plain = [row for row in rows if not row["library"] and row["psnr"] is not None]
    made += [
        (times(row["speedup"]), f"as fast at {row['psnr']:.1f} dB: {row['name']}") for row in plain
    ]
    return list(dict.fromkeys(made))
