"""`is_torch_fx_available()` and its like: old files fail on importing them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.rules.base import Rule
from mnemon.migrate.values import Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_KEY = "is_torch_fx_available"
# True with every torch that the target runs on.
_ALWAYS = frozenset(
    {_KEY, "is_torch_sdpa_available", "is_torchdynamo_available", "is_torch_compile_available"}
)
# Gone as well, with nothing that says the same.
_GONE = frozenset(
    {"is_tf_available", "is_flax_available", "find_pruneable_heads_and_indices", "LossKwargs"}
)


@final
class Helpers(Rule):
    """Calls become True; the import goes with the last of them."""

    keys = (_KEY,)
    words = (*_ALWAYS, *_GONE)

    def name(self, flow: Flow, node: ast.Name | ast.Attribute, value: Value) -> None:
        gone = gone_helper(flow, value)
        if gone is None or (isinstance(node, ast.Name) and node.id in flow.book.guarded_names):
            return
        book = flow.book
        book.class_uses[id(node)] = (node, gone)
        call = book.parent(node)
        is_call = isinstance(call, ast.Call) and call.func is node and not call.args
        if gone in _ALWAYS and is_call and isinstance(call, ast.Call):
            book.handled[id(node)] = ""
            book.rewrite(_KEY, node, call, _true, f"`{gone}()` -> `True`")
        else:
            version = flow.target.version
            book.undecided(_KEY, node, f"`{gone}` is not in transformers {version}")


def gone_helper(flow: Flow, value: Value) -> str | None:
    """The helper of transformers that `value` certainly is, if the target lacks it."""
    if len(value) != 1 or not flow.target.lacks(_KEY):
        return None
    atom = next(iter(value))
    if atom.sort not in (Sort.MODULE, Sort.CLASS) or not atom.name.startswith("transformers."):
        return None
    name = atom.name.rpartition(".")[2]
    return name if name in _ALWAYS | _GONE else None


def _true(node: cst.BaseExpression) -> cst.BaseExpression:
    call = cst.ensure_type(node, cst.Call)
    return cst.Name("True", lpar=call.lpar, rpar=call.rpar)
