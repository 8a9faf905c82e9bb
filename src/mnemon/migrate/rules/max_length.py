"""`get_max_length()` and `get_max_cache_shape()`: what was None without a bound is -1 today."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform, loosest, method
from mnemon.migrate.rules.base import (
    Receiver,
    Rule,
    class_names,
    is_simple,
    parse,
    receiver_of,
    unknown_reason,
)
from mnemon.migrate.rules.use import Use, use_of
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_STATIC = {
    "StaticCache",
    "HybridCache",
    "HybridChunkedCache",
    "OffloadedStaticCache",
    "OffloadedHybridCache",
    "SlidingWindowCache",
}
_DOUBT = (
    "it gives -1 without a bound since 5.13, and gave None up to 4.48; nothing in this file tells "
    "which of them the code expects"
)


@final
class MaxLength(Rule):
    """Keeps None where the code looks for None."""

    keys = ("get_max_length", "get_max_cache_shape")
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        key, book = node.attr, flow.book
        receiver = receiver_of(flow, node.value, base, key)
        call = book.parent(node)
        is_call = isinstance(call, ast.Call) and call.func is node
        use = use_of(book, call) if is_call and isinstance(call, ast.Call) else Use.UNTOLD
        changes = flow.target.lacks(key) or use is Use.NONE or key == "get_max_length"
        if receiver is Receiver.OTHER or not changes:
            return
        if key == "get_max_length" and isinstance(call, ast.Call) and is_call and call.args:
            return  # with a layer it is today's
        if receiver is Receiver.MAYBE:
            if flow.target.lacks(key) or use is Use.NONE:
                book.undecided(key, node, unknown_reason(node.value, base))
        elif not isinstance(call, ast.Call) or not is_call:
            if flow.target.lacks(key):
                book.undecided(key, node, "the method is not called here but handed on")
        else:
            self._decide(flow, node, call, base, use)

    def _decide(
        self, flow: Flow, node: ast.Attribute, call: ast.Call, base: Value, use: Use
    ) -> None:
        key, book, target = node.attr, flow.book, flow.target
        modern = "get_max_length" if target.at_least("5.13") else "get_max_cache_shape"
        names = class_names(base)
        is_bounded = bool(names) and names <= _STATIC
        is_shape = key == "get_max_cache_shape"
        if use is Use.NUMBER or is_bounded or (is_shape and use is Use.UNTOLD):
            if target.lacks(key):
                layer = is_shape and not is_bounded and not call.args and not call.keywords
                message = f"`{key}()` -> `{modern}({'0' if layer else ''})`"
                book.rewrite(key, node, call, _renamed(modern, layer=layer), message)
            return
        if not is_simple(node.value) or call.args or call.keywords:
            book.undecided(
                key, node, f"`{modern}()` gives -1 where None is expected; write it out here"
            )
            return
        test = book.parent(call)
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and _is_none(test, call):
            is_bound = isinstance(test.ops[0], ast.IsNot)
            of_layer = is_shape and modern == "get_max_length"
            book.rewrite(
                key,
                node,
                test,
                _testing(modern, of_layer=of_layer, is_bound=is_bound),
                f"`{key}()` against None -> `{modern}()` against 0",
                loose=not loosest(test, book.parent(test)),
            )
            return
        is_new = key == "get_max_length" and not target.lacks(key) and use is Use.UNTOLD
        book.rewrite(
            key,
            node,
            call,
            _keeping_none(modern, of_layer=is_shape and modern == "get_max_length"),
            f"`{key}()` -> `{modern}()`, keeping None for a cache without a bound",
            loose=isinstance(test, ast.If | ast.While) or not loosest(call, test),
            if_old=_DOUBT if is_new else None,
        )


def _is_none(test: ast.Compare, call: ast.Call) -> bool:
    right = test.comparators[0]
    return test.left is call and isinstance(right, ast.Constant) and right.value is None


def _testing(modern: str, *, of_layer: bool, is_bound: bool) -> Transform:
    asked = f"X.{modern}({'0' if of_layer else ''})"
    is_filled = modern == "get_max_length" and not of_layer
    sign, joined, empty = (">=", "and", "len(X) > 0") if is_bound else ("<", "or", "len(X) == 0")
    template = f"{empty} {joined} {asked} {sign} 0" if is_filled else f"{asked} {sign} 0"

    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(cst.ensure_type(node, cst.Comparison).left, cst.Call)
        return parse(template, X=cst.ensure_type(call.func, cst.Attribute).value)

    return transform


def _renamed(modern: str, *, layer: bool) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = method(node, modern)
        return call.with_changes(args=[cst.Arg(cst.Integer("0"))]) if layer else call

    return transform


def _keeping_none(modern: str, *, of_layer: bool) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        receiver = cst.ensure_type(call.func, cst.Attribute).value
        asked = f"X.{modern}({'0' if of_layer else ''})"
        # Without layers there is no maximum to take in 5.13 and later.
        filled = "len(X) and " if modern == "get_max_length" and not of_layer else ""
        return parse(f"{asked} if {filled}{asked} >= 0 else None", X=receiver)

    return transform
