"""`Cache`: all that a model keeps between two forward passes."""

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn, Self, cast

import torch
from transformers import PreTrainedModel

from mnemon import policies
from mnemon import recipe as recipes
from mnemon.cache.state import CacheState, Prefilled
from mnemon.cache.tokens import NamedTokens
from mnemon.errors import CacheError
from mnemon.hf.kinds import is_encoder_decoder, layer_specs
from mnemon.hf.names import PreTrainedConfig, removed_by
from mnemon.layers.base import CacheLayer, row_index
from mnemon.recipe import Recipe
from mnemon.report import Report, places, report
from mnemon.token_log import PADDING, TokenLog

__all__ = ["Cache"]


class Cache(NamedTokens):
    """All that a model keeps between two forward passes; pass it as ``past_key_values``.

    A real ``transformers.Cache`` that takes the shape of any config: dense, windowed, recurrent,
    hybrid, indexed, shared layers, and the pair of an encoder-decoder model (then also a
    ``transformers.EncoderDecoderCache``). Lengths are ints. Tokens are named by
    `mnemon.attach` or `mnemon.prefill`; what is put in by hand is `UNKNOWN`.

    Args:
        config: the model's config; of a multimodal model the text part is used.
        recipe: how it is stored, e.g. ``""`` (dense, grows in place), ``"static(4096)"``,
            ``"int4"``.

    Raises:
        RecipeError: a recipe that cannot be parsed or is not there yet.
        ModelError: not a config, or layers that nobody knows.

    Source:
        The cache contract of transformers 5.23 (``cache_utils.Cache``).
    """

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> Self:
        if cls is Cache and config is not None and is_encoder_decoder(config):
            from mnemon.cache.pair import EncoderDecoderCache  # it derives from this class

            return cast(Self, object.__new__(EncoderDecoderCache))
        return object.__new__(cls)

    def __init__(self, config: PreTrainedConfig, recipe: str | Recipe = "") -> None:
        parsed = recipes.parse(recipe)
        specs = layer_specs(config)
        self._init_state(config, parsed, policies.build_all(specs, parsed))

    def _init_state(
        self, config: PreTrainedConfig, recipe: Recipe, layers: list[CacheLayer]
    ) -> None:
        self._init_facade(layers)
        self.config = config
        self.recipe = recipe
        self._log = TokenLog()
        #: What besides tokens the content depends on (encoder input, images): set by the binding.
        self.content_key: str | None = None
        #: Leading tokens that a chunked prefill computed: set by the binding.
        self.prefilled: Prefilled | None = None
        #: The model whose forwards filled it: set by the binding.
        self.filled_by: weakref.ref[PreTrainedModel] | None = None
        #: How often that model's weights had been written when the first token was cached.
        self.filled_version: int | None = None

    @classmethod
    def _of(cls, config: PreTrainedConfig, recipe: Recipe, layers: list[CacheLayer]) -> "Cache":
        """A plain cache around ready-made layers."""
        cache = object.__new__(Cache)
        cache._init_state(config, recipe, layers)
        return cache

    # -- lengths and bytes -----------------------------------------------------------------------

    @property
    def _all_layers(self) -> Iterable[CacheLayer]:
        """Every layer, those of the cross cache included."""
        return self.layers

    @property
    def num_tokens(self) -> int:
        """Tokens seen (logical length). Without attention layers: tokens recorded."""
        layer = self._token_layer(0)
        return self._length_without_tokens() if layer is None else int(layer.num_tokens)

    def _length_without_tokens(self) -> int:
        return len(self._log)

    @property
    def num_stored(self) -> int:
        """Tokens kept by the layer that keeps most."""
        return max((layer.num_stored for layer in self.layers), default=0)

    @property
    def batch_size(self) -> int:
        """Rows; -1 while empty."""
        return max((layer.batch_size for layer in self.layers), default=-1)

    @property
    def nbytes(self) -> int:
        """Bytes stored, all layers."""
        return sum(layer.nbytes for layer in self._all_layers)

    def nbytes_by_place(self) -> dict[str, int]:
        """`nbytes` by where they lie: ``"device"``, ``"host"``, ``"disk"``."""
        return places(self._all_layers)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes allocated, all layers (on a CPU, reserve that is not yet used is not resident)."""
        return sum(layer.nbytes_reserved for layer in self._all_layers)

    def report(self) -> Report:
        """What the cache holds, by kind of layer: print it, or take ``to_dict()``."""
        return report(
            groups={"decoder": self.layers},
            title=f"{self.config.model_type} · {self.recipe}",
            num_tokens=self.num_tokens,
            num_known_tokens=self.num_known_tokens,
        )

    # -- going back ------------------------------------------------------------------------------

    def can_crop(self, num_tokens: int) -> bool:
        """Whether the newest `num_tokens` can be taken back leaving no trace."""
        return all(layer.can_crop(num_tokens) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, in every layer or in none.

        Args:
            tokens_to_remove: ``-n`` removes n tokens; 0 removes none and drops what was recorded
                for going back (transformers' convention). Up to transformers 5.18 a positive
                number is the final size, as it is for that release's own caches.

        Raises:
            CacheError: a positive number, or a layer that cannot go back so far.
        """
        # Some releases of transformers compute the number on the device.
        count = removed_by(int(tokens_to_remove), self.num_tokens)
        if count > self.num_tokens:
            raise CacheError(f"Cannot remove {count} tokens: the cache holds {self.num_tokens}.")
        left = self.num_tokens - count
        for layer in self.layers:
            if layer.batch_size > 0 and not layer.can_crop(count):
                layer.crop(count)  # raises with its own reason, before anything changed
        for layer in self.layers:
            if layer.batch_size > 0:
                layer.crop(count)
        if count:
            self._log.crop_to(max(left, 0))
            if self.prefilled is not None and self.prefilled.num_tokens > left:
                self.prefilled = replace(self.prefilled, num_tokens=max(left, 0))

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only the stored tokens at `indices` in every layer (int64 ``[kept]``, ascending).

        Raises:
            UnsupportedVerb: a layer whose positions are bound (window, state); nothing changed.
            CacheError: indices out of range, or the attention mask would no longer hide padding.
        """
        trial = self.fork()
        for layer in trial.layers:
            layer.keep(indices)
        self._check_padding_stays_hidden(indices)
        for layer in self.layers:
            layer.keep(indices)
        self.prefilled = None

    def _check_padding_stays_hidden(self, indices: torch.Tensor) -> None:
        # The mask's column that stands for stored token i is number (num_tokens - num_stored + i).
        hidden = (self.tokens == PADDING)[:, self.num_tokens - self.num_stored :]
        if not bool(hidden.any()):
            return
        indices = indices.to("cpu", torch.int64)
        after = hidden[:, hidden.shape[1] - indices.shape[-1] :]
        if indices.ndim == 1:
            moved = hidden[:, indices]
        else:
            moved = hidden[:, None].expand(*indices.shape[:2], -1).gather(-1, indices)
            after = after[:, None]
        if not bool((moved == after).all()):
            raise CacheError(
                "keep() would move padding to where the attention mask shows it, or tokens to "
                "where it hides them. Drop the tokens that are padding in any row, or extract() "
                "the rows first."
            )

    def reset(self) -> None:
        """Forget everything; preallocated memory stays."""
        for layer in self._all_layers:
            layer.reset()
        self._log = TokenLog()
        self.content_key = None
        self.prefilled = None
        self.filled_by = None
        self.filled_version = None

    def end_past_recording(self) -> None:
        """Undo `activate_past_recording`: windows are bounded again, nothing more can go back."""
        self._set_recording(False)

    # -- rows ------------------------------------------------------------------------------------

    def reorder(self, index: torch.Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; int64 ``[batch]`` (beam search)."""
        self._match_log_rows()
        index = row_index(index, max(self.batch_size, 0))
        for layer in self._all_layers:
            layer.reorder(index)
        self._log.gather(index)
        self.prefilled = None  # other rows: computed again, the bits may differ

    def repeat(self, repeats: int) -> None:
        """Each row `repeats` times, neighbours together: a prefix computed once serves beams."""
        if repeats < 1:
            raise CacheError(f"repeat takes a number of copies >= 1; got {repeats}.")
        self._match_log_rows()
        for layer in self._all_layers:
            layer.repeat(repeats)
        if repeats > 1:
            self.prefilled = None
        if self._log.batch_size > 0:
            self._log.gather(torch.arange(self._log.batch_size).repeat_interleave(repeats))

    def select(self, index: torch.Tensor) -> None:
        """Keep the rows at `index` (int64 or bool ``[rows]``), in that order."""
        self._match_log_rows()
        index = row_index(index, max(self.batch_size, self._log.batch_size, 0))
        for layer in self._all_layers:
            layer.select(index)
        self.prefilled = None
        self._log.gather(index)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """`reorder`, as transformers calls it."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`repeat`, as transformers calls it."""
        self.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """`select`, as transformers calls it."""
        self.select(indices)

    @classmethod
    def merge(cls, caches: Sequence["Cache"]) -> "Cache":
        """One cache with the rows of all `caches`, aligned at their newest token.

        Shorter ones are padded on the left: pass ``merged.attention_mask()``, extended by ones
        for the new tokens, to the model.

        Raises:
            CacheError: none given, or caches of different models, recipes or encoder lengths.
        """
        from mnemon.cache.merging import merge  # it asks the caches themselves

        return merge(caches)

    def extract(self, row: int) -> "Cache":
        """A cache with row `row` alone, without the padding on its left."""
        batch_size = self.batch_size
        if not -batch_size <= row < batch_size:
            raise CacheError(f"Row {row} asked for; the cache has {max(batch_size, 0)}.")
        tokens = self.tokens[row]
        padding = int((tokens == PADDING).to(torch.int64).cumprod(0).sum())
        other = self._like(
            [[layer.extract(row, padding) for layer in group] for group in self._groups()]
        )
        other._log = TokenLog.of(tokens[None, padding:])
        other.content_key = self.content_key
        other.filled_by, other.filled_version = self.filled_by, self.filled_version
        return other

    def fork(self) -> "Cache":
        """An independent cache with the same content; memory is copied when one of them writes."""
        other = self._like([[layer.fork() for layer in group] for group in self._groups()])
        other._log = self._log.fork()
        other.content_key = self.content_key
        other.prefilled = self.prefilled
        other.filled_by, other.filled_version = self.filled_by, self.filled_version
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        other = self.fork()
        memo[id(self)] = other
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "A cache is not pickled (loading a pickle runs code): use cache.save(path) and "
            "mnemon.load_cache(path, model), or cache.fork() for a copy."
        )

    def _groups(self) -> list[list[CacheLayer]]:
        """The decoder's layers, then those of the cross cache if there is one."""
        return [self.layers]

    def _like(self, groups: list[list[CacheLayer]]) -> "Cache":
        return Cache._of(self.config, self.recipe, groups[0])

    # -- state and files -------------------------------------------------------------------------

    def to_state(self) -> CacheState:
        """Everything the cache holds; tensors share its memory."""
        groups = [tuple(layer.state() for layer in group) for group in self._groups()]
        return CacheState(
            layers=groups[0],
            cross=groups[1] if len(groups) > 1 else (),
            tokens=self.tokens,
            meta={
                "content_key": self.content_key,
                "prefilled": None if self.prefilled is None else asdict(self.prefilled),
            },
        )

    @classmethod
    def from_state(
        cls, config: PreTrainedConfig, recipe: str | Recipe, state: CacheState
    ) -> "Cache":
        """A cache of `config` that holds `state`; tensors are borrowed until the first write.

        Raises:
            CacheError: the state does not fit the config, or contradicts itself.
        """
        cache = Cache(config, recipe)
        cache._load_state(state)
        return cache

    def _load_state(self, state: CacheState) -> None:
        groups, saved = self._groups(), [state.layers, state.cross]
        if state.cross and len(groups) == 1:
            raise CacheError("The state has an encoder's keys and the model has no encoder.")
        for group, states in zip(groups, saved, strict=False):
            if len(group) != len(states):
                raise CacheError(
                    f"The state has {len(states)} layers and the model {len(group)}: it was made "
                    f"for another model."
                )
            for layer, layer_state in zip(group, states, strict=True):
                layer.load_state(layer_state)
        lengths = {layer.num_tokens for layer in self.layers if layer.counts_tokens}
        if len(lengths) > 1:
            raise CacheError(f"The layers of the state disagree on its length: {sorted(lengths)}.")
        if lengths and state.tokens.shape[1] not in lengths:
            raise CacheError(
                f"The state names {state.tokens.shape[1]} tokens and its layers hold {lengths}."
            )
        self._log = TokenLog.of(state.tokens)
        self.content_key = state.meta.get("content_key")
        prefilled = state.meta.get("prefilled")
        self.prefilled = None if prefilled is None else Prefilled(**prefilled)

    @classmethod
    def from_legacy(
        cls,
        past: Iterable[Sequence[Any]],
        config: PreTrainedConfig | None = None,
        recipe: str | Recipe = "",
        *,
        num_tokens: int | None = None,
    ) -> "Cache":
        """A cache from the old form: a tuple with one entry per layer.

        The tensors are borrowed, not copied, until the first append (``static(n)`` copies).

        Args:
            past: per layer ``(keys, values)``, each ``[batch, kv_heads, tokens, width]``; with an
                encoder ``(keys, values, cross keys, cross values)``, where None stands for what
                was not encoded yet (two entries and no config: a decoder alone). With a config
                also Bloom's ``[batch * heads, width, tokens]`` and ``[batch * heads, tokens,
                width]``.
            config: the model's config: layers then take their kind (windows, shared layers) from
                it and are checked against it. None: every layer keeps every token.
            recipe: as for `Cache`.
            num_tokens: tokens seen, where every layer keeps a window only and the tuple may be
                what is left of more.

        Raises:
            CacheError: another layout, layers that contradict each other or the config, or a model
                that keeps states, which the old form has no place for.
        """
        from mnemon.cache.legacy_form import from_tuples  # it derives pairs from this class

        return from_tuples(past, config, recipe, num_tokens)

    def to_legacy(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The old form: ``(keys, values)`` per layer, four tensors with an encoder; views.

        A window layer gives what it stores, a packed layer dequantized copies; layers that keep
        nothing are left out; an empty cache gives ``()``.

        Raises:
            CacheError: a layer that keeps more than keys and values.
        """
        from mnemon.cache.legacy_form import to_tuples

        return to_tuples(self)

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the cache to a safetensors file, atomically (see `mnemon.files.save_cache`)."""
        from mnemon.files import save_cache  # files stands above cache

        save_cache(self, path, **options)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.config.model_type!r}, {str(self.recipe)!r}, "
            f"num_tokens={self.num_tokens}, batch_size={self.batch_size}, nbytes={self.nbytes})"
        )
