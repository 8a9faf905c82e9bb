"""The newest tokens only, bounded for ever: sliding-window and chunked attention."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import check_mergeable, check_windows, gather_state, make_fit, stack_right
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["WindowLayer"]

#: What recording keeps at most besides the window, when nobody calls `crop`.
MAX_RECORDED = 1024


@final
class WindowLayer(CacheLayer):
    """The last `window - 1` tokens, which is what the next token can still see.

    ::

        seen:   0 ........................................ num_tokens
        stored:                     [recorded][ window - 1 ]
        append of n returns:                  [ window - 1 ][ n ]

    `crop` works while the window has not let go of what it needs, and always for what was
    appended since `set_recording(True)` or the last `crop` (at most `MAX_RECORDED` tokens, or the
    last append if that is longer), so recording is bounded too. After `record_last` it works for
    the last append also (at most `MAX_RECORDED` tokens of it). `keep` raises `UnsupportedVerb`: the
    mask binds positions to slots.

    Args:
        window: tokens that a query sees, itself included (``config.sliding_window``, or
            ``attention_chunk_size``).
    """

    kind = "window"
    is_sliding = True
    is_pair = True

    def __init__(self, window: int) -> None:
        if window < 1:
            raise CacheError(f"A window holds at least 1 token; got {window}.")
        self.window = window
        self._keys = TokenBuffer()
        self._values = TokenBuffer()
        self._seen = 0
        self._recording = False
        self._records_last = False
        self._uncommitted = 0  # tokens since recording began or crop was called

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        num_new, stored = keys.shape[-2], len(self._keys)
        if (
            not self._keys.fits(keys)
            or not self._values.fits(values)
            or values.shape[-2] != num_new
        ):
            make_fit(self, (self._keys, keys), (self._values, values))
        past = min(stored, self.window - 1)
        kept = self.window - 1
        if self._recording:
            recorded = self._uncommitted + num_new
            kept += recorded if recorded <= MAX_RECORDED else max(MAX_RECORDED, num_new)
        elif self._records_last:
            kept += min(num_new, MAX_RECORDED)
        if num_new > self.window:
            result = (
                self._append_long(self._keys, keys, past, kept),
                self._append_long(self._values, values, past, kept),
            )
        else:
            result = (
                self._append_short(self._keys, keys, past, kept),
                self._append_short(self._values, values, past, kept),
            )
        self._seen += num_new
        if self._recording:
            self._uncommitted += num_new
        return result

    @staticmethod
    def _append_short(buffer: TokenBuffer, new: torch.Tensor, past: int, kept: int) -> torch.Tensor:
        buffer.append(new)
        visible = buffer.tail(past + new.shape[-2])
        if len(buffer) > kept:
            buffer.drop_first(len(buffer) - kept)
        return visible

    @staticmethod
    def _append_long(buffer: TokenBuffer, new: torch.Tensor, past: int, kept: int) -> torch.Tensor:
        """More tokens than the window: store the end only, hand out everything once."""
        num_new = new.shape[-2]
        stored = buffer.live()
        visible = new if stored is None else torch.cat([buffer.tail(past), new], dim=-2)
        old = min(max(kept - num_new, 0), len(buffer))
        ending = visible.narrow(-2, visible.shape[-2] - min(kept, num_new), min(kept, num_new))
        buffer.replace(torch.cat([buffer.tail(old), ending], dim=-2) if old else ending)
        return visible

    def view(self) -> tuple[Keys, Values] | None:
        if self._keys.is_empty:
            return None
        past = min(len(self._keys), self.window - 1)
        return self._keys.tail(past), self._values.tail(past)

    @property
    def num_tokens(self) -> int:
        return self._seen

    @property
    def num_stored(self) -> int:
        return len(self._keys)

    @property
    def max_length(self) -> int:
        return self.window

    def mask_sizes(self, num_new: int) -> MaskSizes:
        past = min(len(self._keys), self.window - 1)
        return past + num_new, self._seen - past

    def can_crop(self, num_tokens: int) -> bool:
        left = self._seen - num_tokens
        return (
            0 <= num_tokens
            and 0 <= left
            and (len(self._keys) - num_tokens >= min(left, self.window - 1))
        )

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens from a window of {self.window}: of the "
                f"{self._seen} tokens seen, the newest {len(self._keys)} are stored and the window "
                f"needs the {self.window - 1} before the cut. Call activate_past_recording() "
                f"before appending what may be taken back, or reset() and prefill again."
            )
        if num_tokens:
            self._keys.crop(num_tokens)
            self._values.crop(num_tokens)
            self._seen -= num_tokens
        self._commit()

    def set_recording(self, on: bool) -> None:
        self._recording = on
        self._commit()

    def record_last(self) -> None:
        self._records_last = True

    def _commit(self) -> None:
        self._uncommitted = 0
        excess = len(self._keys) - (self.window - 1)
        if excess > 0:
            self._keys.drop_first(excess)
            self._values.drop_first(excess)

    @property
    def is_recording(self) -> bool:
        return self._recording

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb("A window layer decides itself what to keep: no keep().")

    def reset(self) -> None:
        self._keys.clear()
        self._values.clear()
        self._seen, self._uncommitted, self._recording = 0, 0, False

    @property
    def batch_size(self) -> int:
        return self._keys.batch_size

    def reorder(self, index: torch.Tensor) -> None:
        self._keys.gather_rows(index)
        self._values.gather_rows(index)

    def select(self, index: torch.Tensor) -> None:
        if not self._keys.is_empty:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence["WindowLayer"]) -> "WindowLayer":
        layers = [self, *others]
        merged = WindowLayer(self.window)
        if check_mergeable(layers):
            check_windows([layer.window for layer in layers])
            merged._seen = max(layer._seen for layer in layers)
            stored = min(merged._seen, self.window - 1)
            ends = [min(len(layer._keys), stored) for layer in layers]
            pairs = list(zip(layers, ends, strict=True))
            merged._keys.replace(stack_right([one._keys.tail(n) for one, n in pairs], stored))
            merged._values.replace(stack_right([one._values.tail(n) for one, n in pairs], stored))
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "WindowLayer":
        other = WindowLayer(self.window)
        if not self._keys.is_empty:
            rows = row_index(torch.tensor([row]), self.batch_size)
            other._seen = self._seen - num_padding
            stored = min(len(self._keys), other._seen)
            for source, target in ((self._keys, other._keys), (self._values, other._values)):
                tail = source.tail(stored)
                target.replace(tail.index_select(0, rows.to(tail.device)))
        return other

    def fork(self) -> "WindowLayer":
        other = WindowLayer(self.window)
        other._keys, other._values = self._keys.fork(), self._values.fork()
        other._seen, other._recording = self._seen, self._recording
        other._uncommitted = self._uncommitted
        other._records_last = self._records_last
        return other

    def state(self) -> LayerState:
        keys, values = self._keys.live(), self._values.live()
        tensors = {} if keys is None or values is None else {"keys": keys, "values": values}
        meta = {"num_tokens": self._seen, "window": self.window}
        return LayerState(kind=self.kind, tensors=tensors, meta=meta)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        keys, values = gather_state(state)
        seen, window = int(state.meta["num_tokens"]), int(state.meta["window"])
        stored = 0 if keys is None else keys.shape[-2]
        if window != self.window or not min(seen, window - 1) <= stored <= seen:
            raise CacheError(
                f"A saved window layer of {window} that saw {seen} tokens holds {stored}; this "
                f"layer's window is {self.window}."
            )
        self.reset()
        if keys is not None and values is not None:
            self._keys.adopt(keys)
            self._values.adopt(values)
        self._seen = seen

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def nbytes_reserved(self) -> int:
        return self._keys.nbytes_reserved + self._values.nbytes_reserved
