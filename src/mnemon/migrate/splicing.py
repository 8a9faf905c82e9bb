"""Edits of text that is no single expression: lines put in, statements changed, findings alone."""

from __future__ import annotations

import ast

from mnemon.migrate.edit import Splice, span
from mnemon.migrate.model import Finding, Place, Replacement, Status
from mnemon.migrate.text import Source

__all__ = ["Function", "Pair", "at_door", "before", "finding", "line_after", "spliced"]

Function = ast.FunctionDef | ast.AsyncFunctionDef
Pair = tuple[Finding, Splice | None]  # None: a person must decide


def at_door(
    source: Source, rule: str, node: Function, lines: tuple[str, ...], message: str
) -> Pair:
    """Lines before the first statement of a function, after its docstring."""
    is_documented = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
    first = node.body[1] if is_documented else node.body[0]
    start = source.starts[first.lineno - 1]
    indent = source.utf8[start : start + first.col_offset].decode()
    new = "".join(f"{indent}{line}{source.newline}" for line in lines)
    return spliced(source, rule, node, start, start, new, message)


def finding(source: Source, rule: str, node: ast.stmt | ast.expr, reason: str) -> Finding:
    place = _place(source, *_head(source, node))
    return Finding(rule=rule, status=Status.UNDECIDED, place=place, message=reason)


def spliced(
    source: Source, rule: str, node: ast.stmt | ast.expr, start: int, end: int, text: str, why: str
) -> Pair:
    found = Finding(
        rule=rule,
        status=Status.REWRITTEN,
        place=_place(source, *_head(source, node)),
        message=why,
        replacement=Replacement(place=_place(source, start, end), text=text),
    )
    return found, Splice(start, end, text.encode())


def before(source: Source, node: ast.stmt, text: str) -> tuple[int, str]:
    """Where `text` goes, and in what shape, to stand above a definition at the top of a file.

    Its decorators and the comments right above it stay with it.
    """
    decorators = node.decorator_list if isinstance(node, ast.ClassDef | Function) else []
    line = min([node.lineno, *(part.lineno for part in decorators)])
    while line > 1:
        above = source.utf8[source.starts[line - 2] : source.starts[line - 1]]
        if not above.startswith(b"#"):
            break
        line -= 1
    lines = text.strip("\n").split("\n")
    return source.starts[line - 1], source.newline.join([*lines, "", "", ""])


def line_after(source: Source, node: ast.stmt, lines: list[str]) -> tuple[int, str]:
    """Where, and in what shape, `lines` go to follow `node` in its block."""
    assert node.end_lineno is not None
    indent = source.utf8[source.starts[node.lineno - 1] :][: node.col_offset].decode()
    text = "".join(f"{indent}{line}{source.newline}" if line else source.newline for line in lines)
    if node.end_lineno < len(source.starts):
        return source.starts[node.end_lineno], text
    return len(source.utf8), source.newline + text


def _head(source: Source, node: ast.stmt | ast.expr) -> tuple[int, int]:
    start, end = span(source, node)
    if isinstance(node, Function):
        end = start + source.utf8[start:end].index(node.name.encode()) + len(node.name.encode())
    return start, end


def _place(source: Source, start: int, end: int) -> Place:
    line, column = source.position(start)
    end_line, end_column = source.position(end)
    return Place(line=line, column=column, end_line=end_line, end_column=end_column)
