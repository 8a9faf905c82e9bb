"""The functions of `transformers.masking_utils`: no `cache_position` since 5.10, another name.

Their arguments are changed where they are called, and in the dict that is handed to several of them
(`create_causal_mask(**mask_kwargs)`).
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.edit import span
from mnemon.migrate.splicing import Function, Pair, finding, spliced
from mnemon.migrate.text import Source

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["KEY", "find"]

KEY = "mask_arguments"
_GONE, _OLD, _NEW = "cache_position", "input_embeds", "inputs_embeds"
_FUNCTIONS = {
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
    "create_sliding_window_causal_mask",
}
_Span = tuple[int, int]


def find(source: Source, flow: Flow) -> list[Pair]:
    """Every call that gives them what they no longer take."""
    if not flow.target.at_least("5.10"):
        return []
    nodes = flow.book.nodes
    names = {
        alias.asname or alias.name
        for node in nodes
        if type(node) is ast.ImportFrom and flow.imports.origin(node)
        for alias in node.names
        if alias.name in _FUNCTIONS
    }
    if not names or names & _rebound(nodes):
        return []
    found: list[Pair] = []
    may_hold = any(f'"{word}"'.encode() in source.utf8 for word in (_GONE, _OLD))
    dicts: dict[int, ast.Dict] = {}
    for node in nodes:
        if type(node) is not ast.Call or not _is_named(node.func, names):
            continue
        found += _changed(source, node)
        for word in node.keywords:
            if word.arg is not None:
                continue
            given = word.value if isinstance(word.value, ast.Dict) else None
            if isinstance(word.value, ast.Name):
                given = _dict(flow, node, word.value.id, names)
            if given is None:
                if not may_hold:
                    continue
                reason = "what is handed on here may hold `cache_position`, which is gone"
                found.append((finding(source, KEY, node, reason), None))
            else:
                dicts[id(given)] = given
    for given in dicts.values():
        found += _changed_dict(source, given)
    return found


def _rebound(nodes: list[ast.AST]) -> set[str]:
    found = {n.id for n in nodes if type(n) is ast.Name and not isinstance(n.ctx, ast.Load)}
    return found | {n.name for n in nodes if isinstance(n, Function | ast.ClassDef)}


def _is_named(node: ast.expr, names: set[str]) -> bool:
    """Whether a call is of one of `names`, or of one or another of them."""
    match node:
        case ast.IfExp():
            return _is_named(node.body, names) and _is_named(node.orelse, names)
        case ast.Name():
            return node.id in names
    return False


def _dict(flow: Flow, call: ast.Call, name: str, names: set[str]) -> ast.Dict | None:
    """The literal behind `**name`, where nothing but these functions gets it."""
    function = next((a for a in flow.book.ancestors(call) if isinstance(a, Function)), None)
    if function is None:
        return None
    found: list[ast.Dict] = []
    for part in ast.walk(function):
        match part:
            case ast.Assign(targets=[ast.Name(id=bound)], value=ast.Dict() as given):
                if bound == name:
                    found.append(given)
            case ast.Name(id=used, ctx=ast.Load()) if used == name:
                around = flow.book.parent(part)
                user = flow.book.parent(around) if isinstance(around, ast.keyword) else None
                if not isinstance(user, ast.Call) or not _is_named(user.func, names):
                    return None
    return found[0] if len(found) == 1 else None


def _changed(source: Source, node: ast.Call) -> list[Pair]:
    items: list[_Span] = [span(source, argument) for argument in node.args]
    items += [_span(source, word) for word in node.keywords]
    found: list[Pair] = []
    if len(node.args) > 3 and _GONE in ast.unparse(node.args[3]):
        found.append(_dropped(source, node, items, 3))
    for at, word in enumerate(node.keywords, len(node.args)):
        if word.arg == _GONE:
            found.append(_dropped(source, node, items, at))
        elif word.arg == _OLD:
            start = items[at][0]
            found.append(_renamed(source, node, start, start + len(_OLD), _NEW))
    return found


def _changed_dict(source: Source, node: ast.Dict) -> list[Pair]:
    items = [
        (span(source, value if key is None else key)[0], span(source, value)[1])
        for key, value in zip(node.keys, node.values, strict=True)
    ]
    found: list[Pair] = []
    for at, key in enumerate(node.keys):
        match key:
            case ast.Constant(value=value) if value == _GONE:
                found.append(_dropped(source, node, items, at))
            case ast.Constant(value=value) if value == _OLD:
                start, end = span(source, key)
                text = source.utf8[start:end].decode().replace(_OLD, _NEW)
                found.append(_renamed(source, node, start, end, text))
    return found


def _span(source: Source, word: ast.keyword) -> _Span:
    return source.offset(word.lineno, word.col_offset), span(source, word.value)[1]


def _dropped(source: Source, node: ast.expr, items: list[_Span], at: int) -> Pair:
    start, end = items[at]
    if at + 1 < len(items):
        end = items[at + 1][0]
    elif at:
        start = items[at - 1][1]
    return spliced(source, KEY, node, start, end, "", f"masks take no `{_GONE}`")


def _renamed(source: Source, node: ast.expr, start: int, end: int, text: str) -> Pair:
    return spliced(source, KEY, node, start, end, text, f"`{_OLD}` -> `{_NEW}`")
