"""What a cache is as a list of tensors: the names, the order, and the way there and back.

    past_key_values.0.key      [batch, kv_heads, past, head_dim]     layer that keeps every token
    past_key_values.1.key      [batch, kv_heads, stored, head_dim]   window: the newest ones
    past_key_values.2.conv.0   [batch, channels, kernel]             a state
    past_key_values.0.cross.key  [batch, kv_heads, source, head_dim]   the encoder's

Going there and back runs no operator where a layer keeps what a graph takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemon.cache import Cache
from mnemon.errors import ExportError
from mnemon.export.kinds import (
    Dense,
    Packed,
    Part,
    Slot,
    State,
    States,
    Static,
    Window,
    part_from_json,
    read_states,
)
from mnemon.export.kinds.base import read_pair, write_pair
from mnemon.export.kinds.dense import pair_slots
from mnemon.hf.exporting import DynamicCache, EncoderDecoderCache
from mnemon.hf.kinds import LayerSpec, decoder_config, is_encoder_decoder, layer_specs
from mnemon.hf.names import PreTrainedConfig
from mnemon.recipe import Recipe, parse

__all__ = ["CacheForm", "accept_cache", "form_of", "form_supports", "part_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheForm:
    """The layers of a model's cache, as tensors.

    Args:
        layers: the parts of each decoder layer; none where it keeps nothing.
        cross: keys and values of the encoder beside every layer's own; empty without an encoder.
        recipe: how the cache is stored; empty for a cache that grows in the model's dtype.
    """

    layers: tuple[tuple[Part, ...], ...]
    cross: tuple[Dense, ...] = ()
    recipe: str = ""

    @property
    def parts(self) -> list[tuple[int, Part, str]]:
        """Every part: the index of its layer, the part, and the symbol of its token axis."""
        windows = {part.window for layer in self.layers for part in layer if part.kind == "window"}
        found = []
        for index, layer in enumerate(self.layers):
            for part in layer:
                tokens = "past"
                if isinstance(part, Window) and (self.keeps_all or len(windows) > 1):
                    tokens = "stored" if len(windows) == 1 else f"stored_{part.window}"
                found.append((index, part, tokens))
        return found

    @property
    def own_slots(self) -> list[Slot]:
        """The decoder's own tensors, in order."""
        return [slot for index, part, tokens in self.parts for slot in part.slots(index, tokens)]

    @property
    def has_cross(self) -> bool:
        """Whether an encoder's keys and values stand beside every layer's own."""
        return bool(self.cross)

    @property
    def cross_slots(self) -> list[Slot]:
        """The encoder's keys and values, in order; empty without an encoder."""
        return [
            slot
            for index, part in enumerate(self.cross)
            for slot in pair_slots(
                index, part.kv_heads, "source", part.key_dim, part.value_dim, "cross."
            )
        ]

    @property
    def windows(self) -> dict[str, int]:
        """Most tokens of every token axis that is bounded, by its name."""
        bounds: dict[str, int] = {}
        for _, part, tokens in self.parts:
            bounds |= part.bounds(tokens)
        return bounds

    @property
    def lengths(self) -> list[int]:
        """Numbers of tokens at which a layer starts to do something else."""
        return sorted({length for _, part, _ in self.parts for length in part.lengths()})

    @property
    def keeps_all(self) -> bool:
        """Whether a layer keeps every token, so that the cache says how many were seen."""
        return any(part.keeps_all for layer in self.layers for part in layer)

    @property
    def takes_one_token(self) -> bool:
        """Whether the graph takes one token at a time."""
        return any(part.takes_one_token for layer in self.layers for part in layer)

    @property
    def is_static(self) -> bool:
        """Whether keys and values are in the graph's own memory."""
        return any(part.is_static for layer in self.layers for part in layer)

    @property
    def room(self) -> int | None:
        """Tokens that the graph's own memory has room for."""
        found = [p.num_tokens for layer in self.layers for p in layer if isinstance(p, Static)]
        return min(found, default=None)

    @property
    def total(self) -> str:
        """What the mask covers, as a sum of symbols."""
        names = {part.kind for layer in self.layers for part in layer}
        return "64*blocks + tail + query" if "packed" in names else "past + query"

    def sizes(self, num_tokens: int) -> dict[str, int]:
        """The sizes of the cache's own symbols after `num_tokens` tokens."""
        found: dict[str, int] = {}
        for _, part, tokens in self.parts:
            found |= part.sizes(num_tokens, tokens)
        return found

    def empty(
        self, batch: int, dtype: torch.dtype, device: torch.device | str, num_tokens: int = 0
    ) -> list[Tensor]:
        """The decoder's own tensors before the first token, or zeros of a later shape."""
        sizes = {"batch": batch, **self.sizes(num_tokens)}
        return [
            torch.zeros(slot.shape(sizes), dtype=slot.torch_dtype(dtype), device=device)
            for slot in self.own_slots
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts."""
        return {
            "layers": [[part.to_json() for part in layer] for layer in self.layers],
            "cross": [part.to_json() for part in self.cross],
            "recipe": self.recipe,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CacheForm":
        """The reverse of `to_json`."""
        cross = [part_from_json(part) for part in facts["cross"]]
        if not all(isinstance(part, Dense) for part in cross):
            raise ValueError("an encoder's keys of another kind than dense")
        return cls(
            layers=tuple(tuple(part_from_json(part) for part in one) for one in facts["layers"]),
            cross=tuple(part for part in cross if isinstance(part, Dense)),
            recipe=str(parse(str(facts["recipe"]))) if facts["recipe"] else "",
        )

    # -- caches there and back -------------------------------------------------------------------

    def tensors(self, cache: Any) -> list[Tensor]:
        """The decoder's own tensors of a filled cache: its very tensors where they lie whole.

        Raises:
            ExportError: a cache of another model, an empty one, or a class that is not known.
        """
        layers = self._layers_of(cache)
        found: list[Tensor] = []
        for index, part, _ in self.parts:
            found += part.read(layers[index], index)
        return found

    def _layers_of(self, cache: Any) -> Sequence[Any]:
        own = getattr(cache, "self_attention_cache", cache)
        layers = getattr(own, "layers", own)
        if not isinstance(layers, Sequence) or len(layers) != len(self.layers):
            held = len(layers) if isinstance(layers, Sequence) else "no"
            raise ExportError(
                f"A {type(cache).__name__} with {held} layers came; the exported model has "
                f"{len(self.layers)}. Pass a mnemon.Cache or a DynamicCache."
            )
        return layers

    def cross_tensors(self, cache: Any) -> list[Tensor]:
        """The encoder's tensors of a filled pair of caches."""
        found: list[Tensor] = []
        for layer in cache.cross_attention_cache.layers if self.has_cross else ():
            if layer.keys is None:
                raise ExportError("The cache holds no encoder keys; encode the input first.")
            found += read_pair(layer, 0)
        return found

    def fill(self, cache: Any, tensors: Sequence[Tensor], num_tokens: int) -> Any:
        """Put the decoder's own tensors into a cache of any known class; returns it.

        Args:
            cache: a `mnemon.Cache` (pairs included), a ``DynamicCache``, or an
                ``EncoderDecoderCache`` of those.
            tensors: in the order of `own_slots`.
            num_tokens: tokens seen.
        """
        own = getattr(cache, "self_attention_cache", cache)
        for index, part, mine in self.grouped(tensors):
            part.write(own.layers[index], mine, num_tokens)
        return cache

    def grouped(self, tensors: Sequence[Tensor]) -> list[tuple[int, Part, list[Tensor]]]:
        """The decoder's own tensors by part: the index of its layer, the part, its tensors."""
        rest = list(tensors)
        found = []
        for index, part, tokens in self.parts:
            count = len(part.slots(index, tokens))
            found.append((index, part, rest[:count]))
            rest = rest[count:]
        assert not rest
        return found

    def fill_cross(self, cache: Any, tensors: Sequence[Tensor]) -> Any:
        """The same for the encoder's tensors."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        for index, (keys, values) in enumerate(pairs):
            write_pair(cache.cross_attention_cache.layers[index], keys, values, keys.shape[2])
            cache.is_updated[index] = True
        return cache


def part_names(
    form: CacheForm, part: str, extras: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and outputs of a graph: "decoder" or "encoder", in order."""
    if part == "encoder":
        return ("input_ids", "attention_mask"), tuple(slot.name for slot in form.cross_slots)
    prefix = "decoder_" if form.has_cross else ""
    # The mask after the cache: torch's check of inputs solves a sum for its symbols as they come,
    # and finds no solution that is 0.
    inputs = [f"{prefix}input_ids", *(slot.name for slot in form.own_slots)]
    inputs += [f"{prefix}attention_mask", *(slot.name for slot in form.cross_slots)]
    inputs += ["attention_mask"] if form.has_cross else []
    outputs = ("logits", *(slot.output for slot in form.own_slots))
    return (*inputs, *extras), outputs


def form_of(config: PreTrainedConfig, shapes: Cache, recipe: Recipe) -> CacheForm:
    """The form of a model's cache.

    Args:
        config: the model's config.
        shapes: a growing mnemon cache that the model filled with at least one token.
        recipe: how the graph is to keep it.

    Raises:
        ExportError: a layer that has no graph form.
    """
    layers: list[tuple[Part, ...]] = []
    cross: list[Dense] = []
    for index, (spec, layer) in enumerate(zip(layer_specs(config), shapes.layers, strict=True)):
        if spec.foreign is not None or spec.indexed:
            kept = "indexer keys" if spec.indexed else "what only its own file knows"
            raise ExportError(
                f"Layer {index} of a {decoder_config(config).model_type!r} model keeps {kept}: it "
                f"has no form with free lengths in a graph."
            )
        parts: list[Part] = []
        pair = layer.view() if spec.attends else None
        if pair is not None:
            parts.append(_tokens_part(spec, pair[0], pair[1], recipe, index))
        if spec.num_states:
            found = read_states(layer)
            states = tuple(
                State(
                    role=role,
                    index=number,
                    shape=tuple(state.shape[1:]),
                    dtype=str(state.dtype).removeprefix("torch."),
                )
                for (role, number), state in found.items()
            )
            if not states:
                raise ExportError(f"Layer {index} kept no state of the first token.")
            parts.append(States(states=states))
        layers.append(tuple(parts))
    if is_encoder_decoder(config):
        for layer in shapes.cross_attention_cache.layers:  # type: ignore[attr-defined]
            keys, values = read_pair(layer, 0)
            heads, key_dim, value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
            cross.append(Dense(kv_heads=heads, key_dim=key_dim, value_dim=value_dim))
    return CacheForm(layers=tuple(layers), cross=tuple(cross), recipe=_plain(recipe))


def _tokens_part(spec: LayerSpec, keys: Tensor, values: Tensor, recipe: Recipe, index: int) -> Part:
    sizes = {
        "kv_heads": int(keys.shape[1]),
        "key_dim": int(keys.shape[-1]),
        "value_dim": int(values.shape[-1]),
    }
    if recipe.static_tokens is not None:
        return Static(**sizes, num_tokens=recipe.static_tokens)
    if recipe.packed is not None:
        if spec.window is not None:
            raise ExportError(
                f"Layer {index} has a window of {spec.window} tokens: packed windows have no form "
                f"in a graph (blocks of 64 tokens leave them one token at a time). Leave the "
                f"format out, or use static(n)."
            )
        return Packed(**sizes, form=recipe.packed)
    if spec.window is not None:
        return Window(**sizes, window=spec.window)
    return Dense(**sizes)


def _plain(recipe: Recipe) -> str:
    text = str(recipe)
    return "" if text == "dense" else text


def accept_cache(form: CacheForm, config_of: Callable[[], PreTrainedConfig], cache: Any) -> Any:
    """A cache that a graph can be fed from and whose tensors it may replace; made for None.

    An empty ``DynamicCache()`` gets the layers of the model, as the model itself would do. The
    config is asked for only where a cache is made of it.

    Raises:
        ExportError: a class or a recipe that has no form in a graph, or another model's cache.
    """
    if cache is None:
        return Cache(config_of(), form.recipe)
    if isinstance(cache, Cache):
        if _plain(cache.recipe) != form.recipe:
            form_supports(cache)
            raise ExportError(
                f"The cache is of the recipe {_plain(cache.recipe) or 'dense'}; the export keeps "
                f"{form.recipe or 'dense'}. Make it by mnemon.Cache(config, {form.recipe!r})."
            )
        if hasattr(cache, "cross_attention_cache") != form.has_cross:
            has = "has no" if form.has_cross else "has an"
            raise ExportError(
                f"The cache is of another model: it {has} encoder's part, the exported one the "
                f"reverse."
            )
        if len(cache.layers) != len(form.layers):
            raise ExportError(
                f"The cache has {len(cache.layers)} layers; the model has {len(form.layers)}."
            )
        return cache
    if form.recipe:
        raise ExportError(
            f"A {type(cache).__name__} came; the export keeps {form.recipe}, which a mnemon.Cache "
            f"of that recipe alone can hold."
        )
    own = cache
    if form.has_cross:
        if not isinstance(cache, EncoderDecoderCache):
            raise ExportError(
                f"A {type(cache).__name__} came; a model with an encoder takes a mnemon.Cache or "
                f"an EncoderDecoderCache."
            )
        own = cache.self_attention_cache
        _accept_dynamic(form, config_of, cache.cross_attention_cache, windows=False)
    _accept_dynamic(form, config_of, own, windows=True)
    return cache


def _accept_dynamic(
    form: CacheForm, config_of: Callable[[], PreTrainedConfig], cache: Any, *, windows: bool
) -> None:
    if type(cache) is not DynamicCache:
        raise ExportError(
            f"A {type(cache).__name__} came; expected a mnemon.Cache (of the recipe ''), a "
            f"DynamicCache, or None for an empty one."
        )
    empty = not cache.layers or all(getattr(layer, "keys", None) is None for layer in cache.layers)
    if empty:
        cache.layers[:] = DynamicCache(config=config_of()).layers
        cache.layer_class_to_replicate = None
    if len(cache.layers) != len(form.layers):
        raise ExportError(
            f"The cache has {len(cache.layers)} layers; the model has {len(form.layers)}."
        )
    for index, (layer, parts) in enumerate(zip(cache.layers, form.layers, strict=True)):
        slides = getattr(layer, "is_sliding", False)
        for part in parts:
            if windows and isinstance(part, Window) and not slides:
                raise ExportError(
                    f"Layer {index} of this DynamicCache keeps every token, the model's has a "
                    f"window of {part.window}: it was made without a config. Make it by "
                    f"DynamicCache(config=model.config)."
                )


def form_supports(cache: Any) -> Recipe:
    """The recipe of a cache, a class or a recipe that has a form in a graph.

    Raises:
        ExportError: it has none; the message says why.
    """
    if cache is None or isinstance(cache, DynamicCache | EncoderDecoderCache | Cache):
        recipe = getattr(cache, "recipe", None) or parse("")
    elif isinstance(cache, str | Recipe):
        recipe = parse(cache)
    elif isinstance(cache, type) and issubclass(cache, Cache | DynamicCache):
        recipe = parse("")
    else:
        raise ExportError(f"cache={cache!r}: expected a recipe, a mnemon.Cache or a DynamicCache.")
    if recipe.tier is not None:
        raise ExportError(
            f"The recipe {recipe} has no form in a graph: a graph reads what lies in memory. Leave "
            f"the tier out."
        )
    if recipe.policies:
        raise ExportError(
            f"The recipe {recipe} has no form in a graph: which tokens stay is decided while "
            f"attention runs. Leave the policy out."
        )
    return recipe
