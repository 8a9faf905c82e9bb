"""What is known inside one module, class or function while its statements are followed."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import final

from mnemon.migrate.values import NOTHING, Sort, Value

__all__ = ["ClassInfo", "FunctionInfo", "Scope", "bound_names", "children", "path_of"]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@final
@dataclass(slots=True, eq=False)
class ClassInfo:
    """A class of the file.

    Args:
        name: as written.
        sort: what its instances are: a cache, a layer, or something else.
        root: the class of transformers that it descends from, or "".
        is_model: it descends from a model of transformers or from a torch module.
        defines: attributes and methods it sets itself.
        attributes: what was assigned to `self.name` anywhere in it.
    """

    name: str
    sort: Sort
    root: str
    is_model: bool
    defines: set[str] = field(default_factory=set)
    attributes: dict[str, Value] = field(default_factory=dict)
    methods: dict[str, FunctionInfo] = field(default_factory=dict)


@final
@dataclass(slots=True, eq=False)
class FunctionInfo:
    """A function of the file, and what its calls and returns say of it."""

    node: Function
    owner: ClassInfo | None
    returns: Value = NOTHING
    arguments: dict[str, Value] = field(default_factory=dict)
    local: frozenset[str] | None = None

    @property
    def is_static(self) -> bool:
        return _decorated(self.node, "staticmethod")

    @property
    def is_class_method(self) -> bool:
        return _decorated(self.node, "classmethod")

    @property
    def takes_self(self) -> bool:
        return self.owner is not None and not self.is_static


def _decorated(node: Function, name: str) -> bool:
    return any(isinstance(found, ast.Name) and found.id == name for found in node.decorator_list)


@final
@dataclass(slots=True, eq=False)
class Scope:
    """Names and dotted paths with what they may be here and now.

    Args:
        parent: the scope around it.
        env: path -> value at this point.
        every: name -> everything it was ever bound to here, for closures.
        local: names that are bound somewhere in this function.
        function: the function this is the body of.
        owner: the class whose body, or whose method's body, this is.
        is_class: this is a class body, which closures do not see.
    """

    parent: Scope | None
    env: dict[str, Value] = field(default_factory=dict)
    every: dict[str, Value] = field(default_factory=dict)
    local: frozenset[str] = frozenset()
    function: FunctionInfo | None = None
    owner: ClassInfo | None = None
    is_class: bool = False
    outer_names: set[str] = field(default_factory=set)


def path_of(node: ast.AST) -> str | None:
    """`self.model.cache` as text; None for anything that is not a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    parts.append(node.id)
    return ".".join(reversed(parts))


def children(node: ast.AST) -> list[ast.AST]:
    """`ast.iter_child_nodes` as a list, without `ctx`: most of the time goes into walking."""
    found: list[ast.AST] = []
    for name in node._fields:
        if name == "ctx":  # one object for the whole tree, and half of all calls
            continue
        value = getattr(node, name, None)
        if isinstance(value, ast.AST):
            found.append(value)
        elif type(value) is list:
            found += [item for item in value if isinstance(item, ast.AST)]
    return found


def bound_names(node: ast.AST) -> frozenset[str]:
    """Names that a function's own body binds; not those of functions inside it."""
    found: set[str] = set()
    outer: set[str] = set()
    stack = children(node)
    while stack:
        child = stack.pop()
        match child:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                found.add(child.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(child.name)
                continue
            case ast.Lambda():
                continue
            case ast.Import() | ast.ImportFrom():
                found.update(name.asname or name.name.split(".")[0] for name in child.names)
            case ast.Global() | ast.Nonlocal():
                outer.update(child.names)
            case ast.ExceptHandler(name=str() as name):
                found.add(name)
            case ast.MatchAs(name=str() as name) | ast.MatchStar(name=str() as name):
                found.add(name)
            case ast.arg():
                found.add(child.arg)
        stack += children(child)
    return frozenset(found - outer)
