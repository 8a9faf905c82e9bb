"""getattr, hasattr and setattr with an old name in quotes."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Receiver, Rule, is_pure, parse, receiver_of
from mnemon.migrate.values import Sort, Value, has_sort

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_COUNTS = ("seen_tokens", "_seen_tokens")
_NAMES = (
    *_COUNTS,
    "get_usable_length",
    "get_max_length",
    "get_max_cache_shape",
    "key_cache",
    "value_cache",
    "to_legacy_cache",
    "from_legacy_cache",
)


@final
class Reflection(Rule):
    """Reading the count is rewritten; a question that is now answered otherwise is reported."""

    keys = _NAMES
    words = ("getattr", "hasattr", "setattr", "delattr")

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        match node:
            case ast.Call(
                func=ast.Name(id=asked), args=[subject, ast.Constant(value=str() as name), *_]
            ) if asked in self.words and name in _NAMES:
                pass
            case _:
                return
        if not flow.target.lacks(name) or name in flow.book.patched:
            return
        base, book = arguments[0], flow.book
        if asked == "setattr" and has_sort(base, Sort.CLASS):
            classes = {atom.name for atom in base}
            if not any(found in flow.classes for found in classes):
                book.patched.add(name)
                book.undecided(name, node, f"`{name}` is put on a class of transformers here")
            return
        if receiver_of(flow, subject, base, name) is not Receiver.CACHE:
            return
        if asked == "getattr" and name in _COUNTS and all(is_pure(a) for a in node.args[2:]):
            message = f"`getattr(cache, '{name}')` -> `get_seq_length()`"
            book.rewrite(name, node, node, _length, message)
        elif asked == "hasattr" and self._has_other_way(flow, node):
            return
        else:
            book.undecided(name, node, f"no cache has `{name}` in {flow.target.version}")

    def _has_other_way(self, flow: Flow, node: ast.Call) -> bool:
        """Whether what is asked for has an else, or the code goes on where it returned."""
        inner: ast.AST = node
        for ancestor in flow.book.ancestors(node):
            match ancestor:
                case ast.IfExp():
                    return ancestor.test is inner
                case ast.If():
                    ends = isinstance(ancestor.body[-1], ast.Return | ast.Raise | ast.Continue)
                    return bool(ancestor.orelse) or ends
                case ast.UnaryOp() | ast.BoolOp():
                    inner = ancestor
                case _:
                    return False
        return False


def _length(node: cst.BaseExpression) -> cst.BaseExpression:
    call = cst.ensure_type(node, cst.Call)
    found = parse("X.get_seq_length()", X=call.args[0].value)
    return found.with_changes(lpar=call.lpar, rpar=call.rpar)
