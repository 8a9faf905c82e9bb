"""What a call gives back: constructors, functions of the file, and a few that everyone knows."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate import narrow, typed
from mnemon.migrate.scope import FunctionInfo, path_of
from mnemon.migrate.values import (
    ANY_CACHE,
    CONVENTION,
    CONVENTIONAL,
    LEGACY,
    NOTHING,
    OTHER,
    UNKNOWN,
    Atom,
    Sort,
    Value,
    has_sort,
    is_cache,
)

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["element_of", "infer_call", "named"]

_CALL: Value = frozenset({Atom(Sort.UNKNOWN, "call")})
_COPIES = {"deepcopy", "copy"}
_NUMBERS = {"len", "int", "float", "str", "bool", "sum", "min", "max", "range", "dict", "set"}
# What these are called on cannot be anything but a cache (a dict's update takes one argument).
_TELLING = {"get_seq_length", "get_usable_length", "get_mask_sizes", "to_legacy_cache"}


def infer_call(flow: Flow, node: ast.Call) -> Value:
    """What `node` gives, after its arguments were looked at."""
    function = flow.infer(node.func)
    arguments = [flow.infer(argument) for argument in node.args]
    keywords = {keyword.arg: flow.infer(keyword.value) for keyword in node.keywords}
    _tell_iterations(flow, node, arguments)
    if flow.telling:
        flow.tell_call(node, function, arguments, keywords)
    found = NOTHING
    for atom in function:
        found |= _result(flow, node, atom, arguments, keywords)
    _learn(flow, node)
    return found or _CALL


def _result(
    flow: Flow,
    node: ast.Call,
    atom: Atom,
    arguments: list[Value],
    keywords: dict[str | None, Value],
) -> Value:
    if atom.sort is Sort.CLASS:
        return typed.instance_of(flow, atom.name)
    if isinstance(atom.node, FunctionInfo):
        skipped = 1 if atom.sort is Sort.BOUND and atom.node.takes_self else 0
        _note_arguments(atom.node, arguments, keywords, skipped)
        declared = typed.annotated(flow, atom.node.node.returns)
        return declared if is_cache(declared) else atom.node.returns or _CALL
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "hasattr")):
            return frozenset({Atom(Sort.GUARD, node=node)})
        case ast.Call(func=ast.Name(id="super")):
            return _super(flow)
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str() as name), *_]):
            return named(flow, name, Atom(Sort.UNKNOWN, "call"))
        case ast.Call(func=ast.Name(id="tuple" | "list")):
            return LEGACY
        case ast.Call(func=ast.Name(id="cast") | ast.Attribute(attr="cast"), args=[kind, _]):
            return typed.annotated(flow, kind)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[_, *_]) if (
            name in _COPIES
        ):
            return arguments[0]
        case ast.Call(func=ast.Name(id=name)) if name in _NUMBERS:
            return OTHER
        case ast.Call(func=ast.Attribute() as method):
            return _method(flow, node, method)
    return frozenset({Atom(Sort.VERSION)}) if narrow.is_release(flow, node) else _CALL


def _method(flow: Flow, node: ast.Call, function: ast.Attribute) -> Value:
    if narrow.is_release(flow, node):
        return frozenset({Atom(Sort.VERSION)})
    if function.attr == "from_legacy_cache":
        made = typed.instances(flow, flow.peek(function.value))
        return made if is_cache(made) else UNKNOWN
    if function.attr == "to_legacy_cache":
        return LEGACY
    if function.attr in {"get", "pop", "setdefault"} and node.args:
        key = node.args[0]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            return flow.by_name(key.value)
    return _CALL


def _super(flow: Flow) -> Value:
    owner = flow.scope.owner
    if owner is None:
        return UNKNOWN
    if owner.sort in (Sort.CACHE, Sort.LAYER):
        return frozenset({Atom(owner.sort, owner.root)})
    return UNKNOWN


def named(flow: Flow, name: str, atom: Atom) -> Value:
    """An attribute of something unknown, called as everyone calls the cache."""
    if name not in CONVENTIONAL or not flow.imports.uses_transformers:
        return UNKNOWN
    # What a script gets from calling a model is a cache in every target; a model's own code may
    # still hand tuples around.
    owner = flow.scope.owner
    if atom.name == "call" and not (owner is not None and owner.is_model):
        return ANY_CACHE
    return CONVENTION


def _note_arguments(
    info: FunctionInfo, arguments: list[Value], keywords: dict[str | None, Value], skipped: int
) -> None:
    """What a function of the file is called with tells what its parameters may be."""
    spec = info.node.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)][skipped:]
    for name, value in [*zip(names, arguments, strict=False), *keywords.items()]:
        if name is not None:
            info.arguments[name] = info.arguments.get(name, NOTHING) | value


def element_of(value: Value) -> Value:
    """What a loop over `value` gives."""
    found = NOTHING
    for atom in value:
        if atom.name == "layers":
            found |= frozenset({Atom(Sort.LAYER, "DynamicLayer")})
        elif atom.name == "sequence" and isinstance(atom.node, frozenset):
            found |= atom.node
        else:
            found |= UNKNOWN
    return found or UNKNOWN


def _tell_iterations(flow: Flow, node: ast.Call, arguments: list[Value]) -> None:
    """`list(cache)`, `enumerate(cache)` and the like go through a cache as a loop does."""
    if not flow.telling or not isinstance(node.func, ast.Name):
        return
    if node.func.id in {"list", "tuple", "enumerate", "zip", "iter", "map", "reversed", "sorted"}:
        for argument, value in zip(node.args, arguments, strict=True):
            flow.tell_iteration(argument, None, [node], value)


def _learn(flow: Flow, node: ast.Call) -> None:
    """After `x.get_seq_length()` ran, x is a cache."""
    if not isinstance(node.func, ast.Attribute) or not flow.imports.uses_transformers:
        return
    name = node.func.attr
    path = path_of(node.func.value)
    if path is None or name in flow.foreign:
        return
    # Anyone may write an object with these methods; one that is called "past" is no one else's.
    is_past = path.rpartition(".")[2].startswith("past") or path in CONVENTIONAL
    if not is_past or not (name in _TELLING or (name == "update" and len(node.args) >= 3)):
        return
    value = flow.peek(node.func.value)
    if has_sort(value, Sort.UNKNOWN, Sort.CONVENTION) and not has_sort(
        value, Sort.OTHER, Sort.INSTANCE, Sort.CLASS, Sort.MODULE
    ):
        flow.set_path(path, frozenset({Atom(Sort.CACHE, "Cache")}))
