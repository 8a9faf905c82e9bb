"""What a rule is: the names it answers for, and what it says when one of them is used."""

from __future__ import annotations

import ast
from abc import ABC
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, final

import libcst as cst

from mnemon.migrate.scope import path_of
from mnemon.migrate.values import (
    Atom,
    Sort,
    Value,
    has_sort,
    is_cache,
    is_named_cache,
    may_be_cache,
)
from mnemon.names import lookup

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = [
    "Receiver",
    "Rule",
    "class_names",
    "is_call_of",
    "is_pure",
    "is_simple",
    "parse",
    "receiver_of",
    "unknown_reason",
]

# Names that nothing but a cache of transformers has; a use on something unknown is worth a word.
_TELLING = {
    "_seen_tokens",
    "from_legacy_cache",
    "get_max_cache_shape",
    "get_usable_length",
    "to_legacy_cache",
}
# The others are worth one only where the thing is called like a cache.
_SPECIFIC = {"get_max_length", "key_cache", "seen_tokens", "value_cache"}


class Receiver(StrEnum):
    """What a rule may do with a place."""

    CACHE = "cache"  # it is a cache: rewrite
    MAYBE = "maybe"  # it may be: say so
    OTHER = "other"  # it is something else, or nothing tells: leave it alone


class Rule(ABC):
    """One name (or a few that are one thing). Every hook does nothing unless a rule needs it."""

    keys: ClassVar[tuple[str, ...]]
    attributes: ClassVar[frozenset[str]] = frozenset()
    words: ClassVar[tuple[str, ...]] = ()  # without one of these in its text, a file is not read

    def key_of(self, name: str) -> str:
        """The key of the table under which a use of attribute `name` is reported."""
        return name if name in self.keys else self.keys[0]

    def modern(self, key: str) -> str:
        """What the table says to write today."""
        return lookup(key).modern

    # The hooks are told of places in files of all kinds: most have nothing to say on most of them.

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:  # noqa: B027
        """`base.name` is used, `name` being one of `attributes`."""

    def subscript(self, flow: Flow, node: ast.Subscript, base: Value) -> None:  # noqa: B027
        """`base[...]` is used."""

    def iteration(  # noqa: B027
        self,
        flow: Flow,
        iterated: ast.expr,
        target: ast.expr | None,
        body: Sequence[ast.AST],
        value: Value,
    ) -> None:
        """Something goes through `iterated`."""

    def call(  # noqa: B027
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        """Something is called."""

    def name(self, flow: Flow, node: ast.Name | ast.Attribute, value: Value) -> None:  # noqa: B027
        """A class or a module of transformers is mentioned."""

    def definition(  # noqa: B027
        self, flow: Flow, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: object
    ) -> None:
        """A class of the file defines a method."""


def receiver_of(flow: Flow, node: ast.expr, base: Value, name: str) -> Receiver:
    """What a rule may do with `node.name`, where `node` may be `base`."""
    if any(_defines(flow, atom, name) for atom in base):
        return Receiver.OTHER
    if is_cache(base):
        return Receiver.CACHE
    is_foreign = name in flow.foreign
    if is_named_cache(base) and flow.imports.uses_transformers and not is_foreign:
        return Receiver.CACHE
    if has_sort(base, Sort.CACHE):
        return Receiver.MAYBE
    if is_foreign or not has_sort(base, Sort.UNKNOWN, Sort.CONVENTION):
        return Receiver.OTHER
    if has_sort(base, Sort.OTHER, Sort.INSTANCE, Sort.MODULE, Sort.CLASS):
        return Receiver.OTHER
    last = (path_of(node) or "").rpartition(".")[2]
    if not flow.imports.uses_transformers:
        is_hinted = last in {"past_key_values", "past_key_value"}
        return Receiver.MAYBE if is_hinted and name in _TELLING | _SPECIFIC else Receiver.OTHER
    is_called_cache = "cache" in last.lower() or last.startswith(("past", "kv"))
    if name in _TELLING or (name in _SPECIFIC and is_called_cache):
        return Receiver.MAYBE
    return Receiver.OTHER


def _defines(flow: Flow, atom: Atom, name: str) -> bool:
    """Whether a class of the file brings this attribute itself."""
    info = flow.classes.get(atom.name)
    return info is not None and atom.sort is not Sort.CLASS and name in info.defines


def unknown_reason(node: ast.expr, base: Value) -> str:
    """Why `node` could not be told to be a cache."""
    shown = ast.unparse(node)
    if may_be_cache(base):
        return f"`{shown}` is a cache here on some ways through the code and not on others"
    return f"nothing here tells what `{shown}` is; an annotation such as `: Cache` would"


def class_names(value: Value) -> set[str]:
    """The classes of caches that a value may be an object of."""
    return {atom.name for atom in value if atom.sort is Sort.CACHE}


def is_simple(node: ast.expr) -> bool:
    """Whether `node` may be written twice: a name, a chain of names, a plain index of one."""
    if isinstance(node, ast.Subscript):
        return is_simple(node.value) and isinstance(node.slice, ast.Name | ast.Constant)
    return path_of(node) is not None


_PURE_CALLS = {"len", "int", "size", "dim", "numel", "device", "min", "max"}


def is_pure(node: ast.expr) -> bool:
    """Whether dropping `node` drops nothing but its value."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            function = part.func
            name = function.attr if isinstance(function, ast.Attribute) else path_of(function)
            if name not in _PURE_CALLS:
                return False
        elif isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
    return True


def is_call_of(node: ast.expr, name: str) -> bool:
    """Whether `node` is `something.name(...)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
    )


def parse(template: str, **parts: cst.BaseExpression) -> cst.BaseExpression:
    """An expression written as text, with names in it replaced by expressions.

    Args:
        template: Python, such as ``"X.get_seq_length(I)"``.
        parts: what stands where, such as ``X=...``; parentheses are put around what needs them.
    """
    found = cst.parse_expression(template).visit(_Fill(parts))
    assert isinstance(found, cst.BaseExpression)
    return found


_TIGHT = cst.Name | cst.Attribute | cst.Subscript | cst.Call | cst.Integer | cst.Tuple


@final
class _Fill(cst.CSTTransformer):
    def __init__(self, parts: dict[str, cst.BaseExpression]) -> None:
        super().__init__()
        self.parts = parts

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        found = self.parts.get(updated_node.value)
        if found is None:
            return updated_node
        found = found.deep_clone()
        if isinstance(found, _TIGHT) or found.lpar:
            return found
        return found.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
