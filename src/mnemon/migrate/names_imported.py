"""Imports after a migration: gone names leave, what the rewrites need comes in."""

from __future__ import annotations

import ast
from typing import cast

import libcst as cst

from mnemon.migrate.book import Book
from mnemon.migrate.edit import Splice, span
from mnemon.migrate.model import Finding, Place, Replacement, Status
from mnemon.migrate.rules.classes import Classes
from mnemon.migrate.rules.helpers import Helpers
from mnemon.migrate.target import Target
from mnemon.migrate.text import Source

__all__ = ["finish", "removed"]

_Pair = tuple[Finding, Splice]


def finish(source: Source, tree: ast.Module, book: Book, target: Target, path: str) -> list[_Pair]:
    """What becomes of every import that names something the target lacks."""
    found: list[_Pair] = []
    imported = {
        alias.name
        for node in book.nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    public = _public(tree)
    is_init = path.endswith("__init__.py")
    for node in {id(node): node for node in book.imports}.values():
        dropped: list[ast.alias] = []
        needed: set[str] = set()
        for alias in node.names:
            if not _is_gone(alias.name, target):
                continue
            uses = [
                use
                for use, gone in book.class_uses.values()
                if gone == alias.name and isinstance(use, ast.Name)
            ]
            handled = [book.handled[id(use)] for use in uses if id(use) in book.handled]
            needed |= {name for name in handled if name and name not in imported}
            is_public = not uses and (
                is_init or alias.asname == alias.name or (alias.asname or alias.name) in public
            )
            is_mentioned = _in_strings(book, alias.asname or alias.name)
            if len(handled) == len(uses) and not is_public and not is_mentioned:
                dropped.append(alias)
        if dropped or needed:
            imported |= needed
            found.append(_change(source, tree, node, dropped, sorted(needed)))
    return found


def _is_gone(name: str, target: Target) -> bool:
    if name in Classes.keys:
        is_alias = name == "SlidingWindowCache" and target.at_least("5.0")
        return is_alias or target.lacks(name)
    return name in Helpers.words and target.lacks(Helpers.keys[0])


def _public(tree: ast.Module) -> set[str]:
    """Names that `__all__` lists."""
    found: set[str] = set()
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AugAssign(target=ast.Name(id="__all__"), value=value)
            ):
                found.update(
                    part.value
                    for part in ast.walk(value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
    return found


def _in_strings(book: Book, name: str) -> bool:
    """Whether an annotation in quotes still needs the name."""
    for node in book.nodes:
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [node.returns]
        for part in parts:
            if part is None:
                continue
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    if name in inner.value:
                        return True
    return False


def _change(
    source: Source,
    tree: ast.Module,
    node: ast.ImportFrom,
    dropped: list[ast.alias],
    needed: list[str],
) -> _Pair:
    start, end = span(source, node)
    gone = [alias.name for alias in dropped]
    rule = gone[0] if gone and gone[0] in Classes.keys else Helpers.keys[0]
    if not gone:  # the old name stays, for a use that nobody could decide
        rule = next(a.name for a in node.names if a.name in (*Classes.keys, *Helpers.words))
    if len(dropped) == len(node.names) and not needed:
        start, end, text = removed(source, tree, node, start, end)
    else:
        text = _edited(source.utf8[start:end].decode(), gone, needed, source.newline).encode()
    message = "import"
    message += f" without {', '.join(gone)}" if gone else ""
    message += f" with {', '.join(needed)}" if needed else ""
    place = _place(source, start, end)
    finding = Finding(
        rule=rule,
        status=Status.REWRITTEN,
        place=_place(source, *span(source, node)),
        message=message,
        replacement=Replacement(place=place, text=text.decode()),
    )
    return finding, Splice(start, end, text)


def removed(
    source: Source, tree: ast.Module, node: ast.stmt, start: int, end: int
) -> tuple[int, int, bytes]:
    """The whole line where nothing else stands on it; `pass` where the block would be empty."""
    assert node.end_lineno is not None
    line = source.starts[node.lineno - 1]
    has_next = node.end_lineno < len(source.starts)
    after = source.starts[node.end_lineno] if has_next else len(source.utf8)
    is_alone = not source.utf8[line:start].strip() and not source.utf8[end:after].strip()
    if is_alone and not _is_only_statement(tree, node):
        return line, after, b""
    return start, end, b"pass"


def _is_only_statement(tree: ast.Module, node: ast.stmt) -> bool:
    for parent in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, None)
            if isinstance(block, list) and any(found is node for found in block):
                return len(block) == 1 and not isinstance(parent, ast.Module)
    return False


def _edited(text: str, gone: list[str], needed: list[str], newline: str) -> str:
    """One import statement with other names; the first new name takes the first old one's place."""
    config = cst.PartialParserConfig(default_newline=newline)
    line = cst.ensure_type(cst.parse_statement(text, config), cst.SimpleStatementLine)
    node = cst.ensure_type(line.body[0], cst.ImportFrom)
    waiting = list(needed)
    kept: list[cst.ImportAlias] = []
    assert not isinstance(node.names, cst.ImportStar)
    last_comma = node.names[-1].comma
    for alias in node.names:
        name = cast(cst.Name, alias.name).value
        if name not in gone:
            kept.append(alias)
        elif waiting:
            kept.append(alias.with_changes(name=cst.Name(waiting.pop(0)), asname=None))
    for name in waiting:
        space = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        if isinstance(kept[-1].comma, cst.MaybeSentinel):
            kept[-1] = kept[-1].with_changes(comma=space)
        kept.append(cst.ImportAlias(cst.Name(name)))
    kept[-1] = kept[-1].with_changes(comma=last_comma)
    changed = line.with_changes(body=[node.with_changes(names=kept)])
    return cst.Module([], default_newline=newline).code_for_node(changed).rstrip("\r\n")


def _place(source: Source, start: int, end: int) -> Place:
    line, column = source.position(start)
    end_line, end_column = source.position(end)
    return Place(line=line, column=column, end_line=end_line, end_column=end_column)
