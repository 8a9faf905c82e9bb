"""`static_cache.max_cache_len` and `max_batch_size`: plain attributes that became methods."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Rule, class_names, parse, receiver_of
from mnemon.migrate.values import Value, is_cache

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_MODERN = {
    "max_cache_len": "X.get_max_length()",
    "max_batch_size": "X.layers[0].batch_size",
}


@final
class Bounds(Rule):
    """Only of what is certainly a preallocated cache: configs have attributes of these names."""

    keys = tuple(_MODERN)
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        key = node.attr
        names = class_names(base)
        if not flow.target.lacks(key) or not is_cache(base) or "StaticCache" not in names:
            return
        if len(names) > 1 or receiver_of(flow, node.value, base, key) != "cache":
            return
        if not isinstance(node.ctx, ast.Load):
            flow.book.undecided(key, node, "it is set here; a cache keeps this to itself today")
            return
        message = f"`{key}` -> `{_MODERN[key][2:]}`"
        flow.book.rewrite(key, node, node, _modern(_MODERN[key]), message)


def _modern(template: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        return parse(template, X=cst.ensure_type(node, cst.Attribute).value)

    return transform
