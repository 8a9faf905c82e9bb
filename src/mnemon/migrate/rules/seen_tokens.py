"""`cache.seen_tokens` -> `cache.get_seq_length()`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Receiver, Rule, receiver_of, unknown_reason
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow


@final
class SeenTokens(Rule):
    """Reading the count; setting it cannot be carried over."""

    keys = ("seen_tokens", "_seen_tokens")
    attributes = frozenset(keys)
    words = ("seen_tokens",)

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        key = node.attr
        receiver = receiver_of(flow, node.value, base, key)
        if not flow.target.lacks(key) or receiver is Receiver.OTHER:
            return
        if receiver is Receiver.MAYBE:
            flow.book.undecided(key, node, unknown_reason(node.value, base))
        elif self._is_bookkeeping(flow, node):
            return
        elif not isinstance(node.ctx, ast.Load):
            flow.book.undecided(
                key, node, "the number of tokens is set here; a cache counts for itself today"
            )
        else:
            flow.book.rewrite(key, node, node, _count, f"`{key}` -> `get_seq_length()`")

    def _is_bookkeeping(self, flow: Flow, node: ast.Attribute) -> bool:
        """`x._seen_tokens += n` beside writes to x's lists: the layers themselves count today."""
        book = flow.book
        statement = book.parent(node)
        if not isinstance(statement, ast.AugAssign) or statement.target is not node:
            return False
        function = flow.scope.function
        shown = ast.unparse(node.value)
        is_filled = function is not None and any(
            isinstance(part, ast.Attribute)
            and part.attr == "key_cache"
            and ast.unparse(part.value) == shown
            for part in ast.walk(function.node)
        )
        if is_filled and isinstance(statement.op, ast.Add):
            message = "counting by hand left out: a cache counts what its layers hold"
            book.replace_statement(node.attr, statement, (), message)
        return is_filled and isinstance(statement.op, ast.Add)


def _count(node: cst.BaseExpression) -> cst.BaseExpression:
    found = cst.ensure_type(node, cst.Attribute)
    function = found.with_changes(attr=cst.Name("get_seq_length"), lpar=[], rpar=[])
    return cst.Call(function, lpar=found.lpar, rpar=found.rpar)
