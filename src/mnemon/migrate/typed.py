"""What an annotation, or the second argument of isinstance, says of a value."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.imports import CACHE_CLASSES, LAYER_CLASSES
from mnemon.migrate.values import (
    LEGACY,
    NONE,
    NOTHING,
    OTHER,
    UNKNOWN,
    Atom,
    Sort,
    Value,
    cache,
    is_cache,
)

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["annotated", "instance_of", "instances"]

_WRAPPERS = {"Optional", "Annotated", "Final", "ClassVar", "Required", "NotRequired"}
_TUPLES = {"Tuple", "tuple", "List", "list", "Sequence", "Iterable"}
_UNTOLD = {"Any", "object"}
_TYPES = {"int", "str", "bool", "float", "dict", "Dict", "set", "bytes", "Tensor", "Mapping"}


def annotated(flow: Flow, node: ast.expr | None) -> Value:
    """What a parameter or a variable with this annotation may be."""
    match node:
        case None:
            return NOTHING
        case ast.Constant(value=None):
            return NONE
        case ast.Constant(value=str() as text):
            try:
                return annotated(flow, ast.parse(text.strip(), mode="eval").body)
            except SyntaxError:
                return UNKNOWN
        case ast.BinOp(op=ast.BitOr()):
            return annotated(flow, node.left) | annotated(flow, node.right)
        case ast.Subscript():
            return _subscripted(flow, node)
        case ast.Name() | ast.Attribute():
            return _plain(flow, node)
    return UNKNOWN


def _subscripted(flow: Flow, node: ast.Subscript) -> Value:
    name = _last(node.value)
    inner = node.slice
    if name == "Union":
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        return NOTHING.union(*(annotated(flow, part) for part in parts))
    if name in _WRAPPERS:
        first = inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
        return annotated(flow, first) | (NONE if name == "Optional" else NOTHING)
    if name in _TUPLES:
        first = inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
        element = annotated(flow, first)
        if is_cache(element):
            return frozenset({Atom(Sort.OTHER, "sequence", element)})
        return LEGACY
    if name in {"type", "Type"}:
        return UNKNOWN
    return OTHER if name in _TYPES else UNKNOWN


def _plain(flow: Flow, node: ast.Name | ast.Attribute) -> Value:
    name = _last(node)
    if name in _TUPLES:
        return LEGACY
    if name in _UNTOLD:
        return UNKNOWN
    if name in _TYPES:
        return OTHER
    return instances(flow, flow.peek(node))


def instances(flow: Flow, classes: Value) -> Value:
    """Objects of these classes."""
    found: set[Atom] = set()
    for atom in classes:
        if atom.sort is not Sort.CLASS:
            found |= UNKNOWN
            continue
        found |= instance_of(flow, atom.name)
    return frozenset(found) or UNKNOWN


def instance_of(flow: Flow, name: str) -> Value:
    """An object of the class `name`, of transformers or of this file."""
    info = flow.classes.get(name)
    if info is not None:
        return frozenset({Atom(info.sort, name)})

    if name in CACHE_CLASSES:
        return cache(name)
    if name in LAYER_CLASSES:
        return frozenset({Atom(Sort.LAYER, name)})
    return frozenset({Atom(Sort.UNKNOWN, name)})


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
