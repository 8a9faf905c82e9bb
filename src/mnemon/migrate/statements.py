"""Rewrites of whole statements, and the one that is put in: a cache becomes a tuple at the door.

A model written in the days of tuples reads `past_key_values[0][0]` everywhere and returns tuples.
generate hands it a cache at the first step. Turned into a tuple (or None while it is empty) where
it comes in, the rest of the model is right as it stands.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.edit import Splice, span
from mnemon.migrate.model import Finding, Place, Replacement, Status
from mnemon.migrate.names_imported import removed
from mnemon.migrate.text import Source
from mnemon.migrate.values import Atom, Sort, Value

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["normalised", "replaced", "tuple_functions"]

_DOORS = ("forward", "prepare_inputs_for_generation")
_KEY = "cache[i]"
_Pair = tuple[Finding, Splice]
_CACHE: Value = frozenset({Atom(Sort.CLASS, "Cache")})


def tuple_functions(flow: Flow) -> dict[int, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Methods of a tuple-style model through which a cache comes in."""
    if not flow.target.lacks(_KEY) or flow.book.is_encoder_decoder:
        return {}
    found: dict[int, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    for (_, shown), info in flow.book.doubts.items():
        if shown != "past_key_values" or info is None or info.owner is None:
            continue
        if info.owner.is_model and info.node.name in _DOORS:
            found[id(info.node)] = info.node
    if not any(node.name == "forward" for node in found.values()):
        return {}
    for info in flow.functions.values():
        if info.owner is not None and info.owner.is_model and info.node.name == _DOORS[1]:
            found[id(info.node)] = info.node
    doors = {at: node for at, node in found.items() if _takes_cache(node)}
    is_free = flow.module.every.get("Cache", _CACHE) == _CACHE
    return doors if is_free and all(_has_block(node) for node in doors.values()) else {}


def _takes_cache(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    spec = node.args
    parameters = (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)
    return any(parameter.arg == "past_key_values" for parameter in parameters)


def _has_block(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return _first(node).lineno > node.lineno


def _first(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    """The first statement after the docstring."""
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str())), second, *_]:
            return second
    return node.body[0]


def normalised(
    source: Source, flow: Flow, functions: dict[int, ast.FunctionDef | ast.AsyncFunctionDef]
) -> list[_Pair]:
    """The statement at the door of each of `functions`, and the import it needs."""
    pairs: list[_Pair] = []
    newline = source.newline
    for node in functions.values():
        first = _first(node)
        start = source.starts[first.lineno - 1]
        indent = source.utf8[start : start + first.col_offset].decode()
        step = "\t" if indent.startswith("\t") else "    "
        lines = (
            f"{indent}if isinstance(past_key_values, Cache):",
            f"{indent}{step}past_key_values = tuple(",
            f"{indent}{step}{step}(layer.keys, layer.values)",
            f"{indent}{step}{step}for layer in past_key_values.layers",
            f"{indent}{step}{step}if layer.is_initialized",
            f"{indent}{step}) or None",
        )
        text = "".join(line + newline for line in lines)
        message = f"`{node.name}` takes a cache and makes it the tuple that it was written for"
        pairs.append(_pair(source, node, start, start, text, message))
    if functions and "Cache" not in flow.module.every:
        pairs.append(_import(source, flow))
    return pairs


def _import(source: Source, flow: Flow) -> _Pair:
    """`Cache` from the module that has it in every target, after the imports of transformers."""
    last = max(
        (node for node in flow.imports.nodes if node in flow.tree.body and _is_ours(flow, node)),
        key=lambda node: node.lineno,
    )
    _, end = span(source, last)
    text = f"{source.newline}from transformers.cache_utils import Cache"
    return _pair(source, last, end, end, text, "import with Cache")


def _is_ours(flow: Flow, node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return flow.imports.origin(node) is not None
    return any(name.name.split(".")[0] == "transformers" for name in node.names)


def replaced(
    source: Source, tree: ast.Module, found: list[tuple[ast.stmt, str, tuple[str, ...], str]]
) -> list[_Pair]:
    """Other lines in the place of whole statements."""
    pairs: list[_Pair] = []
    for node, key, lines, message in found:
        start, end = span(source, node)
        line = source.starts[node.lineno - 1]
        if source.utf8[line:start].strip():
            continue  # after a colon or a semicolon: a loop cannot stand there
        if not lines:
            start, end, text = removed(source, tree, node, start, end)
        else:
            indent = source.utf8[line:start].decode()
            text = (source.newline + indent).join(lines).encode()
        pairs.append(_pair(source, node, start, end, text.decode(), message, key))
    return pairs


def _pair(
    source: Source,
    node: ast.stmt,
    start: int,
    end: int,
    text: str,
    message: str,
    key: str = _KEY,
) -> _Pair:
    finding = Finding(
        rule=key,
        status=Status.REWRITTEN,
        place=_place(source, *_head(source, node)),
        message=message,
        replacement=Replacement(place=_place(source, start, end), text=text),
    )
    return finding, Splice(start, end, text.encode())


def _head(source: Source, node: ast.stmt) -> tuple[int, int]:
    """Of a function its name, of anything else all of it."""
    start, end = span(source, node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        end = start + source.utf8[start:end].index(node.name.encode()) + len(node.name.encode())
    return start, end


def _place(source: Source, start: int, end: int) -> Place:
    line, column = source.position(start)
    end_line, end_column = source.position(end)
    return Place(line=line, column=column, end_line=end_line, end_column=end_column)
