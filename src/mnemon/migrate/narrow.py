"""What holds inside an `if`: isinstance, is None, hasattr, and the release of transformers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mnemon.migrate.scope import path_of
from mnemon.migrate.typed import annotated
from mnemon.migrate.values import (
    ANY_CACHE,
    LEGACY,
    NONE,
    NOTHING,
    OTHER,
    STALE,
    UNKNOWN,
    Sort,
    has_sort,
    is_cache,
    without,
)

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["guard_of", "holds", "is_release", "narrow", "value_of_guard"]


# What is called past_key_values and is none of these is a tuple.
_EITHER_WAY = {"Cache", "DynamicCache", "EncoderDecoderCache"}


def narrow(flow: Flow, test: ast.expr, truth: bool) -> None:
    """Note in the current scope what is known once `test` was found `truth`."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            narrow(flow, test.operand, not truth)
        case ast.BoolOp() if isinstance(test.op, ast.And) is truth:
            for part in test.values:
                narrow(flow, part, truth)
        case ast.Call(func=ast.Name(id="isinstance"), args=[subject, classes]):
            _narrow_to(flow, subject, classes, truth)
        case ast.Call(
            func=ast.Name(id="hasattr"), args=[subject, ast.Constant(value=str() as name)]
        ) if truth and (path := path_of(subject)):
            flow.scope.env[f"has:{path}.{name}"] = OTHER
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="type"), args=[subject]),
            ops=[ast.Is() | ast.Eq()],
            comparators=[classes],
        ) if truth:
            _narrow_to(flow, subject, classes, truth)
        case ast.Compare(
            left=subject, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]
        ):
            _narrow_none(flow, subject, isinstance(test.ops[0], ast.Is) is truth)
        case ast.NamedExpr():
            narrow(flow, test.target, truth)
        case ast.Name() | ast.Attribute():
            for guard in guard_of(flow, test):
                if id(guard) not in flow.open_guards:
                    flow.open_guards.add(id(guard))
                    narrow(flow, guard, truth)
                    flow.open_guards.discard(id(guard))
            if truth:
                _narrow_none(flow, test, False)


def guard_of(flow: Flow, node: ast.expr) -> list[ast.expr]:
    """The one condition that is kept in this variable, if so."""
    value = flow.peek(node)
    if STALE <= value:
        return []
    guards = [atom.node for atom in value if atom.sort is Sort.GUARD]
    # Another plain constant beside it (`flag = False` before an if) only says "not so".
    return [guards[0]] if len(guards) == 1 and isinstance(guards[0], ast.expr) else []


def _narrow_none(flow: Flow, subject: ast.expr, is_none: bool) -> None:
    if isinstance(subject, ast.NamedExpr):
        subject = subject.target
    path = path_of(subject)
    if path is None:
        return
    value = flow.peek(subject)
    flow.scope.env[path] = NONE if is_none else without(value, Sort.NONE) or UNKNOWN


def _narrow_to(flow: Flow, subject: ast.expr, classes: ast.expr, truth: bool) -> None:
    if isinstance(subject, ast.NamedExpr):
        subject = subject.target
    path = path_of(subject)
    if path is None:
        return
    named = classes.elts if isinstance(classes, ast.Tuple) else [classes]
    tested = NOTHING.union(*(annotated(flow, name) for name in named))
    value = flow.peek(subject)
    if truth:
        known = without(value, Sort.NONE, Sort.LEGACY, Sort.OTHER)
        is_finer = tested == ANY_CACHE and is_cache(known)
        flow.scope.env[path] = known if is_finer else tested
        return
    if has_sort(tested, Sort.LEGACY):
        value = without(value, Sort.LEGACY)
        if has_sort(value, Sort.CONVENTION):
            value = without(value, Sort.CONVENTION) | ANY_CACHE
    if is_cache(tested):
        gone = {atom.name for atom in tested}
        if gone & _EITHER_WAY and has_sort(value, Sort.CONVENTION):
            value = without(value, Sort.CONVENTION) | LEGACY
        if "Cache" in gone:
            value = without(value, Sort.CACHE)
        else:
            value = frozenset(
                atom for atom in value if atom.sort is not Sort.CACHE or atom.name not in gone
            )
    flow.scope.env[path] = value or OTHER


_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FLIPPED = {"<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq}
_PARSERS = {"parse", "Version", "parse_version", "LooseVersion", "StrictVersion"}


def holds(flow: Flow, test: ast.expr) -> bool | None:
    """Whether a test of transformers' release is true in the target; None if it is no such test."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            inside = holds(flow, test.operand)
            return None if inside is None else not inside
        case ast.BoolOp():
            parts = [holds(flow, part) for part in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        case ast.Name() | ast.Attribute():
            guards = guard_of(flow, test)
            if not guards or id(guards[0]) in flow.open_guards:
                return None  # conditions may be made of each other, around a loop
            flow.open_guards.add(id(guards[0]))
            decided = holds(flow, guards[0])
            flow.open_guards.discard(id(guards[0]))
            return decided
        case ast.Compare(ops=[op], comparators=[right]):
            return _compare(flow, test.left, type(op), right)
        case ast.Call(
            func=ast.Name(id="is_transformers_version"),
            args=[ast.Constant(value=str() as sign), ast.Constant(value=str() as text)],
        ) if sign in _FLIPPED:
            return _against(flow, _FLIPPED[sign], text)
    return None


def _compare(flow: Flow, left: ast.expr, op: type[ast.cmpop], right: ast.expr) -> bool | None:
    if op not in _OPERATORS:
        return None
    if is_release(flow, left) and (text := _literal(right)):
        return _against(flow, op, text)
    if is_release(flow, right) and (text := _literal(left)):
        mirrored = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
        return _against(flow, mirrored.get(op, op), text)
    return None


def _against(flow: Flow, op: type[ast.cmpop], text: str) -> bool | None:
    found = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    if found is None:
        return None
    # The target stands for its newest patch release, as names do not change between those.
    major, minor = (int(part) for part in flow.target.version.split("."))
    wanted = tuple(int(part or 0) for part in found.groups())
    return _OPERATORS[op]((major, minor, 99 if wanted[:2] == (major, minor) else 0), wanted)


def is_release(flow: Flow, node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[argument, *_]):
            if name in _PARSERS:
                return is_release(flow, argument)
            return name == "version" and (
                isinstance(argument, ast.Constant) and argument.value == "transformers"
            )
        case ast.Name() | ast.Attribute():
            return has_sort(flow.peek(node), Sort.VERSION)
    return False


def _literal(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(attr=name),
            args=[ast.Constant(value=str() as text)],
        ) if name in _PARSERS:
            return text
    return None


def value_of_guard(node: ast.expr) -> bool:
    """Whether a variable with this value is worth remembering as a condition."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "hasattr")) | ast.Compare():
            return True
        case ast.UnaryOp(op=ast.Not()):
            return value_of_guard(node.operand)
        case ast.BoolOp():
            return any(value_of_guard(part) for part in node.values)
    return False
