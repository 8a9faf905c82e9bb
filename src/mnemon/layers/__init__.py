"""What one model layer keeps: one file per kind, and the table that picks the kind."""

from mnemon.hf.kinds import LayerSpec
from mnemon.layers.base import CacheLayer, LayerState
from mnemon.layers.cross import CrossLayer
from mnemon.layers.dense import DenseLayer
from mnemon.layers.foreign import ForeignLayer
from mnemon.layers.hybrid import HybridLayer
from mnemon.layers.indexer import IndexerLayer
from mnemon.layers.recurrent import RecurrentLayer
from mnemon.layers.shared import SharedLayer
from mnemon.layers.static import StaticLayer
from mnemon.layers.static_window import StaticWindowLayer
from mnemon.layers.window import WindowLayer
from mnemon.recipe import Recipe

__all__ = [
    "CacheLayer",
    "CrossLayer",
    "DenseLayer",
    "ForeignLayer",
    "HybridLayer",
    "IndexerLayer",
    "LayerState",
    "RecurrentLayer",
    "SharedLayer",
    "StaticLayer",
    "StaticWindowLayer",
    "WindowLayer",
    "build",
]


def build(spec: LayerSpec, recipe: Recipe) -> CacheLayer:
    """An empty layer that keeps what `spec` asks for, stored as `recipe` says."""
    if spec.foreign is not None:
        return ForeignLayer(spec.foreign)
    if spec.keeps_nothing:
        return SharedLayer()
    recurrent = RecurrentLayer(spec.num_states) if spec.num_states else None
    if not spec.attends:
        assert recurrent is not None
        return recurrent
    attention = _attention(spec, recipe)
    indexer = IndexerLayer(recipe.static_tokens) if spec.indexed else None
    if recurrent is None and indexer is None:
        return attention
    return HybridLayer(attention, recurrent=recurrent, indexer=indexer)


def _attention(spec: LayerSpec, recipe: Recipe) -> CacheLayer:
    max_tokens = recipe.static_tokens
    if max_tokens is None:
        return DenseLayer() if spec.window is None else WindowLayer(spec.window)
    if spec.window is None:
        return StaticLayer(max_tokens)
    if spec.window >= max_tokens:
        return StaticLayer(max_tokens, is_sliding=True)
    return StaticWindowLayer(spec.window)
