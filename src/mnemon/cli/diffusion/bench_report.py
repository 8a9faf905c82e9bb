"""What `mnemon diffusion bench` shows and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemon.cli.diffusion import charts, pages, tables

__all__ = ["show", "write"]


def _note(found: dict[str, Any]) -> str:
    chosen = found["settings"]
    return (
        f"{chosen['samples']} images, {chosen['steps']} steps, guidance {chosen['guidance']:g}. s: "
        f"median of {chosen['rounds']} rounds in turn. calls, MACs: the share of attentions and "
        "MLPs, of multiply-accumulates, that was computed. PSNR: to the uncached images of the "
        "same noise, in dB. held: features kept at most (other packages do not say)."
    )


def show(found: dict[str, Any], out: Path | None) -> None:
    """Prints the table."""
    console = tables.console()
    console.print(f"\n{tables.title(found['pipe'], found['environment'])}", style="bold")
    tables.show_rows(console, found["results"], tables.columns(found["results"]))
    for line in (_note(found), *found["notes"]):
        console.print(line, style="dim")
    if out is not None:
        console.print(f"wrote {out / 'bench.html'}, bench.md, bench.json and charts beside it")


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes bench.json, bench.md, bench.html and charts.

    Raises:
        OutputError: the folder cannot be made.
        FileError: a file cannot be written.
    """
    rows = found["results"]
    running = [row for row in rows if row["error"] is None]
    keys = tables.columns(rows)
    lines = [[row["name"], *tables.cells(row, list(keys))] for row in running]
    figures = {"costs": ("Seconds against computation", charts.costs(rows))}
    if any(row["peak_bytes"] for row in running):
        figures["held"] = ("Features held", charts.held(rows))
    files: dict[str, str | bytes | dict[str, Any]] = {"bench.json": found}
    files |= {f"{name}.png": charts.png(figure) for name, (_, figure) in figures.items()}
    title = tables.title(found["pipe"], found["environment"])
    facts = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    remarks = [*tables.notes(rows), *found["notes"]]
    files["bench.md"] = "\n".join(
        [
            *(f"# {title}", "", tables.markdown_table(["setting", *keys.values()], lines), ""),
            *(_note(found), "", *(f"- {line}" for line in remarks), ""),
            "; ".join(facts) + ".\n",
        ]
    )
    files["bench.html"] = pages.page(
        kicker="mnemon diffusion bench",
        heading="What caching between denoising steps saves",
        lede=title,
        tiles=[],
        sections=[
            pages.Section(
                title="Charts",
                text="On the dotted line, seconds shrink as computation does; above it a method "
                "has costs of its own.",
                charts=[(name, charts.svg(figure)) for name, figure in figures.values()],
            ),
            pages.Section(
                title="Every figure",
                tables=[
                    pages.Table(
                        headings=["setting", *keys.values()],
                        rows=lines,
                        ours=frozenset(
                            i for i, row in enumerate(running) if row["library"] == "mnemon"
                        ),
                    )
                ],
                lines=[_note(found), *remarks],
            ),
        ],
        environment=found["environment"],
    )
    pages.write_files(folder, files)
