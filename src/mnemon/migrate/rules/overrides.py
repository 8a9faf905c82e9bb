"""Classes that descend from a cache of transformers and define an old name themselves."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

from mnemon.migrate.rules.base import Rule
from mnemon.migrate.values import Sort

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow
    from mnemon.migrate.scope import ClassInfo


@final
class Overrides(Rule):
    """The class keeps its method; transformers just never calls it again."""

    keys = (
        "seen_tokens",
        "get_usable_length",
        "get_max_length",
        "get_max_cache_shape",
        "to_legacy_cache",
        "from_legacy_cache",
    )
    words = keys

    def definition(
        self, flow: Flow, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: object
    ) -> None:
        info: ClassInfo = owner  # type: ignore[assignment]
        if info.sort is not Sort.CACHE or node.name not in self.keys:
            return
        if flow.target.lacks(node.name):
            flow.book.undecided(
                node.name,
                node,
                f"`{info.name}` defines it; transformers {flow.target.version} does not call it, "
                f"and asks for `{self.modern(node.name)}`",
            )
