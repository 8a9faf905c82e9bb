"""What sliding-window layers share: which tokens stay, and which can be taken back."""

from abc import abstractmethod
from typing import Self

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, MaskSizes, row_index
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.storage import TokenBuffer
from mnemon.types import Keys, Values

__all__ = ["MAX_RECORDED", "SlidingLayer"]

#: What recording keeps at most besides the window, when nobody calls `crop`.
MAX_RECORDED = 1024


class SlidingLayer(CacheLayer):
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

    is_sliding = True
    is_pair = True

    _keys: TokenBuffer | PackedBuffer
    _values: TokenBuffer | PackedBuffer

    def __init__(self, window: int) -> None:
        if window < 1:
            raise CacheError(f"A window holds at least 1 token; got {window}.")
        self.window = window
        self._seen = 0
        self._recording = False
        self._records_last = False
        self._uncommitted = 0  # tokens since recording began or crop was called

    @abstractmethod
    def unbounded(self) -> CacheLayer:
        """An empty layer that stores numbers alike and keeps every token."""

    @abstractmethod
    def _empty(self) -> Self:
        """A new layer like this one, holding nothing."""

    def _num_kept(self, num_new: int) -> int:
        """Tokens that stay stored, if there are as many, after an append of `num_new`."""
        kept = self.window - 1
        if self._recording:
            recorded = self._uncommitted + num_new
            kept += recorded if recorded <= MAX_RECORDED else max(MAX_RECORDED, num_new)
        elif self._records_last:
            kept += min(num_new, MAX_RECORDED)
        return kept

    def _count(self, num_new: int) -> None:
        """Note that `num_new` tokens were appended."""
        self._seen += num_new
        if self._recording:
            self._uncommitted += num_new

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

    def fork(self) -> Self:
        other = self._empty()
        other._keys, other._values = self._keys.fork(), self._values.fork()
        other._seen, other._recording = self._seen, self._recording
        other._uncommitted = self._uncommitted
        other._records_last = self._records_last
        return other

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def nbytes_reserved(self) -> int:
        return self._keys.nbytes_reserved + self._values.nbytes_reserved
