"""What an expression may be; looking at it also tells the rules of every name used in it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate import calls, narrow
from mnemon.migrate.imports import member
from mnemon.migrate.scope import path_of
from mnemon.migrate.values import (
    ANY_CACHE,
    CONVENTION,
    CONVENTIONAL,
    LEGACY,
    NONE,
    NOTHING,
    OTHER,
    UNKNOWN,
    Atom,
    Sort,
    Value,
    has_sort,
    is_cache,
    without,
)

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["infer"]

_INNER = {"self_attention_cache", "cross_attention_cache"}


def infer(flow: Flow, node: ast.expr) -> Value:
    """What `node` may be, at this point of the flow."""
    match node:
        case ast.Constant():
            return NONE if node.value is None else OTHER
        case ast.Name():
            return _name(flow, node)
        case ast.Attribute():
            return _attribute(flow, node)
        case ast.Call():
            return calls.infer_call(flow, node)
        case ast.Subscript():
            return _subscript(flow, node)
        case ast.BoolOp():
            return _bool(flow, node)
        case ast.IfExp():
            return _conditional(flow, node)
        case ast.NamedExpr():
            value = infer(flow, node.value)
            flow.bind(node.target, value, node.value)
            return value
        case ast.Tuple() | ast.List():
            return _sequence(flow, node)
        case ast.Lambda():
            return _lambda(flow, node)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            return _comprehension(flow, node)
        case ast.Starred() | ast.Await():
            infer(flow, node.value)
            return UNKNOWN
        case ast.JoinedStr() | ast.FormattedValue():
            _children(flow, node)
            return OTHER
    _children(flow, node)
    return UNKNOWN if isinstance(node, ast.Yield | ast.YieldFrom) else OTHER


def _children(flow: Flow, node: ast.AST) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            infer(flow, child)
        elif isinstance(child, ast.keyword):
            infer(flow, child.value)


def _name(flow: Flow, node: ast.Name) -> Value:
    value = flow.look_up(node.id)
    if flow.telling and has_sort(value, Sort.CLASS, Sort.MODULE):
        flow.tell_name(node, value)
    return value


def _attribute(flow: Flow, node: ast.Attribute) -> Value:
    base = infer(flow, node.value)
    value = _member(flow, node, base)
    if flow.telling:
        if has_sort(value, Sort.CLASS, Sort.MODULE):
            flow.tell_name(node, value)
        flow.tell_attribute(node, base)
    path = path_of(node)
    if path is not None and path in flow.scope.env:
        return flow.scope.env[path]
    return value


def _member(flow: Flow, node: ast.Attribute, base: Value) -> Value:
    name = node.attr
    found = NOTHING
    for atom in base:
        match atom.sort:
            case Sort.MODULE:
                found |= member(atom.name, name)
            case Sort.CACHE if name in _INNER:
                found |= ANY_CACHE
            case Sort.CACHE if name == "layers":
                found |= frozenset({Atom(Sort.OTHER, "layers")})
            case Sort.CACHE | Sort.INSTANCE | Sort.LAYER:
                found |= _of_instance(flow, atom, name)
            case Sort.NONE:
                pass
            case _:
                found |= calls.named(flow, name, atom)
    return found or UNKNOWN


def _of_instance(flow: Flow, atom: Atom, name: str) -> Value:
    info = flow.classes.get(atom.name)
    if info is None:
        return UNKNOWN
    if name in info.methods:
        return frozenset({Atom(Sort.BOUND, f"{atom.name}.{name}", info.methods[name])})
    if name in info.attributes:
        return info.attributes[name]
    return calls.named(flow, name, atom)


def _subscript(flow: Flow, node: ast.Subscript) -> Value:
    base = infer(flow, node.value)
    infer(flow, node.slice)
    if flow.telling:
        flow.tell_subscript(node, base)
    path = path_of(node)
    if path is not None and path in flow.scope.env:
        return flow.scope.env[path]
    if isinstance(node.slice, ast.Constant) and node.slice.value in CONVENTIONAL:
        return CONVENTION if flow.imports.uses_transformers else UNKNOWN
    found = NOTHING
    for atom in base:
        if atom.name == "layers" and not isinstance(node.slice, ast.Slice):
            found |= frozenset({Atom(Sort.LAYER, "DynamicLayer")})
        elif atom.name == "sequence" and isinstance(atom.node, frozenset):
            found |= base if isinstance(node.slice, ast.Slice) else atom.node
        else:
            found |= UNKNOWN
    return found or UNKNOWN


def _bool(flow: Flow, node: ast.BoolOp) -> Value:
    is_and = isinstance(node.op, ast.And)
    saved = dict(flow.scope.env)
    found = NOTHING
    for at, part in enumerate(node.values):
        value = infer(flow, part)
        is_last = at == len(node.values) - 1
        # `a or b` is a only when a is true, which None is not.
        found |= value if is_last or is_and else without(value, Sort.NONE)
        if not is_last:
            narrow.narrow(flow, part, is_and)
    flow.scope.env = saved
    if narrow.value_of_guard(node):
        return frozenset({Atom(Sort.GUARD, node=node)})
    return found


def _conditional(flow: Flow, node: ast.IfExp) -> Value:
    infer(flow, node.test)
    decided = narrow.holds(flow, node.test)
    found = NOTHING
    for part, truth in ((node.body, True), (node.orelse, False)):
        if decided is (not truth):
            continue
        saved = dict(flow.scope.env)
        narrow.narrow(flow, node.test, truth)
        found |= infer(flow, part)
        flow.scope.env = saved
    return found


def _sequence(flow: Flow, node: ast.Tuple | ast.List) -> Value:
    element = NOTHING
    for part in node.elts:
        element |= infer(flow, part)
    if is_cache(element):
        return frozenset({Atom(Sort.OTHER, "sequence", element)})
    return LEGACY


def _lambda(flow: Flow, node: ast.Lambda) -> Value:
    saved = dict(flow.scope.env)
    for default in (*node.args.defaults, *node.args.kw_defaults):
        if default is not None:
            infer(flow, default)
    for argument in flow.arguments_of(node.args):
        flow.set_path(argument.arg, flow.parameter(argument, NOTHING))
    infer(flow, node.body)
    flow.scope.env = saved
    return OTHER


def _comprehension(
    flow: Flow, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
) -> Value:
    saved = dict(flow.scope.env)
    outer = flow.scope.local
    parts: list[ast.expr] = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
    for at, generator in enumerate(node.generators):
        value = infer(flow, generator.iter)
        rest = [g.iter for g in node.generators[at + 1 :]]
        rest += [test for g in node.generators[at:] for test in g.ifs]
        if flow.telling:
            flow.tell_iteration(generator.iter, generator.target, [*parts, *rest], value)
        flow.bind(generator.target, calls.element_of(value), None, is_local=True)
        for test in generator.ifs:
            infer(flow, test)
            narrow.narrow(flow, test, True)
    element = NOTHING
    for part in parts:
        element |= infer(flow, part)
    flow.scope.env = saved
    flow.scope.local = outer
    if isinstance(node, ast.ListComp | ast.GeneratorExp) and is_cache(element):
        return frozenset({Atom(Sort.OTHER, "sequence", element)})
    return OTHER
