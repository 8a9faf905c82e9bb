"""How the result of a call is used: compared with None, with a number, or neither in sight."""

from __future__ import annotations

import ast
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnemon.migrate.book import Book

__all__ = ["Use", "use_of"]


class Use(StrEnum):
    """What code expects of "no bound"."""

    NONE = "none"
    NUMBER = "number"
    UNTOLD = "untold"


def use_of(book: Book, call: ast.Call) -> Use:
    """What is done with the result of `call`, or with the variable that keeps it."""
    direct = _tested(book, call)
    if direct is not Use.UNTOLD:
        return direct
    text = ast.unparse(call)
    for ancestor in book.ancestors(call):
        if isinstance(ancestor, ast.IfExp | ast.If | ast.While):
            # `x() if x() >= 0 else None`: the test speaks for what it guards.
            for part in ast.walk(ancestor.test):
                if isinstance(part, ast.Call) and ast.unparse(part) == text:
                    return _tested(book, part)
        if isinstance(ancestor, ast.FunctionDef | ast.AsyncFunctionDef):
            break
    name = _kept_as(book, call)
    if name is None:
        return Use.UNTOLD
    found = {
        _tested(book, part)
        for part in ast.walk(_function(book, call))
        if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load)
    }
    return Use.NONE if Use.NONE in found else Use.NUMBER if Use.NUMBER in found else Use.UNTOLD


def _tested(book: Book, node: ast.expr) -> Use:
    parent = book.parent(node)
    match parent:
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            return Use.NONE
        case ast.Compare(comparators=[ast.Constant(value=None)]):
            return Use.NONE
        case ast.Compare(left=left, comparators=[right]):
            return Use.NUMBER if _is_bound(right if left is node else left) else Use.UNTOLD
        case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            return Use.NONE
        case ast.If() | ast.While() | ast.IfExp() if parent.test is node:
            return Use.NONE
        case ast.NamedExpr():
            return _tested(book, parent)
    return Use.UNTOLD


def _is_bound(node: ast.expr) -> bool:
    """0 or -1: what a length is compared with to find out whether there is one."""
    match node:
        case ast.Constant(value=0):
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return True
    return False


def _kept_as(book: Book, call: ast.expr) -> str | None:
    parent = book.parent(call)
    if isinstance(parent, ast.IfExp):
        return _kept_as(book, parent)
    match parent:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.NamedExpr(target=ast.Name(id=name)):
            return name
    return None


def _function(book: Book, node: ast.AST) -> ast.AST:
    last: ast.AST = node
    for ancestor in book.ancestors(node):
        last = ancestor
        if isinstance(ancestor, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            break
    return last
