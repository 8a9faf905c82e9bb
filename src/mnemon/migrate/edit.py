"""Rewriting with libcst: each edit parses its own stretch of source and gives it back changed.

Whatever lies outside the edited expressions is never parsed and printed again, so it stays as it
was, byte for byte; inside them libcst keeps spaces and comments.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast, final

import libcst as cst

from mnemon.migrate.text import Source

__all__ = ["Edit", "Rendered", "Splice", "call", "expression", "loosest", "render", "span"]

Transform = Callable[[cst.BaseExpression], cst.BaseExpression]


@final
@dataclass(slots=True, kw_only=True)
class Edit:
    """One expression and what becomes of it.

    Args:
        node: the expression, as the parser of Python placed it.
        transforms: applied in this order to the expression as libcst reads it.
        loose: put parentheses around the result, as its place binds tighter.
    """

    node: ast.expr
    transforms: list[Transform] = field(default_factory=list)
    loose: bool = False


@final
@dataclass(frozen=True, slots=True)
class Splice:
    """Text for a stretch of the source that is no expression, such as an import."""

    start: int
    end: int
    text: bytes


@final
@dataclass(frozen=True, slots=True)
class Rendered:
    """What an edit makes of its stretch, and the nodes that were edited inside it."""

    start: int
    end: int
    text: bytes
    nodes: tuple[int, ...]


def span(source: Source, node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Where `node` stands, in bytes."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (
        source.offset(node.lineno, node.col_offset),
        source.offset(node.end_lineno, node.end_col_offset),
    )


def render(source: Source, edits: list[Edit]) -> Iterator[Rendered]:
    """Carry out `edits`, inner ones first, and yield the outermost stretches.

    Raises:
        ValueError: a stretch does not hold the expression that was expected there.
    """
    placed = sorted(
        ((*span(source, edit.node), edit) for edit in edits), key=lambda p: (p[0], -p[1])
    )
    at = 0
    while at < len(placed):
        inside = at + 1
        while inside < len(placed) and placed[inside][0] < placed[at][1]:
            inside += 1
        yield _render_one(source, placed[at:inside])
        at = inside


def _render_one(source: Source, placed: list[tuple[int, int, Edit]]) -> Rendered:
    start, end, edit = placed[0]
    _check(source.utf8[start:end], edit.node)
    text, nodes, at = b"", [id(edit.node)], start
    for inner in render(source, [inner for _, _, inner in placed[1:]]):
        text += source.utf8[at : inner.start] + inner.text
        nodes.extend(inner.nodes)
        at = inner.end
    text += source.utf8[at:end]
    node = expression(text.decode(), source.newline)
    for transform in edit.transforms:
        node = transform(node)
    if edit.loose and not node.lpar:
        node = node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return Rendered(start, end, code(node, source.newline).encode(), tuple(nodes))


def _check(text: bytes, node: ast.expr) -> None:
    """Python before 3.12 misplaces what stands inside some f-strings; nothing is edited blindly."""
    try:
        found = ast.parse(b"(" + text + b"\n)", mode="eval").body
    except SyntaxError as error:
        raise ValueError("the place of this expression is not known") from error
    if _shown(found) != _shown(node):
        raise ValueError("the place of this expression is not known")


def _shown(node: ast.expr) -> str:
    """What a node is, whether it is read or set."""
    return ast.dump(node).replace("Store()", "Load()").replace("Del()", "Load()")


def expression(text: str, newline: str = "\n") -> cst.BaseExpression:
    """Read one expression, also one that spans lines inside someone else's parentheses."""
    config = cst.PartialParserConfig(default_newline=newline)
    try:
        return cst.parse_expression(text, config)
    except cst.ParserSyntaxError:
        node = cst.parse_expression(f"({text}{newline})", config)
        if isinstance(node, cst.Tuple) and not text.rstrip().endswith(")"):
            return node
        return node.with_changes(lpar=node.lpar[1:], rpar=node.rpar[:-1])


def code(node: cst.CSTNode, newline: str = "\n") -> str:
    """Print a node."""
    return cst.Module([], default_newline=newline).code_for_node(node)


def call(function: cst.BaseExpression, *arguments: cst.BaseExpression) -> cst.Call:
    """`function(arguments...)`."""
    return cst.Call(function, [cst.Arg(argument) for argument in arguments])


def loosest(node: ast.expr, parent: ast.AST | None) -> bool:
    """Whether an expression of any precedence may replace `node` without parentheses."""
    match parent:
        case ast.Assign() | ast.AnnAssign() | ast.Return() | ast.AugAssign() | ast.Expr():
            return True
        case ast.keyword() | ast.If() | ast.While() | ast.Assert():
            return True
        case ast.Call():
            return any(node is argument for argument in parent.args)
        case ast.Subscript():
            return node is parent.slice
        case ast.Tuple() | ast.List() | ast.Set():
            return True
    return False


def method(node: cst.BaseExpression, name: str) -> cst.Call:
    """Turn the call `x.old(...)` into `x.name(...)`."""
    found = cast(cst.Call, node)
    function = cst.ensure_type(found.func, cst.Attribute)
    return found.with_changes(func=function.with_changes(attr=cst.Name(name)))
