"""`mnemon inspect`: what a saved cache holds, read from its header (no torch, no model)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli import output

if TYPE_CHECKING:
    from mnemon.files import FileSummary


def command(
    file: Annotated[Path, typer.Argument(help="A file that cache.save or --save-cache wrote.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare the checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a saved cache holds: tokens, recipe, model, layers and bytes.

    Says clearly what a file is that is no whole cache, and exits with 1.
    """
    from mnemon.files import read_summary

    summary = read_summary(file, verify=verify)
    if as_json:
        output.print_json(summary.to_dict())
    else:
        _show(summary)


def _show(summary: FileSummary) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(summary):
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers")
    table.add_column("how many", justify="right")
    table.add_column("bytes", justify="right")
    for layer in summary.layers:
        table.add_row(layer.kind, str(layer.count), output.format_bytes(layer.nbytes))
    total = sum(layer.nbytes for layer in summary.layers)
    table.add_section()
    count = sum(layer.count for layer in summary.layers)
    table.add_row("all", str(count), output.format_bytes(total), style="bold")
    console.print(table)


def _facts(summary: FileSummary) -> list[tuple[str, str]]:
    rows, tokens = summary.batch_size, summary.num_tokens
    known = "all" if summary.num_known_tokens == tokens else f"{summary.num_known_tokens:,}"
    model = summary.model_name or "a model that was not named"
    weights = "" if summary.has_weights_hash else ", weights not recorded"
    checked = {
        True: "every checksum compared: whole and undamaged",
        None: "header only; --verify reads everything",
    }
    return [
        ("file", f"{summary.path} ({output.format_bytes(summary.file_bytes)})"),
        ("model", f"{model} ({summary.model_type}, {summary.dtype}{weights})"),
        ("recipe", summary.recipe),
        ("tokens", f"{tokens:,} x {rows} {'row' if rows == 1 else 'rows'}, {known} known by id"),
        ("written by", f"mnemon {summary.mnemon_version}, format {summary.format_version}"),
        ("checked", checked.get(summary.is_verified, "no")),
    ]
