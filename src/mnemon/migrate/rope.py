"""`ROPE_INIT_FUNCTIONS["default"]`: a function of the file's own, as the table has none since 5.0.

`{"default": ..., **ROPE_INIT_FUNCTIONS}[kind]` takes the table's own where it still has one.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.edit import span
from mnemon.migrate.splicing import Pair, before, finding, spliced
from mnemon.migrate.text import Source

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = ["KEY", "NAME", "find"]

KEY = "rope_default"
NAME = "ROPE_INIT_FUNCTIONS"
_OURS = "_default_rope_parameters"
_TEXT = f'''
def {_OURS}(config=None, device=None, seq_len=None, dim=None, base=None, **kwargs):
    """Plain inverse frequencies; transformers had this as "default" until 5.0."""
    if config is not None:
        base = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        heads = config.hidden_size // config.num_attention_heads
        dim = getattr(config, "head_dim", None) or heads
        dim = int(dim * (getattr(config, "partial_rotary_factor", None) or 1.0))
    steps = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float)
    return 1.0 / (base ** (steps / dim)), 1.0
'''


def find(source: Source, flow: Flow) -> list[Pair]:
    """Every look-up in the table that may ask for its default."""
    names = {
        alias.asname or alias.name
        for node in flow.book.nodes
        if type(node) is ast.ImportFrom and flow.imports.origin(node)
        for alias in node.names
        if alias.name == NAME
    }
    if not names or b"compute_default_rope_parameters" in source.utf8:  # as 5.x is written
        return []
    found: list[Pair] = []
    nodes = flow.book.nodes
    rebound = {n.id for n in nodes if type(n) is ast.Name and not isinstance(n.ctx, ast.Load)}
    rebound |= {n.arg for n in nodes if type(n) is ast.arg}
    for node in nodes:
        match node:
            case ast.Subscript(value=ast.Name(id=name) as table) if name in names:
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[_]) if (
                name in names
            ):
                reason = f'`{name}` has no "default" since 5.0, and this gives None for it'
                found.append((finding(source, KEY, node, reason), None))
                continue
            case _:
                continue
        key = node.slice
        if isinstance(key, ast.Constant) and key.value != "default":
            continue
        if _asks_first(flow, node):
            continue
        if name in rebound or "torch" not in flow.module.every:
            reason = f'`{name}` has no "default" since 5.0: compute that one in the module itself'
            found.append((finding(source, KEY, node, reason), None))
            continue
        start, end = span(source, table)
        text = f'{{"default": {_OURS}, **{name}}}'
        message = "the table has no default: one of the file's own"
        found.append(spliced(source, KEY, node, start, end, text, message))
    if any(splice is not None for _, splice in found) and _OURS not in flow.module.every:
        first = _first_use(flow, names)
        at, text = before(source, first, _TEXT)
        message = "plain inverse frequencies"
        found.append(spliced(source, KEY, first, at, at, text, message))
    return found


def _asks_first(flow: Flow, node: ast.AST) -> bool:
    """Whether the look-up stands under a condition that speaks of the default."""
    return any(
        isinstance(part, ast.Constant) and part.value == "default"
        for around in flow.book.ancestors(node)
        if isinstance(around, ast.If | ast.IfExp)
        for part in ast.walk(around.test)
    )


def _first_use(flow: Flow, names: set[str]) -> ast.stmt:
    """The statement at the top of the file that first looks something up in the table."""
    for statement in flow.tree.body:
        for part in ast.walk(statement):
            if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name):
                if part.value.id in names:
                    return statement
    raise AssertionError("a look-up was found, but not where it stands")
