"""`layer.lazy_initialization(keys)` -> `layer.lazy_initialization(keys, values)`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

import libcst as cst

from mnemon.migrate.edit import Transform
from mnemon.migrate.rules.base import Rule
from mnemon.migrate.values import Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow
    from mnemon.migrate.scope import ClassInfo

_KEY = "lazy_initialization"


@final
class LazyInitialization(Rule):
    """The values are told by their name: `key_states` goes with `value_states`."""

    keys = (_KEY,)
    attributes = frozenset(keys)
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        call = flow.book.parent(node)
        if not flow.target.lacks(_KEY) or not isinstance(call, ast.Call) or call.func is not node:
            return
        if not base or not all(atom.sort is Sort.LAYER for atom in base):
            return
        info = next((flow.classes[a.name] for a in base if a.name in flow.classes), None)
        if info is not None and _KEY in info.defines:
            return
        if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
            return
        values = _companion(call.args[0])
        if values is None or not _is_bound(flow, values):
            flow.book.undecided(_KEY, node, "it also takes the values today; which they are here?")
            return
        message = f"`lazy_initialization(keys)` -> with `{values}` as well"
        flow.book.rewrite(_KEY, node, call, _with(values), message)

    def definition(
        self, flow: Flow, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: object
    ) -> None:
        info: ClassInfo = owner  # type: ignore[assignment]
        is_layer = info.sort is Sort.LAYER and node.name == _KEY
        if is_layer and flow.target.lacks(_KEY) and len(node.args.args) == 2:
            if node.args.vararg is None:
                reason = "transformers calls this with keys and values today"
                flow.book.undecided(_KEY, node, reason)


def _companion(node: ast.expr) -> str | None:
    if not isinstance(node, ast.Name):
        return None
    for key, value in (("keys", "values"), ("key", "value")):
        if key in node.id:
            return node.id.replace(key, value)
    return "v" if node.id == "k" else None


def _is_bound(flow: Flow, name: str) -> bool:
    return name in flow.scope.local or name in flow.scope.env


def _with(values: str) -> Transform:
    def transform(node: cst.BaseExpression) -> cst.BaseExpression:
        call = cst.ensure_type(node, cst.Call)
        return call.with_changes(args=[*call.args, cst.Arg(cst.Name(values))])

    return transform
