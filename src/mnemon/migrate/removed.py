"""What every config and model had of its base class until 5.0, and old modeling files rely on.

`config.add_cross_attention` and its like are read with the default they had; `get_head_mask`
becomes a function of the file; embeddings are tied where nothing says whether, as they were.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from mnemon.migrate.edit import span
from mnemon.migrate.scope import path_of
from mnemon.migrate.splicing import Function, Pair, at_door, before, finding, spliced
from mnemon.migrate.text import Source

if TYPE_CHECKING:
    from mnemon.migrate.flow import Flow

__all__ = [
    "CONFIG_KEY",
    "HEAD_MASK_KEY",
    "TIE_KEY",
    "config_defaults",
    "head_masks",
    "own_config_defaults",
    "ties",
]

CONFIG_KEY, HEAD_MASK_KEY, TIE_KEY = "config_default", "get_head_mask", "tie_word_embeddings"
_DEFAULTS = {
    "add_cross_attention": "False",
    "cross_attention_hidden_size": "None",
    "is_decoder": "False",
    "pruned_heads": "{}",
    "tie_encoder_decoder": "False",
    "tie_word_embeddings": "True",
    "torchscript": "False",
}
_HELPER = "_get_head_mask"
_TEXT = f'''
def {_HELPER}(model, head_mask, num_layers, is_attention_chunked=False):
    """What `model.get_head_mask` was until transformers 5.0."""
    if head_mask is None:
        return [None] * num_layers
    if head_mask.dim() == 1:
        head_mask = head_mask[None, None, :, None, None].expand(num_layers, -1, -1, -1, -1)
    elif head_mask.dim() == 2:
        head_mask = head_mask[:, None, :, None, None]
    head_mask = head_mask.to(dtype=model.dtype)
    return head_mask.unsqueeze(-1) if is_attention_chunked else head_mask
'''


def config_defaults(source: Source, flow: Flow) -> list[Pair]:
    """Every `config.name` of a default that is gone, read as it was."""
    found: list[Pair] = []
    for node in flow.book.nodes:
        if type(node) is not ast.Attribute or node.attr not in _DEFAULTS:
            continue
        path = path_of(node.value)
        is_config = path is not None and path.endswith("config")
        if not is_config or not isinstance(node.ctx, ast.Load):
            continue
        start, end = span(source, node)
        text = f'getattr({path}, "{node.attr}", {_DEFAULTS[node.attr]})'
        message = f"configs have no `{node.attr}` of their own since 5.0: read with its old default"
        found.append(spliced(source, CONFIG_KEY, node, start, end, text, message))
    return found


def own_config_defaults(source: Source, flow: Flow) -> list[Pair]:
    """`self.forced_bos_token_id` in a config that never sets it (as those of Bart did)."""
    found: list[Pair] = []
    name = "forced_bos_token_id"
    for node in flow.tree.body:
        if not isinstance(node, ast.ClassDef) or not flow.imports.uses_transformers:
            continue
        if not any(
            (path_of(base) or "").lower().endswith("pretrainedconfig") for base in node.bases
        ):
            continue
        uses = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
        uses = [part for part in uses if part.attr == name and path_of(part) == f"self.{name}"]
        for part in uses:
            if isinstance(part.ctx, ast.Load):
                start, end = span(source, part)
                message = f"configs have no `{name}` of their own since 5.0"
                text = f'getattr(self, "{name}", None)'
                found.append(spliced(source, CONFIG_KEY, part, start, end, text, message))
    return found


def head_masks(source: Source, flow: Flow) -> list[Pair]:
    """`self.get_head_mask(...)`, which no model has since 5.0."""
    nodes = flow.book.nodes
    if any(isinstance(node, Function) and node.name == "get_head_mask" for node in nodes):
        return []
    found: list[Pair] = []
    for node in nodes:
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr="get_head_mask"), args=[_, *_]
            ):
                start = span(source, node)[0]
                end = span(source, node.args[0])[0]
                message = "models have no `get_head_mask` since 5.0: a function of the file"
                text = f"{_HELPER}(self, "
                found.append(spliced(source, HEAD_MASK_KEY, node, start, end, text, message))
    if found and _HELPER not in flow.module.every:
        first = next(node for node in flow.tree.body if isinstance(node, ast.ClassDef))
        at, text = before(source, first, _TEXT)
        found.append(spliced(source, HEAD_MASK_KEY, first, at, at, text, "what it was"))
    return found


def ties(source: Source, node: ast.ClassDef) -> Pair:
    """A class whose embeddings were tied by default: they stay so where no config says."""
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name != "__init__":
            continue
        names = [argument.arg for argument in method.args.args]
        if "config" in names and method.body[0].lineno > method.lineno:
            lines = (
                'if not hasattr(config, "tie_word_embeddings"):',
                "    config.tie_word_embeddings = True  # the default until transformers 5.0",
            )
            message = "configs had `tie_word_embeddings` by default: kept"
            return at_door(source, TIE_KEY, method, lines, message)
    reason = (
        "configs had `tie_word_embeddings = True` by default until 5.0: set it in the config, or "
        "weights are not tied and wrong without a word"
    )
    return finding(source, TIE_KEY, node, reason), None
