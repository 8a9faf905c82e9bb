"""`cache.crop(n)`: n was the length to keep; today it is minus the number of tokens to drop."""

from __future__ import annotations

import ast
from enum import StrEnum
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Receiver, Rule, is_call_of, is_simple, parse, receiver_of
from mnemon.migrate.scope import path_of
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY, _ZERO = "positive_crop", "crop_zero"
_LENGTHS = ("len", "size", "pos", "prompt", "prefix", "keep", "kept", "target", "start", "past")
_DROPS = ("drop", "remov", "reject", "discard", "delta", "rollback")
_DOUBT = (
    "`crop` takes minus the number of tokens to drop since 5.15, and took the length to keep "
    "before; nothing in this file tells which this is"
)

_ZERO_DOUBT = (
    "it emptied the cache up to 5.13, and removes nothing since; nothing in this file tells which "
    "was meant"
)


class _Sign(StrEnum):
    KEEP = "keep"  # a length: never negative
    DROP = "drop"  # already what is wanted today
    ZERO = "zero"
    UNTOLD = "untold"


@final
class Crop(Rule):
    """Told by the argument: a length, a number of tokens to drop, or neither in sight."""

    keys = (_KEY, _ZERO)
    attributes = frozenset({"crop"})
    words = ("crop",)

    def key_of(self, name: str) -> str:
        return _KEY

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        book = flow.book
        call = book.parent(node)
        if not isinstance(call, ast.Call) or call.func is not node:
            return
        if receiver_of(flow, node.value, base, "crop") is not Receiver.CACHE:
            return
        arguments = [*call.args, *(word.value for word in call.keywords)]
        if len(arguments) != 1 or isinstance(arguments[0], ast.Starred):
            return
        sign = _sign(flow, arguments[0], ast.unparse(node.value))
        if sign is _Sign.ZERO:
            if flow.target.lacks(_ZERO):
                message = "`crop(0)`, to empty it -> `reset()`"
                book.rewrite(_ZERO, node, call, _reset, message, if_old=_ZERO_DOUBT)
            return
        if not flow.target.lacks(_KEY) or sign is _Sign.DROP:
            return
        if not is_simple(node.value):
            book.undecided(_KEY, node, "the cache is not a plain name; give it one")
            return
        if (dropped := _from_end(arguments[0], node.value)) is not None:
            is_plain = isinstance(dropped, ast.Name | ast.Attribute | ast.Constant)
            message = "`crop(length - n)` -> `crop(-n)`"
            if is_plain:
                book.rewrite(_KEY, node, call, _negative, message)
                return
        if sign is _Sign.KEEP:
            message = "`crop(length to keep)` -> minus the number of tokens to drop"
            book.rewrite(_KEY, node, call, _dropping, message)
        elif is_simple(arguments[0]):
            message = "`crop(n)` -> minus the number of tokens to drop, where n is a length"
            book.rewrite(_KEY, node, call, _either, message, if_old=_DOUBT)
        else:
            book.undecided(_KEY, node, _DOUBT)


def _sign(flow: Flow, node: ast.expr, receiver: str, depth: int = 0) -> _Sign:
    match node:
        case ast.Constant(value=int() as number):
            return _Sign.KEEP if number else _Sign.ZERO
        case ast.UnaryOp(op=ast.USub()):
            return _Sign.DROP
        case ast.BinOp(op=ast.Sub(), right=right) if _is_length(right, receiver):
            return _Sign.DROP
        case ast.Call(func=ast.Name(id="min"), args=[_, ast.Constant(value=0)]):
            return _Sign.DROP
        case ast.Call(func=ast.Name(id="max"), args=[_, ast.Constant(value=0)]):
            return _Sign.KEEP
        case ast.Call(func=ast.Name(id="len")):
            return _Sign.KEEP
        case ast.IfExp(test=ast.Compare(comparators=[ast.Constant(value=0)])):
            return _Sign.DROP  # what this rule itself writes
        case ast.Call(func=ast.Attribute(attr="size" | "get_seq_length" | "numel")):
            return _Sign.KEEP
        case ast.Subscript(value=ast.Attribute(attr="shape")):
            return _Sign.KEEP
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.FloorDiv() | ast.Mult(), left=left):
            return _sign(flow, left, receiver, depth)
        case ast.Name() | ast.Attribute():
            return _of_name(flow, node, receiver, depth)
    return _Sign.UNTOLD


def _of_name(flow: Flow, node: ast.Name | ast.Attribute, receiver: str, depth: int) -> _Sign:
    assigned = [] if depth else _assignments(flow, node)
    signs = {_sign(flow, value, receiver, depth + 1) for value in assigned}
    if len(signs) == 1 and _Sign.UNTOLD not in signs:
        return signs.pop()
    if _Sign.DROP in signs:
        return _Sign.UNTOLD
    name = (path_of(node) or "").rpartition(".")[2].lower()
    if any(part in name for part in _DROPS):
        return _Sign.DROP
    return _Sign.KEEP if any(part in name for part in _LENGTHS) else _Sign.UNTOLD


def _assignments(flow: Flow, node: ast.Name | ast.Attribute) -> list[ast.expr]:
    """What a variable is given in the function around it."""
    if not isinstance(node, ast.Name):
        return []
    around: ast.AST = flow.tree
    for ancestor in flow.book.ancestors(node):
        if isinstance(ancestor, ast.FunctionDef | ast.AsyncFunctionDef):
            around = ancestor
            break
    found: list[ast.expr] = []
    for part in ast.walk(around):
        if isinstance(part, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == node.id for target in part.targets
        ):
            found.append(part.value)
    return found


def _is_length(node: ast.expr, receiver: str) -> bool:
    return is_call_of(node, "get_seq_length") and ast.unparse(node).startswith(f"{receiver}.")


def _from_end(node: ast.expr, receiver: ast.expr) -> ast.expr | None:
    """n of `cache.get_seq_length() - n`."""
    match node:
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return right if _is_length(left, ast.unparse(receiver)) else None
    return None


def _parts(node: cst.BaseExpression) -> tuple[cst.Call, cst.BaseExpression, cst.BaseExpression]:
    call = cst.ensure_type(node, cst.Call)
    return call, cst.ensure_type(call.func, cst.Attribute).value, call.args[0].value


def _given(call: cst.Call, value: cst.BaseExpression) -> cst.Call:
    """`call` with another argument; its old name was another in every release."""
    equal = cst.MaybeSentinel.DEFAULT
    return call.with_changes(
        args=[call.args[0].with_changes(value=value, keyword=None, equal=equal)]
    )


def _dropping(node: cst.BaseExpression) -> cst.BaseExpression:
    call, receiver, length = _parts(node)
    # A length beyond the end dropped nothing.
    return _given(call, parse("min(N - X.get_seq_length(), 0)", N=length, X=receiver))


def _either(node: cst.BaseExpression) -> cst.BaseExpression:
    call, receiver, length = _parts(node)
    template = "min(N - X.get_seq_length(), 0) if N >= 0 else N"
    return _given(call, parse(template, N=length, X=receiver))


def _negative(node: cst.BaseExpression) -> cst.BaseExpression:
    call, _, length = _parts(node)
    dropped = cst.ensure_type(length, cst.BinaryOperation).right
    return _given(call, parse("-N", N=dropped))


def _reset(node: cst.BaseExpression) -> cst.BaseExpression:
    call, receiver, _ = _parts(node)
    return parse("X.reset()", X=receiver).with_changes(lpar=call.lpar, rpar=call.rpar)
