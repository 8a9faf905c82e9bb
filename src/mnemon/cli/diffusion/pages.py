"""Result files: a page, its charts and pictures, JSON, Markdown; each whole or not at all."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.cli.output import OutputError

if TYPE_CHECKING:
    from mnemon.files.atomic import Writer

__all__ = ["Section", "Table", "page", "write_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a page; the first column is text.

    Args:
        rows: cells of each; one that ends with a star is the best of its column.
        ours: indices of the rows that are mnemon's.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[tuple[str, str]] = ()  # what it shows, and its SVG
    picture: bytes | None = None  # a PNG
    lines: Sequence[str] = field(default=())


def page(
    *,
    kicker: str,
    heading: str,
    lede: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    environment: Mapping[str, Any],
) -> str:
    """One self-contained page of HTML: nothing is fetched, nothing runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("mnemon.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["trusted"] = Markup
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    loader = templates.loader
    assert loader is not None
    css = loader.get_source(templates, "report.css")[0]
    return templates.get_template("diffusion.html.jinja").render(
        css=css,
        kicker=kicker,
        heading=heading,
        lede=lede,
        tiles=tiles,
        sections=sections,
        environment=environment,
    )


def write_files(folder: Path, files: Mapping[str, str | bytes | dict[str, Any]]) -> None:
    """Writes files into a folder, which is made if need be; a dictionary becomes JSON.

    Raises:
        OutputError: the folder cannot be made.
        FileError: a file cannot be written; what was there before is intact.
    """
    from mnemon.files.atomic import write_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out."
        ) from error
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content, indent=1, allow_nan=False) + "\n"
        data = content if isinstance(content, bytes) else content.encode()
        write_atomically(folder / name, partial(_put, data))


def _put(data: bytes, writer: Writer) -> None:
    writer.write(data)
