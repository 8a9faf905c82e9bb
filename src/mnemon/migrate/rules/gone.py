"""Names that are gone with nothing that says the same in one expression: only reported."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

from mnemon.migrate.rules.base import Receiver, Rule, receiver_of
from mnemon.migrate.values import Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_SPLIT, _RETURNED = "batch_split", "return_legacy_cache"


@final
class Gone(Rule):
    """`cache.batch_split(...)` and `generate(..., return_legacy_cache=True)`."""

    keys = (_SPLIT, _RETURNED)
    attributes = frozenset({_SPLIT})
    words = keys

    def attribute(self, flow: Flow, node: ast.Attribute, base: Value) -> None:
        receiver = receiver_of(flow, node.value, base, _SPLIT)
        if flow.target.lacks(_SPLIT) and receiver is Receiver.CACHE:
            flow.book.undecided(_SPLIT, node, f"write `{self.modern(_SPLIT)}` for each part")

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        if _RETURNED not in keywords or not flow.imports.uses_transformers:
            return
        if flow.target.lacks(_RETURNED) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "generate":
                reason = f"drop it, and read the cache: `{self.modern(_RETURNED)}`"
                flow.book.undecided(_RETURNED, node, reason)
