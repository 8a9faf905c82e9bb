"""`cache.get_usable_length(new, layer)` -> `cache.get_seq_length(layer)`.

The old formula was `max_length - new` where a bounded cache would overflow, and the length
everywhere else. Caches of a growing kind have no bound, so for them the two are the same.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import method
from mnemon.migrate.rules.base import (
    Receiver,
    Rule,
    class_names,
    is_pure,
    receiver_of,
    unknown_reason,
)
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "get_usable_length"
_GROWING = {"Cache", "DynamicCache", "OffloadedCache", "QuantizedCache", "EncoderDecoderCache"}
_GROWING |= {"QuantoQuantizedCache", "HQQQuantizedCache"}


@final
class UsableLength(Rule):
    """Calls on caches without a bound."""

    keys = (_KEY,)
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        receiver = receiver_of(flow, node.value, base, _KEY)
        if not flow.target.lacks(_KEY) or receiver is Receiver.OTHER:
            return
        call = flow.book.parent(node)
        if receiver is Receiver.MAYBE:
            flow.book.undecided(_KEY, node, unknown_reason(node.value, base))
            return
        if not isinstance(call, ast.Call) or call.func is not node:
            flow.book.undecided(_KEY, node, "the method is not called here but handed on")
            return
        bounded = {name for name in class_names(base) if name not in _GROWING | set(flow.classes)}
        if bounded:
            flow.book.undecided(
                _KEY,
                node,
                f"a {min(bounded)} has a bound: what was usable was its bound less the new tokens "
                "once it would overflow; `get_seq_length(layer)` is the same before that",
            )
        elif len(call.args) > 2 or any(isinstance(part, ast.Starred) for part in call.args):
            flow.book.undecided(_KEY, node, "its arguments are not written out")
        elif not all(is_pure(part) for part in _dropped(call)):
            flow.book.undecided(_KEY, node, "its first argument does more than give a number")
        else:
            message = "`get_usable_length(new, layer)` -> `get_seq_length(layer)`"
            flow.book.rewrite(_KEY, node, call, _length, message)


def _dropped(call: ast.Call) -> list[ast.expr]:
    named = [word.value for word in call.keywords if word.arg != "layer_idx"]
    return [*call.args[:1], *named]


def _length(node: cst.BaseExpression) -> cst.BaseExpression:
    call = method(node, "get_seq_length")
    positional = [argument for argument in call.args if argument.keyword is None][1:]
    named = [argument for argument in call.args if argument.keyword is not None]
    kept = [*positional, *(word for word in named if _name(word) == "layer_idx")]
    if kept:
        kept[-1] = kept[-1].with_changes(comma=call.args[-1].comma)
    return call.with_changes(args=kept)


def _name(argument: cst.Arg) -> str:
    return argument.keyword.value if argument.keyword is not None else ""
