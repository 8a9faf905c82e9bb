"""Names for what a rewrite adds, that nothing around it uses."""

from __future__ import annotations

import ast
from collections.abc import Iterable

__all__ = ["layer_name", "rest_name"]


def layer_name(*nodes: ast.AST) -> str:
    """A name for one of `cache.layers` inside a comprehension over these expressions."""
    used = _used(nodes)
    return next(name for name in ("layer", "entry", "cache_layer", "layer_") if name not in used)


def rest_name(nodes: Iterable[ast.AST]) -> str:
    """A name for what is left over of a tuple, that the code does not read."""
    used = _used(nodes)
    return next(name for name in ("_", "_rest", "_others", "_others_") if name not in used)


def _used(nodes: Iterable[ast.AST]) -> set[str]:
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}
