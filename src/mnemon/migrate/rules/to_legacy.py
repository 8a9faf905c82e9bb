"""`cache.to_legacy_cache()` -> a tuple of the layers' keys and values."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform, loosest
from mnemon.migrate.rules.base import (
    Receiver,
    Rule,
    class_names,
    is_simple,
    parse,
    receiver_of,
    unknown_reason,
)
from mnemon.migrate.rules.names import layer_name
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "to_legacy_cache"


@final
class ToLegacy(Rule):
    """Calls; an encoder-decoder's two caches gave one tuple or another, which is for people."""

    keys = (_KEY,)
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        book = flow.book
        receiver = receiver_of(flow, node.value, base, _KEY)
        if not flow.target.lacks(_KEY) or receiver is Receiver.OTHER:
            return
        call = book.parent(node)
        if receiver is Receiver.MAYBE:
            book.undecided(_KEY, node, unknown_reason(node.value, base))
        elif not isinstance(call, ast.Call) or call.func is not node:
            book.undecided(_KEY, node, "the method is not called here but handed on")
        elif class_names(base) == {"EncoderDecoderCache"} and is_simple(node.value):
            message = "`to_legacy_cache()` -> the tensors of both inner caches"
            loose = not loosest(call, book.parent(call))
            book.rewrite(_KEY, node, call, _both, message, loose=loose)
        elif "EncoderDecoderCache" in class_names(base):
            reason = "an EncoderDecoderCache gave four tensors for every layer, or two without "
            book.undecided(_KEY, node, reason + "cross attention; write out which are wanted")
        else:
            message = "`to_legacy_cache()` -> a tuple of the layers' keys and values"
            book.rewrite(_KEY, node, call, _tuple(layer_name(node)), message)


def _tuple(name: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        receiver = cst.ensure_type(call.func, cst.Attribute).value
        template = f"tuple(({name}.keys, {name}.values) for {name} in X.layers)"
        found = parse(template, X=receiver)
        return found.with_changes(lpar=call.lpar, rpar=call.rpar)

    return transform


_BOTH = (
    "tuple((own.keys, own.values, cross.keys, cross.values) "
    "for own, cross in zip(X.self_attention_cache.layers, X.cross_attention_cache.layers)) "
    "if X.cross_attention_cache.get_seq_length() > 0 "
    "else tuple((own.keys, own.values) for own in X.self_attention_cache.layers)"
)


def _both(node: cst.BaseExpression) -> cst.BaseExpression:
    function = cst.ensure_type(cst.ensure_type(node, cst.Call).func, cst.Attribute)
    return parse(_BOTH, X=function.value)
