"""Passing a tuple where a model expects a cache: only reported, as making one is a decision."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

from mnemon.migrate.rules.base import Rule
from mnemon.migrate.values import LEGACY, Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

_FORWARD, _GENERATE = "tuple_to_forward", "tuple_to_generate"


@final
class Tuples(Rule):
    """Only of what is certainly a tuple, handed to something called like a model."""

    keys = (_FORWARD, _GENERATE)
    words = ("past_key_values",)

    def call(
        self,
        flow: Flow,
        node: ast.Call,
        function: Value,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        if not flow.imports.uses_transformers or keywords.get("past_key_values") != LEGACY:
            return
        is_generate = isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
        key = _GENERATE if is_generate else _FORWARD
        is_known = any(atom.sort in (Sort.CLASS, Sort.FUNCTION, Sort.BOUND) for atom in function)
        name = ast.unparse(node.func).rpartition(".")[2]
        if not flow.target.lacks(key) or is_known or not (is_generate or "model" in name):
            return
        word = next(word for word in node.keywords if word.arg == "past_key_values")
        shown = ast.unparse(word.value)
        reason = f"a tuple is passed here; models take a cache: `DynamicCache({shown[:60]})`"
        flow.book.undecided(key, word.value, reason)
