"""`cache.get_mask_sizes(cache_position, layer)` -> with the number of new tokens."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Receiver, Rule, parse, receiver_of
from mnemon.migrate.values import Sort, Value, has_sort

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "cache_position"


@final
class MaskSizes(Rule):
    """Told by what the argument is called; a number is left as it is."""

    keys = (_KEY,)
    attributes = frozenset({"get_mask_sizes"})
    words = ("get_mask_sizes",)

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        call = flow.book.parent(node)
        if not flow.target.lacks(_KEY) or not isinstance(call, ast.Call) or call.func is not node:
            return
        is_cache = receiver_of(flow, node.value, base, "get_mask_sizes") is Receiver.CACHE
        if not is_cache and not (base and all(atom.sort is Sort.LAYER for atom in base)):
            return
        if has_sort(base, Sort.UNKNOWN):
            return
        named = [word for word in call.keywords if word.arg == _KEY]
        first = named[0].value if named else (call.args[0] if call.args else None)
        if isinstance(first, ast.Name | ast.Attribute) and _shown(first).endswith("position"):
            message = "`get_mask_sizes(cache_position, ...)` -> the number of new tokens"
            flow.book.rewrite(_KEY, first, call, _count, message)


def _shown(node: ast.Name | ast.Attribute) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id


def _count(node: cst.BaseExpression) -> cst.BaseExpression:
    call = cst.ensure_type(node, cst.Call)
    changed = []
    is_done = False
    for argument in call.args:
        keyword = argument.keyword.value if argument.keyword is not None else None
        if not is_done and keyword in (None, _KEY):
            value = parse("X.shape[0]", X=argument.value)
            name = cst.Name("query_length") if keyword is not None else None
            argument, is_done = argument.with_changes(value=value, keyword=name), True
        changed.append(argument)
    return call.with_changes(args=changed)
