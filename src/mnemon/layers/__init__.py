"""What one model layer keeps: one file per kind, and the table that picks the kind."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mnemon.compression import Compression
from mnemon.errors import RecipeError
from mnemon.hf.kinds import LayerSpec
from mnemon.layers.base import CacheLayer, LayerState
from mnemon.layers.cross import CrossLayer
from mnemon.layers.dense import DenseLayer
from mnemon.layers.dmc import DMCLayer
from mnemon.layers.dms import DMSLayer
from mnemon.layers.foreign import ForeignLayer
from mnemon.layers.hybrid import HybridLayer
from mnemon.layers.indexer import IndexerLayer
from mnemon.layers.packed import PackedLayer
from mnemon.layers.packed_window import PackedWindowLayer
from mnemon.layers.recurrent import RecurrentLayer
from mnemon.layers.shared import SharedLayer
from mnemon.layers.static import StaticLayer
from mnemon.layers.static_window import StaticWindowLayer
from mnemon.layers.tiered import TieredLayer
from mnemon.layers.tiering import Tiering
from mnemon.layers.window import WindowLayer
from mnemon.recipe import LEARNED, Recipe

__all__ = [
    "CacheLayer",
    "CrossLayer",
    "DMCLayer",
    "DMSLayer",
    "DenseLayer",
    "ForeignLayer",
    "HybridLayer",
    "IndexerLayer",
    "LayerState",
    "PackedLayer",
    "PackedWindowLayer",
    "RecurrentLayer",
    "SharedLayer",
    "StaticLayer",
    "StaticWindowLayer",
    "TieredLayer",
    "WindowLayer",
    "build",
    "build_all",
]


def build_all(specs: Sequence[LayerSpec], recipe: Recipe) -> list[CacheLayer]:
    """The empty layers of one cache: those that a tier keeps share it.

    Raises:
        RecipeError: a recipe under which the model would compute something else.
        TierError: no file can be made where the recipe says.
    """
    learned = [term.name for term in recipe.policies if term.name in LEARNED]
    if learned and all(spec.compression is None for spec in specs):
        raise RecipeError(
            f"{recipe} does not fit this model: {learned[0]} is for models that were retrofitted "
            f"with it (mnemon.memory.retrofit, `mnemon retrofit`). Take the config of one, or a "
            f"policy that needs no training, e.g. h2o(keep=1024)."
        )
    tiering = Tiering.of(recipe)
    return [build(spec, recipe, tiering) for spec in specs]


def build(spec: LayerSpec, recipe: Recipe, tiering: Tiering | None = None) -> CacheLayer:
    """An empty layer that keeps what `spec` asks for, stored as `recipe` says.

    `tiering` keeps layers that keep every token; windows and states are small and stay.

    Raises:
        RecipeError: a recipe under which the model would compute something else.
    """
    if recipe.static_tokens is not None and spec.counts_keys:
        raise RecipeError(
            f"{recipe} does not fit this model: its attention takes every key it is handed for a "
            f"real one, and a preallocated layer has empty ones. Use the default recipe."
        )
    if spec.foreign is not None:
        if recipe.packed is not None:
            raise RecipeError(
                f"{recipe} does not fit this model: it has layers of a kind of its own that store "
                f"the model's dtype only. Use the default recipe."
            )
        return _foreign(spec.foreign, spec.foreign_static, recipe)
    if spec.keeps_nothing:
        return SharedLayer()
    recurrent = RecurrentLayer(spec.num_states) if spec.num_states else None
    if not spec.attends:
        assert recurrent is not None
        return recurrent
    attention = _attention(spec, recipe, tiering)
    indexer = None
    if spec.indexed:
        indexer = IndexerLayer(recipe.static_tokens if tiering is None else None)
    if recurrent is None and indexer is None:
        return attention
    return HybridLayer(attention, recurrent=recurrent, indexer=indexer)


def _foreign(
    make: Callable[[], Any], make_static: Callable[[int], Any] | None, recipe: Recipe
) -> CacheLayer:
    max_tokens = recipe.static_tokens
    if max_tokens is None:
        return ForeignLayer(make)
    if make_static is None:
        raise RecipeError(
            f"{recipe} does not fit this model: it has layers of a kind of its own that only "
            f"grow. Use the default recipe."
        )
    return ForeignLayer(partial(make_static, max_tokens), max_tokens)


def _attention(spec: LayerSpec, recipe: Recipe, tiering: Tiering | None) -> CacheLayer:
    if spec.compression is not None:
        return _compressing(spec, spec.compression, recipe, tiering)
    if tiering is not None and spec.window is None:
        return tiering.layer()
    max_tokens, form = recipe.static_tokens, recipe.packed
    if form is not None:
        return PackedLayer(form) if spec.window is None else PackedWindowLayer(spec.window, form)
    if max_tokens is None or tiering is not None:
        return DenseLayer() if spec.window is None else WindowLayer(spec.window)
    if spec.window is None:
        return StaticLayer(max_tokens)
    if spec.window >= max_tokens:
        return StaticLayer(max_tokens, is_sliding=True)
    return StaticWindowLayer(spec.window)


def _compressing(
    spec: LayerSpec, compression: Compression, recipe: Recipe, tiering: Tiering | None
) -> CacheLayer:
    """A layer of a retrofitted model, which refuses tokens that nothing was decided about."""
    form = recipe.packed
    others = [term.name for term in recipe.policies if term.name != compression.method]
    if recipe.static_tokens is not None or others:
        raise RecipeError(
            f"{recipe} does not fit a model that was retrofitted with {compression.method}, which "
            f"decides itself which tokens stay. Use the default recipe, a packed format, a tier "
            f"or both, e.g. 'int4 + disk'."
        )
    if spec.window is not None and (form is not None or tiering is not None):
        raise RecipeError(
            f"{recipe} does not fit a model that was retrofitted with {compression.method} and "
            f"sees {spec.window} tokens at most. Use the default recipe."
        )
    make = DMCLayer if compression.method == "dmc" else DMSLayer
    frozen = None if tiering is None else tiering.slots()
    return make(compression.window, sliding=spec.window, form=form, strict=True, frozen=frozen)
