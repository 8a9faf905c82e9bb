"""The newest tokens only, in a few bits per number: sliding-window and chunked attention."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError
from mnemon.layers.base import LayerState, row_index
from mnemon.layers.packed import PackedLayer, check_formats, check_shapes
from mnemon.layers.packed_pair import (
    append_pair,
    dense_pair,
    fill_pair,
    new_pair,
    pair_facts,
    pair_tensors,
)
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.sliding import SlidingLayer
from mnemon.layers.tokens import check_mergeable, check_windows
from mnemon.schemes import PackedFormat
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["PackedWindowLayer"]


@final
class PackedWindowLayer(SlidingLayer):
    """The last `window - 1` tokens, packed but for the newest; see `SlidingLayer`.

    ::

        stored    [ block of which some tokens are gone | blocks ... ][ tail ]

    Whole blocks go at the front as the window moves on; nothing is quantized again for it.

    Args:
        window: tokens that a query sees, itself included.
        form: how keys and values are stored.
    """

    kind = "packed_window"

    _keys: PackedBuffer
    _values: PackedBuffer

    def __init__(self, window: int, form: PackedFormat) -> None:
        super().__init__(window)
        self.form = form
        self._keys, self._values = new_pair(form)

    def unbounded(self) -> PackedLayer:
        return PackedLayer(self.form)

    def _empty(self) -> "PackedWindowLayer":
        return PackedWindowLayer(self.window, self.form)

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        num_new, past = keys.shape[-2], min(len(self._keys), self.window - 1)
        kept = self._num_kept(num_new)
        pair = append_pair(self, (self._keys, keys), (self._values, values), kept, past + num_new)
        excess = len(self._keys) - kept
        if excess > 0:
            self._keys.drop_first(excess)
            self._values.drop_first(excess)
        self._count(num_new)
        return pair

    def merge(self, others: Sequence["PackedWindowLayer"]) -> "PackedWindowLayer":
        layers = [self, *others]
        merged = self._empty()
        if check_mergeable(layers):
            check_windows([layer.window for layer in layers])
            check_formats([layer.form for layer in layers])
            merged._seen = max(layer._seen for layer in layers)
            stored = min(merged._seen, self.window - 1)
            trimmed = [layer.fork() for layer in layers]
            for layer in trimmed:
                layer._keys.drop_first(max(len(layer._keys) - stored, 0))
                layer._values.drop_first(max(len(layer._values) - stored, 0))
            pairs = [[layer._keys for layer in trimmed], [layer._values for layer in trimmed]]
            check_shapes(pairs)
            merged._keys, merged._values = (PackedBuffer.merged(pair, stored) for pair in pairs)
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "PackedWindowLayer":
        other = self._empty()
        if not self._keys.is_empty:
            rows = row_index(torch.tensor([row]), self.batch_size)
            other._seen = self._seen - num_padding
            excess = max(len(self._keys) - other._seen, 0)
            other._keys, other._values = self._keys.row(rows), self._values.row(rows)
            other._keys.drop_first(excess)
            other._values.drop_first(excess)
        return other

    def dense_pair(self) -> tuple[Keys, Values]:
        return dense_pair(self._keys, self._values)

    @property
    def stored_as(self) -> str:
        return "" if self._keys.is_empty else self.form.name

    def state(self) -> LayerState:
        meta = {"num_tokens": self._seen, "window": self.window}
        return LayerState(
            kind=self.kind,
            tensors=pair_tensors(self._keys, self._values),
            meta=meta | pair_facts(self._keys, self._values),
        )

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        seen, window = int(state.meta["num_tokens"]), int(state.meta["window"])
        keys, values = new_pair(self.form)
        fill_pair(keys, values, state)
        stored = len(keys)
        if window != self.window or not min(seen, window - 1) <= stored <= seen:
            raise CacheError(
                f"A saved window layer of {window} that saw {seen} tokens holds {stored}; this "
                f"layer's window is {self.window}."
            )
        self.reset()
        self._keys, self._values, self._seen = keys, values, seen
