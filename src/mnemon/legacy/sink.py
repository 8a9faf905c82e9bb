"""`SinkCache`: the first tokens and a window, the keys between them turned back as they move."""

import functools
from collections.abc import Mapping
from typing import Any, final

import torch
from transformers import cache_utils

from mnemon.errors import CacheError, UnsupportedVerb

__all__ = ["SinkCache"]


class Rotations:
    """The angle by which rotary embeddings turn a key from one position to the next n.

    Models pass cos and sin of the tokens at hand, ``[batch, new, dim]``, or the whole table,
    ``[positions, dim]``. Two positions n apart give the turn by n, whatever positions they are.
    """

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._sin: torch.Tensor | None = None

    def note(self, cos: torch.Tensor, sin: torch.Tensor, num_positions: int) -> None:
        """Remember the first `num_positions` positions, as they come by."""
        if cos.ndim == 2:
            self._cos, self._sin = cos, sin
        elif self._cos is None or self._sin is None:
            self._cos, self._sin = cos[0], sin[0]
        elif self._cos.shape[0] < num_positions:
            self._cos = torch.cat([self._cos, cos[0]])
            self._sin = torch.cat([self._sin, sin[0]])

    def turn_back(self, keys: torch.Tensor, steps: int) -> torch.Tensor:
        """`keys` [batch, heads, tokens, dim] as they are `steps` positions earlier."""
        assert self._cos is not None
        assert self._sin is not None
        if self._cos.shape[0] <= steps:
            raise CacheError(
                f"SinkCache saw cos and sin of {self._cos.shape[0]} positions and has to move keys "
                f"by {steps}: give it a longer window, or fewer tokens at a time."
            )
        # cos(a - b), sin(a - b) from the angles a of position 0 and b of position `steps`.
        cos, sin = self._cos.float(), self._sin.float()
        turn_cos = (cos[0] * cos[steps] + sin[0] * sin[steps]).to(keys)
        turn_sin = (sin[0] * cos[steps] - cos[0] * sin[steps]).to(keys)
        half = keys.shape[-1] // 2
        turned = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
        return keys * turn_cos + turned * turn_sin


@final
class SinkLayer(cache_utils.DynamicLayer):
    """What one layer keeps: `num_sinks` first tokens and the newest, `window` in all."""

    is_sliding = False
    is_croppable = False

    def __init__(self, window: int, num_sinks: int, rotations: Rotations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.num_sinks, self._rotations = window, num_sinks, rotations

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given: Mapping[str, Any] | None = args[0] if args else kwargs.get("cache_kwargs")
        num_new, held = key_states.shape[-2], self.get_seq_length()
        if held == 0 or held + num_new < self.window:
            return super().update(key_states, value_states)
        if given is None:
            raise CacheError(
                "SinkCache moves keys to earlier positions and needs the model's cos and sin for "
                "it, in update(keys, values, layer_idx, {'sin': ..., 'cos': ...}). Modeling files "
                "up to 4.4x pass them; today's models do not and cannot use this cache: use "
                "DynamicCache, or a model with a window of its own."
            )
        first = held - (self.window - self.num_sinks - num_new)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        moved = keys[:, :, first:]
        if given.get("cos") is not None:
            width = given.get("partial_rotation_size") or moved.shape[-1]
            turned = self._rotations.turn_back(moved[..., :width], num_new)
            moved = torch.cat((turned, moved[..., width:]), dim=-1)
        sinks = slice(0, self.num_sinks)
        self.keys = torch.cat([keys[:, :, sinks], moved, key_states], dim=-2)
        self.values = torch.cat([values[:, :, sinks], values[:, :, first:], value_states], dim=-2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        held = self.get_seq_length()
        grows = held == 0 or held + count < self.window
        return (held + count if grows else self.window), 0

    def get_max_length(self) -> int:
        return self.window

    def get_max_cache_shape(self) -> int:
        return self.window

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedVerb(
            "SinkCache cannot take tokens back: those that its window pushed out are gone. Use "
            "DynamicCache."
        )


@final
class SinkCache(cache_utils.Cache):
    """Keeps the first tokens and a window and goes on for ever (StreamingLLM).

    Args:
        window_length: tokens kept in all, the sinks included.
        num_sink_tokens: first tokens that are always kept.

    Source:
        Xiao et al. 2023, arXiv:2309.17453; the arguments and lengths of transformers 4.36 to 4.48:
        `get_seq_length` is what is kept, `seen_tokens` what was seen.
    """

    #: Tokens seen; a plain number, as it was.
    _seen_tokens: int = 0

    def __init__(self, window_length: int, num_sink_tokens: int) -> None:
        if not 0 <= num_sink_tokens < window_length:
            raise CacheError(
                f"SinkCache keeps num_sink_tokens of window_length tokens; got {num_sink_tokens} "
                f"of {window_length}."
            )
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self._seen_tokens = 0
        self._rotations = Rotations()
        layer: Any = functools.partial(SinkLayer, window_length, num_sink_tokens, self._rotations)
        super().__init__(layer_class_to_replicate=layer)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == 0:
            self._seen_tokens += key_states.shape[-2]
            given = (args[0] if args else kwargs.get("cache_kwargs")) or {}
            if given.get("cos") is not None and given.get("sin") is not None:
                self._rotations.note(given["cos"], given["sin"], self.window_length)
        result: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return result

    @property
    def seen_tokens(self) -> int:
        return self._seen_tokens

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self._seen_tokens = 0
