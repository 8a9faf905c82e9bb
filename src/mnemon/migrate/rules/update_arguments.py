"""`cache.update(k, v, layer, cache_kwargs)` -> without the last; since 5.4 it is ignored."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Receiver, Rule, is_pure, receiver_of
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "cache_kwargs"


@final
class UpdateArguments(Rule):
    """Only of caches and with three arguments before it: dicts and sets update as well."""

    keys = (_KEY,)
    attributes = frozenset({"update"})
    words = (_KEY, "update")

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        if not flow.target.lacks(_KEY):
            return
        call = flow.book.parent(node)
        if not isinstance(call, ast.Call) or call.func is not node:
            return
        if receiver_of(flow, node.value, base, "update") is not Receiver.CACHE:
            return
        extra = [word for word in call.keywords if word.arg == _KEY]
        dropped: ast.expr
        if extra:
            dropped = extra[0].value
        elif len(call.args) == 4 and not any(isinstance(a, ast.Starred) for a in call.args):
            dropped = call.args[3]
        else:
            return
        if is_pure(dropped):
            message = "`update(keys, values, layer, cache_kwargs)` -> without `cache_kwargs`"
            flow.book.rewrite(_KEY, dropped, call, _without(bool(extra)), message)
        else:
            flow.book.undecided(_KEY, dropped, "this argument does more than give a value")


def _without(named: bool) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        at = 3
        if named:
            at = next(
                at
                for at, argument in enumerate(call.args)
                if argument.keyword is not None and argument.keyword.value == _KEY
            )
        kept = [*call.args[:at], *call.args[at + 1 :]]
        if at == len(kept) and kept:
            last = call.args[at]
            kept[-1] = kept[-1].with_changes(
                comma=last.comma, whitespace_after_arg=last.whitespace_after_arg
            )
        return call.with_changes(args=kept)

    return transform
