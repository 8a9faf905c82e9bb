"""`DynamicCache.from_legacy_cache(past)` -> `DynamicCache(past)`, None included."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Rule
from mnemon.migrate.values import Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "from_legacy_cache"


@final
class FromLegacy(Rule):
    """Calls on DynamicCache itself; other classes take their tuples differently."""

    keys = (_KEY,)
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        if not flow.target.lacks(_KEY) or _KEY in flow.foreign:
            return
        book = flow.book
        names = {atom.name for atom in base if atom.sort is Sort.CLASS}
        if any(_defines(flow, name) for name in names):
            return
        call = book.parent(node)
        shown = ast.unparse(node.value)
        if names == {"DynamicCache"} and len(base) == 1 and "DynamicCache" not in flow.classes:
            if not isinstance(call, ast.Call) or call.func is not node:
                book.undecided(_KEY, node, "the method is not called here but handed on")
            elif len(call.args) + len(call.keywords) > 1 or any(
                word.arg is None for word in call.keywords
            ):
                book.undecided(_KEY, node, "its arguments are not written out")
            else:
                message = "`DynamicCache.from_legacy_cache(past)` -> `DynamicCache(past)`"
                book.rewrite(_KEY, node, call, _made, message)
        elif "EncoderDecoderCache" in names:
            book.undecided(
                _KEY,
                node,
                "write `EncoderDecoderCache(past)` for a tuple of four for every layer, and "
                "`EncoderDecoderCache(DynamicCache(), DynamicCache())` for None",
            )
        elif any(_is_known_cache(flow, name) for name in names):
            book.undecided(_KEY, node, f"what `{shown}` makes of a tuple is for its author to say")
        elif flow.imports.uses_transformers and any(
            atom.sort in (Sort.UNKNOWN, Sort.CONVENTION, Sort.CACHE) for atom in base
        ):
            book.undecided(_KEY, node, f"nothing here tells what `{shown}` is")


def _defines(flow: Flow, name: str) -> bool:
    return name in flow.classes and _KEY in flow.classes[name].defines


def _is_known_cache(flow: Flow, name: str) -> bool:
    if name in flow.classes:
        return flow.classes[name].sort is Sort.CACHE
    return not name.startswith("transformers.")


def _made(node: cst.BaseExpression) -> cst.BaseExpression:
    call = cst.ensure_type(node, cst.Call)
    function = cst.ensure_type(call.func, cst.Attribute)
    arguments = []
    for argument in call.args:
        value = argument.value
        if not isinstance(value, cst.Name) or value.value != "None":
            equal = cst.MaybeSentinel.DEFAULT
            arguments.append(argument.with_changes(keyword=None, equal=equal))
    return call.with_changes(func=function.value, args=arguments)
