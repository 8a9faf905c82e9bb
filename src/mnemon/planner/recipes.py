"""Bytes of a cache under a recipe, and what fits in a memory."""

from __future__ import annotations

from typing import NamedTuple

from mnemon.bounds import Bound
from mnemon.errors import PlanError
from mnemon.planner.layers import LayerPlan, ModelPlan
from mnemon.schemes import BLOCK_TOKENS, PackedFormat

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DTYPES = tuple(ITEM_BYTES)
_MOST_TOKENS = 1 << 40


class CachePlan(NamedTuple):
    """Bytes of one cache.

    Attributes:
        recipe: canonical text of the recipe.
        stored_bytes: `Cache.nbytes` once `context` tokens are in.
        reserved_bytes: what is set aside for them. For `static(n)` it is `Cache.nbytes_reserved`;
            for a cache that grows it is the stored bytes (its reserve depends on the device).
        token_bytes: what one more token adds to the stored bytes, at that length; of a packed
            format the mean over a block of 64.
    """

    recipe: str
    stored_bytes: int
    reserved_bytes: int
    token_bytes: int


def plan_cache(
    model: ModelPlan,
    context: int,
    batch: int = 1,
    *,
    dtype: str = "bfloat16",
    static: int | None = None,
    packed: PackedFormat | None = None,
    bound: Bound | None = None,
    source: int | None = None,
) -> CachePlan:
    """Compute the bytes of a cache that holds `context` tokens of `batch` rows.

    Of a packed format they are what the cache stores after a prompt of that length; a window that
    moves on afterwards may hold up to one block more.

    Args:
        model: from `plan_model`.
        context: tokens per row.
        batch: rows.
        dtype: the dtype the model runs in.
        static: n of the recipe `static(n)` (`Recipe.static_tokens`); None for the default recipe.
        packed: how keys and values are quantized (`Recipe.packed`); None for the model's dtype.
        bound: how many tokens a policy lets a layer hold (`Recipe.bound`); None for all. Stored are
            then those left after a prompt, reserved as many as may come before the next drop;
            while a prompt runs, one layer at a time holds all of its tokens.
        source: encoder tokens per row of an encoder-decoder; None for as many as `context`, or
            what the model fixes.

    Raises:
        PlanError: a dtype or length that cannot be, or more tokens than `static(n)` holds.
    """
    recipe = "dense" if static is None else f"static({static})"
    recipe = recipe if packed is None else packed.name
    if dtype not in ITEM_BYTES:
        raise PlanError(f"unknown dtype {dtype!r}; valid are {', '.join(ITEM_BYTES)}.")
    if context < 1 or batch < 1:
        raise PlanError(f"context and batch are at least 1; got {context} and {batch}.")
    if static is not None and context > static:
        raise PlanError(f"{recipe} holds {static} tokens; a context of {context} does not fit.")
    item = ITEM_BYTES[dtype]
    stored = reserved = growth = 0
    for layer, count in _counted(model.layers):
        states = _state_bytes(layer, item)
        if bound is not None and layer.is_boundable:
            held, most = _held(bound, context), min(context, bound.most(context))
            sizes = [
                _bounded(layer, tokens, packed, item)
                + layer.shape.heads * tokens * bound.score_bytes
                for tokens in (held, most)
            ]
            stored += (sizes[0] + states) * count
            reserved += (sizes[1] + states) * count
            later = _bounded(layer, most + BLOCK_TOKENS, packed, item) - sizes[1]
            later += layer.shape.heads * (most + BLOCK_TOKENS) * bound.score_bytes
            growth += int(later // BLOCK_TOKENS * _share(bound, context)) * count
            continue
        if packed is not None:
            held, later = (
                _packed(layer, tokens, packed, item) for tokens in (context, context + BLOCK_TOKENS)
            )
            stored += (held + states) * count
            reserved += (held + states) * count
            growth += (later - held) // BLOCK_TOKENS * count
            continue
        row_bytes = _stored(layer, context, static) * item + states
        stored += row_bytes * count
        reserved += (_reserved(layer, context, static) * item + states) * count
        later = _stored(layer, context + 1, None) - _stored(layer, context, None)
        growth += later * item * count
    if source is None:
        source = context if model.source_tokens is None else model.source_tokens
    cross = model.cross_values * source * item
    return CachePlan(recipe, (stored + cross) * batch, (reserved + cross) * batch, growth * batch)


def max_context(
    model: ModelPlan,
    available_bytes: int,
    batch: int = 1,
    *,
    dtype: str,
    static: bool = False,
    packed: PackedFormat | None = None,
    bound: Bound | None = None,
) -> int | None:
    """The most tokens per row whose cache fits; None if no length is too long.

    Args:
        static: for `static(n)` with n the answer, instead of a cache that grows.
        packed: how keys and values are quantized.
        bound: how many tokens a policy lets a layer hold.
    """

    def fits(tokens: int) -> bool:
        slots = tokens if static else None
        plan = plan_cache(
            model, tokens, batch, dtype=dtype, static=slots, packed=packed, bound=bound
        )
        return plan.reserved_bytes <= available_bytes

    if not fits(1):
        return 0
    if fits(_MOST_TOKENS):
        return None
    low, high = 1, _MOST_TOKENS  # fits(low), not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def max_batch(row: CachePlan, available_bytes: int) -> int | None:
    """The most rows that fit, from the plan of one row; None if a row costs nothing."""
    if row.reserved_bytes == 0:
        return None
    return max(available_bytes, 0) // row.reserved_bytes


def _counted(layers: tuple[LayerPlan, ...]) -> list[tuple[LayerPlan, int]]:
    """Layers that keep the same, once, and how many they are."""
    counts: dict[LayerPlan, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return list(counts.items())


def _held(bound: Bound, tokens: int) -> int:
    """Tokens left of a prompt."""
    return tokens if tokens <= bound.most(tokens) else bound.least(tokens)


def _share(bound: Bound, tokens: int) -> float:
    """How many of the tokens that come stay, in the long run."""
    if tokens < bound.most(tokens):
        return 1.0
    return 0.0 if isinstance(bound.keep, int) else bound.keep


def _bounded(layer: LayerPlan, tokens: int, packed: PackedFormat | None, item: int) -> int:
    if packed is not None:
        return _packed(layer, tokens, packed, item)
    return _stored(layer, tokens, None) * item


def _packed(layer: LayerPlan, tokens: int, form: PackedFormat, item: int) -> int:
    """Bytes per row of packed keys and values, their dense tail, and indexer keys."""
    kept = tokens if layer.window is None else min(tokens, layer.window - 1)
    heads, key_dim, value_dim = layer.shape
    blocks = form.num_blocks(kept)
    tail = (kept - blocks * BLOCK_TOKENS) * (key_dim + value_dim) * item
    sides = ((form.keys, key_dim), (form.values, value_dim))
    stored = sum(side.scheme(width).stored_bytes(width, blocks) for side, width in sides if heads)
    return heads * (stored + tail) + layer.index_values * tokens * item


def _stored(layer: LayerPlan, tokens: int, capacity: int | None) -> int:
    """Numbers per row that depend on the length: keys and values, then indexer keys."""
    kept = tokens
    if layer.window is not None:
        kept = min(tokens, _window_keeps(layer.window, capacity))
    return layer.token_values * kept + layer.index_values * tokens


def _reserved(layer: LayerPlan, tokens: int, capacity: int | None) -> int:
    if capacity is None:
        return _stored(layer, tokens, None)
    slots = capacity if layer.window is None else min(layer.window, capacity)
    return layer.token_values * slots + layer.index_values * capacity


def _window_keeps(window: int, capacity: int | None) -> int:
    # A growing window keeps what the next token sees; a static one has a slot for that token too.
    return window - 1 if capacity is None else window


def _state_bytes(layer: LayerPlan, item: int) -> int:
    return layer.states.model_dtype * item + layer.states.float32 * 4
