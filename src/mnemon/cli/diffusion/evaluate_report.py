"""What `mnemon diffusion eval` shows and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli.diffusion import charts, pages, pictures, tables
from mnemon.cli.diffusion.record import AXES, working
from mnemon.cli.diffusion.settings import FEWER_STEPS, UNCACHED

if TYPE_CHECKING:
    from mnemon.cli.diffusion.measure import Outcome

__all__ = ["show", "write"]

_STRIPS = 14


def show(found: dict[str, Any], out: Path) -> None:
    """Prints what is best at equal cost."""
    console = tables.console()
    console.print(f"\n{_heading(found)}", style="bold")
    tables.show_costs(console, found["at_cost"])
    for line in _verdicts(found):
        console.print(line)
    for line in (*_facts(found), *found["notes"]):
        console.print(line, style="dim")
    broken = [row for row in found["results"] if row["error"]]
    if broken:
        console.print(f"{len(broken)} settings could not run; eval.md says why", style="dim")
    console.print(f"report: [bold]{out / 'eval.html'}[/], eval.md, eval.json, charts beside it")


def _heading(found: dict[str, Any]) -> str:
    pipes = found["pipes"]
    text = tables.title(pipes[0], found["environment"])
    return text if len(pipes) == 1 else f"{len(pipes)} training seeds · {text}"


def _facts(found: dict[str, Any]) -> Iterator[str]:
    chosen = found["settings"]
    seeds = f", mean ± sd over {len(found['pipes'])} pipelines" if len(found["pipes"]) > 1 else ""
    yield (
        f"PSNR to the uncached images of the same noise (they span 2){seeds}: {chosen['samples']} "
        f"images, {chosen['steps']} steps, guidance {chosen['guidance']:g}. In brackets: over "
        "fewer steps at the same cost. Between two settings of a family, values are interpolated."
    )
    if chosen["rounds"]:
        yield (
            f"Seconds: medians of {chosen['rounds']} rounds of {chosen['timed_samples']} images, "
            "the settings in turn."
        )
    if found["classifier_accuracy"] is not None:
        distance = "-" if found["floor"] is None else f"{found['floor']:.3g}"
        yield (
            f"Classifier of digits: {found['classifier_accuracy']:.1%} on held-out images. "
            f"Feature distance of two uncached sets of different noise (the floor): {distance}."
        )


def _verdicts(found: dict[str, Any]) -> Iterator[str]:
    """Who wins where, a line for each cost."""
    for table in found["at_cost"]:
        ranked = table["families"]
        where = f"{table['cost']:g} of the {AXES[table['axis']]}"
        if not ranked:
            yield f"At {where}: no family gets that cheap."
            continue
        first = ranked[0]
        line = f"At {where}: {first['family']} ({first['psnr']:.1f} dB)"
        if len(ranked) > 1:
            second = ranked[1]
            line += f", {first['psnr'] - second['psnr']:.1f} dB before {second['family']}"
            ahead = sum(a > b for a, b in zip(first["by_pipe"], second["by_pipe"], strict=True))
            if len(first["by_pipe"]) > 1:
                line += f" ({ahead} of {len(first['by_pipe'])} pipelines)"
        ours = next((e for e in ranked if e["library"] == "mnemon"), None)
        theirs = next((e for e in ranked if e["library"] not in ("", "mnemon")), None)
        if ours is not None and theirs is not None:
            line += f"; best of mnemon {ours['psnr']:.1f}, of others {theirs['psnr']:.1f}"
            line += f" ({theirs['family']})"
        yield line + "."


def write(found: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes eval.json, eval.md, eval.html, its charts and pictures.

    Raises:
        OutputError: the folder cannot be made.
        FileError: a file cannot be written.
    """
    figures = _charts(found)
    picture = _picture(found, outcomes)
    files: dict[str, str | bytes | dict[str, Any]] = {"eval.json": found}
    drawings = []
    for name, title, figure in figures:
        files[f"{name}.png"] = charts.png(figure)
        drawings.append((title, charts.svg(figure)))
    files["samples.png"] = picture
    files["eval.md"] = _markdown(found)
    files["eval.html"] = _page(found, drawings, picture)
    pages.write_files(folder, files)


def _charts(found: dict[str, Any]) -> list[tuple[str, str, Any]]:
    rows = found["results"]
    ours = list(dict.fromkeys(r["family"] for r in rows if r["library"] == "mnemon"))
    theirs = list(dict.fromkeys(r["family"] for r in rows if r["library"] not in ("", "mnemon")))
    made = []
    for axis, word in AXES.items():
        if not any(row[axis] is not None for row in working(rows)):
            continue
        short = word.lower().replace("-", "_")
        title = f"Quality against {word}"
        made.append((f"psnr_{short}", title, charts.quality(rows, axis, ours, title=title)))
        if theirs:
            best = _leaders(found, axis, ours)
            title = f"Other packages against {word}"
            figure = charts.quality(rows, axis, [*theirs, *best], title=title)
            made.append((f"psnr_{short}_peers", title, figure))
    if any(row["time_share"] is not None for row in rows):
        made.append(("costs", "Seconds against MACs", charts.costs(rows)))
    return made


