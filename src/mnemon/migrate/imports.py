"""What the names of a file's imports stand for, and where transformers comes in."""

from __future__ import annotations

import ast
from typing import final

from mnemon.migrate.values import OTHER, UNKNOWN, Atom, Sort, Value

__all__ = ["CACHE_CLASSES", "LAYER_CLASSES", "MODEL_CLASSES", "Imports", "member"]

CACHE_CLASSES = frozenset(
    "Cache DynamicCache StaticCache QuantizedCache EncoderDecoderCache SinkCache HybridCache "
    "HybridChunkedCache OffloadedCache OffloadedStaticCache OffloadedHybridCache "
    "SlidingWindowCache QuantoQuantizedCache HQQQuantizedCache".split()
)
LAYER_CLASSES = frozenset(
    "CacheLayerMixin DynamicLayer DynamicSlidingWindowLayer StaticLayer StaticSlidingWindowLayer "
    "SlidingWindowLayer ChunkedSlidingLayer QuantizedLayer QuantoQuantizedLayer "
    "HQQQuantizedLayer".split()
)
MODEL_CLASSES = frozenset({"PreTrainedModel", "GenerationMixin"})
# A relative import of cache_utils is transformers' own only in a file laid out like its models.
_SIBLINGS = ("modeling_utils", "modeling_outputs", "generation", "configuration_utils")


def member(module: str, name: str) -> Value:
    """What `name` is when taken from `module` of transformers."""
    if name in CACHE_CLASSES or name in LAYER_CLASSES or name in MODEL_CLASSES:
        return frozenset({Atom(Sort.CLASS, name)})
    if name == "__version__":
        return frozenset({Atom(Sort.VERSION)})
    if name[:1].islower():
        return frozenset({Atom(Sort.MODULE, f"{module}.{name}")})
    # Model classes, configs, tokenizers: `LlamaForCausalLM` makes something called like a model.
    return frozenset({Atom(Sort.CLASS, f"transformers.{name}")})


@final
class Imports:
    """Which imports of a file concern transformers."""

    def __init__(self, nodes: list[ast.AST]) -> None:
        self.nodes: list[ast.Import | ast.ImportFrom] = []
        self.uses_transformers = False
        siblings = False
        for node in nodes:
            if isinstance(node, ast.Import):
                self.nodes.append(node)
                self.uses_transformers |= any(
                    name.name.split(".")[0] == "transformers" for name in node.names
                )
            elif isinstance(node, ast.ImportFrom):
                self.nodes.append(node)
                module = node.module or ""
                self.uses_transformers |= not node.level and module.split(".")[0] == "transformers"
                siblings |= node.level >= 2 and module.split(".")[0] in _SIBLINGS
        self.inside_transformers = siblings
        self.uses_transformers |= siblings

    def origin(self, node: ast.ImportFrom) -> str | None:
        """The module of transformers that `node` imports from; None if it is another's."""
        module = node.module or ""
        if not node.level:
            return module if module.split(".")[0] == "transformers" else None
        if node.level >= 2 and self.inside_transformers:
            return f"transformers.{module}"
        return None

    def bind(self, node: ast.Import | ast.ImportFrom) -> dict[str, Value]:
        """The names that `node` binds and what they stand for."""
        bound: dict[str, Value] = {}
        if isinstance(node, ast.Import):
            for name in node.names:
                root = name.name.split(".")[0]
                found = name.name if name.asname else root
                is_ours = root == "transformers"
                bound[name.asname or root] = (
                    frozenset({Atom(Sort.MODULE, found)}) if is_ours else OTHER
                )
            return bound
        origin = self.origin(node)
        for name in node.names:
            if origin is not None:
                bound[name.asname or name.name] = member(origin, name.name)
            else:  # another package's class of that name is another class
                bound[name.asname or name.name] = UNKNOWN
        if origin is not None and "*" in bound:
            del bound["*"]
            bound.update({name: member(origin, name) for name in CACHE_CLASSES | LAYER_CLASSES})
        return bound
