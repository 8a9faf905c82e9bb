"""Notebooks: the code cells are read as one file; only lines that change are written anew.

Whatever else the JSON holds, its layout and its escapes included, stays as it was byte for byte.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, final

from mnemon.migrate.engine import Piece, is_candidate, migrate_text, parse, spliced
from mnemon.migrate.model import FileResult, Finding, Place, Problem, Replacement
from mnemon.migrate.target import Target
from mnemon.migrate.text import Source

__all__ = ["migrate_notebook"]

_SPACE = re.compile(r"[ \t\r\n]*")
_MAGIC = re.compile(rb"^([ \t]*)(?:[%!?].*|.*\?)$")
_ASSIGNED = re.compile(rb"^([ \t]*[\w.\[\], ]+=[ \t]*)[%!].*$")
_PYTHON_CELLS = (b"%%time", b"%%timeit", b"%%capture", b"%%prun")


@final
@dataclass(frozen=True, slots=True)
class _Cell:
    """One code cell: its number from 1, where its strings stand in the JSON, and its lines."""

    number: int
    spans: tuple[tuple[int, int], ...]
    lines: tuple[str, ...]
    is_list: bool


def migrate_notebook(content: bytes, target: Target, path: str = "<notebook>") -> FileResult:
    """Migrate the Python cells of a Jupyter notebook.

    Args:
        content: the .ipynb file's bytes.
        target: the release that the code should run under.
        path: what to call it in the result.

    Returns:
        The new bytes and every finding, placed by cell and line. Cells in other languages and
        magics are left alone; a cell that is not Python is reported and the others are migrated.
    """
    result = FileResult(path=path, before=content, after=content)
    if not is_candidate(content):
        return result
    try:
        text = content.decode("utf-8-sig" if content.startswith(b"\xef\xbb\xbf") else "utf-8")
        document = json.loads(text)
        if not _is_python(document):
            return result
        cells = list(_cells(text))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        result.problems.append(Problem(message=f"not a notebook: {error}"))
        return result
    sources = [_masked(cell, result.problems) for cell in cells]
    joined = b"\n".join(sources)
    result.num_lines = joined.count(b"\n") + 1
    source = Source(joined)
    try:
        findings, pieces = migrate_text(source, target, path, notebook=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        result.problems.append(Problem(message=f"cannot be read as Python: {error}"))
        return result
    starts = [0]
    for cell in sources:
        starts.append(starts[-1] + len(cell) + 1)
    first_lines = [source.position(start)[0] for start in starts[:-1]]
    result.findings = [_in_cell(finding, cells, first_lines) for finding in findings]
    result.after = _written(content, text, cells, sources, starts, pieces)
    return result


def _is_python(document: Any) -> bool:
    metadata = document.get("metadata", {})
    language = metadata.get("language_info", {}).get("name")
    language = language or metadata.get("kernelspec", {}).get("language") or "python"
    return "cells" in document and language in {"python", "ipython", "python3"}


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _cells(text: str) -> list[_Cell]:
    """Every code cell of the notebook, with the places of its strings."""
    found: list[_Cell] = []
    for key, start in _members(text, _skip(text, 0)):
        if key != "cells":
            continue
        for number, item in enumerate(_items(text, start), 1):
            places = dict(_members(text, item))
            kind = _value(text, places["cell_type"])[0]
            if kind == "code" and "source" in places:
                found.append(_cell(text, number, places["source"]))
    return found


def _cell(text: str, number: int, start: int) -> _Cell:
    is_list = text[start] == "["
    items = list(_items(text, start)) if is_list else [start]
    spans = tuple((item, _value(text, item)[1]) for item in items)
    return _Cell(number, spans, tuple(_value(text, item)[0] for item in items), is_list)


def _value(text: str, at: int) -> tuple[Any, int]:
    return json.JSONDecoder().raw_decode(text, at)


def _members(text: str, at: int) -> list[tuple[str, int]]:
    """(key, where its value begins) of the object at `at`."""
    found: list[tuple[str, int]] = []
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = _value(text, at)
        at = _skip(text, _skip(text, at) + 1)
        found.append((key, at))
        at = _skip(text, _value(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _items(text: str, at: int) -> list[int]:
    """Where the items of the array at `at` begin."""
    found: list[int] = []
    at = _skip(text, at + 1)
    while text[at] != "]":
        found.append(at)
        at = _skip(text, _value(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _masked(cell: _Cell, problems: list[Problem]) -> bytes:
    """The cell with magics replaced by as many bytes of nothing; all blank if it is no Python."""
    raw = "".join(cell.lines).encode("utf-8", "surrogatepass")
    lines = raw.split(b"\n")
    first = raw.lstrip()
    if first.startswith(b"%%") and not first.startswith(_PYTHON_CELLS):
        return _blank(lines)
    masked = b"\n".join(_without_magic(line) for line in lines)
    try:
        parse(masked, notebook=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        place = Place(line=line, column=1, end_line=line, end_column=1, cell=cell.number)
        problems.append(Problem(message=f"this cell is not Python: {error}", place=place))
        return _blank(lines)
    return masked


def _blank(lines: list[bytes]) -> bytes:
    return b"\n".join(b" " * len(line) for line in lines)


def _without_magic(line: bytes) -> bytes:
    if (found := _ASSIGNED.match(line)) is not None and b"==" not in found[1]:
        kept = found[1] + b"0"
    elif (found := _MAGIC.match(line)) is not None and b"#" not in line and b"'" not in line:
        kept = found[1] + b"0"
    else:
        return line
    return kept + b" " * (len(line) - len(kept))


def _in_cell(finding: Finding, cells: list[_Cell], first_lines: list[int]) -> Finding:
    changed = replace(finding, place=_moved(finding.place, cells, first_lines))
    if changed.replacement is None:
        return changed
    place = _moved(changed.replacement.place, cells, first_lines)
    return replace(changed, replacement=Replacement(place=place, text=changed.replacement.text))


def _moved(place: Place, cells: list[_Cell], first_lines: list[int]) -> Place:
    at = max(index for index, first in enumerate(first_lines) if first <= place.line)
    shift = first_lines[at] - 1
    return replace(
        place,
        line=place.line - shift,
        end_line=place.end_line - shift,
        cell=cells[at].number,
    )


def _written(
    content: bytes,
    text: str,
    cells: list[_Cell],
    sources: list[bytes],
    starts: list[int],
    pieces: list[Piece],
) -> bytes:
    """The notebook with its changed cells written anew."""
    changes: list[tuple[int, int, str]] = []
    for cell, masked, start in zip(cells, sources, starts, strict=False):
        end = start + len(masked)
        inside = [(a - start, b - start, new) for a, b, new in pieces if start <= a and b <= end]
        if inside:
            raw = "".join(cell.lines).encode("utf-8", "surrogatepass")
            after = spliced(raw, inside).decode("utf-8", "surrogatepass")
            changes.append(_rewritten(text, cell, after))
    if not changes:
        return content
    for start, stop, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[stop:]
    bom = b"\xef\xbb\xbf" if content.startswith(b"\xef\xbb\xbf") else b""
    return bom + text.encode("utf-8")


def _rewritten(text: str, cell: _Cell, after: str) -> tuple[int, int, str]:
    """The stretch from a cell's first string to its last, with the new lines."""
    start, stop = cell.spans[0][0], cell.spans[-1][1]
    escapes = text.isascii()
    if not cell.is_list:
        return start, stop, json.dumps(after, ensure_ascii=escapes)
    kept = {line: text[a:b] for line, (a, b) in zip(cell.lines, cell.spans, strict=True)}
    lines = _lines(after)
    written = [kept.get(line, json.dumps(line, ensure_ascii=escapes)) for line in lines]
    return start, stop, _separator(text, cell).join(written)


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _separator(text: str, cell: _Cell) -> str:
    if len(cell.spans) > 1:
        return text[cell.spans[0][1] : cell.spans[1][0]]
    before = text[: cell.spans[0][0]]
    space = before[len(before.rstrip(" \t\r\n")) :]
    return "," + (space or " ")