def _leaders(found: dict[str, Any], axis: str, ours: Sequence[str]) -> list[str]:
    """Our families that lead at some cost, to stand beside the others."""
    leading = []
    for table in found["at_cost"]:
        if table["axis"] == axis:
            names = [entry["family"] for entry in table["families"] if entry["family"] in ours]
            leading += names[:1]
    return list(dict.fromkeys(leading))


def _picture(found: dict[str, Any], outcomes: Sequence[Outcome]) -> bytes:
    """Of each family the setting that is best at about half the cost."""
    by_name = {row["name"]: row for row in found["results"]}
    chosen = [UNCACHED]
    ranked: dict[str, tuple[float, str]] = {}
    for row in working(found["results"]):
        # Cheap enough comes first, then quality.
        worth = row["psnr"] if row["macs_share"] <= 0.52 else row["psnr"] - 1000
        if worth > ranked.get(row["family"], (-1e9, ""))[0]:
            ranked[row["family"]] = (worth, row["name"])
    plain = ranked.pop(FEWER_STEPS, None)
    chosen += [plain[1]] if plain else []
    chosen += [name for _, name in sorted(ranked.values(), reverse=True)[:_STRIPS]]
    images = {outcome.setting.name: outcome.images for outcome in outcomes}
    strips = []
    for name in chosen:
        strip = images.get(name)
        if strip is not None:
            strips.append(pictures.Strip(name, pictures.caption(by_name[name]), strip))
    return pictures.grid(strips)


def _markdown(found: dict[str, Any]) -> str:
    keys = tables.columns(found["results"])
    parts = [f"# {_heading(found)}", "", *(f"- {line}" for line in _verdicts(found)), ""]
    for axis, word in AXES.items():
        headings, lines = tables.cost_grid(found["at_cost"], axis)
        if lines:
            bold = [[f"**{w[:-1]}**" if w.endswith("*") else w for w in line] for line in lines]
            parts += [f"## Best PSNR within a share of the uncached {word}", ""]
            parts += [tables.markdown_table(["family", *headings], bold), ""]
    parts += ["## Every setting", ""]
    parts += [
        tables.markdown_table(
            ["setting", *keys.values()],
            [[row["name"], *tables.cells(row, list(keys))] for row in _running(found)],
        ),
        "",
    ]
    parts += [f"- {line}" for line in (*tables.notes(found["results"]), *found["notes"])]
    facts = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    return "\n".join([*parts, "", *_facts(found), "", "; ".join(facts) + ".", ""])


def _running(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["error"] is None]


def _page(found: dict[str, Any], drawings: Sequence[tuple[str, str]], picture: bytes) -> str:
    keys = tables.columns(found["results"])
    running = _running(found)
    libraries = {row["family"]: row["library"] for row in running}
    at_cost = []
    for axis, word in AXES.items():
        headings, lines = tables.cost_grid(found["at_cost"], axis)
        if lines:
            ours = frozenset(i for i, w in enumerate(lines) if libraries[w[0]] == "mnemon")
            at_cost.append(pages.Table(headings=[f"by {word}", *headings], rows=lines, ours=ours))
    sections = [
        pages.Section(
            title="Best at equal cost",
            text="The best PSNR that each family reaches within a share of what the uncached run "
            "costs, in multiply-accumulates and in seconds. In brackets: decibels over the same "
            "sampler with fewer steps at that cost.",
            tables=at_cost,
            lines=list(_verdicts(found)),
        ),
        pages.Section(
            title="Quality against cost",
            text="Up and to the left is better. Lines join the settings of a family that nothing "
            "cheaper in it is as good as; the dashed black line is fewer steps.",
            charts=drawings,
        ),
        pages.Section(
            title="The images",
            text="Of each family the best setting at about half the cost, from the same noise.",
            picture=picture,
        ),
        pages.Section(
            title="Every setting",
            tables=[
                pages.Table(
                    headings=["setting", *keys.values()],
                    rows=[[row["name"], *tables.cells(row, list(keys))] for row in running],
                    ours=frozenset(i for i, r in enumerate(running) if r["library"] == "mnemon"),
                )
            ],
            lines=[*_facts(found), *tables.notes(found["results"]), *found["notes"]],
        ),
    ]
    return pages.page(
        kicker="mnemon diffusion eval",
        heading="What caching between denoising steps costs in quality",
        lede=_heading(found),
        tiles=_tiles(found),
        sections=sections,
        environment=found["environment"],
    )


def _tiles(found: dict[str, Any]) -> list[tuple[str, str]]:
    made = []
    for table in found["at_cost"]:
        if table["families"]:
            first = table["families"][0]
            gain = "" if first["gain"] is None else f", {first['gain']:+.1f} over fewer steps"
            made.append(
                (
                    f"{first['psnr']:.1f} dB",
                    f"at {table['cost']:g} of the {AXES[table['axis']]}: {first['family']}{gain}",
                )
            )
    return made
