"""The newest tokens only, bounded for ever: sliding-window and chunked attention."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError
from mnemon.layers.base import LayerState, row_index
from mnemon.layers.dense import DenseLayer
from mnemon.layers.sliding import SlidingLayer
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import check_mergeable, check_windows, gather_state, make_fit, stack_right
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["WindowLayer"]


@final
class WindowLayer(SlidingLayer):
    """The last `window - 1` tokens in the model's dtype; see `SlidingLayer`."""

    kind = "window"

    _keys: TokenBuffer
    _values: TokenBuffer

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self._keys = TokenBuffer()
        self._values = TokenBuffer()

    def unbounded(self) -> DenseLayer:
        return DenseLayer()

    def _empty(self) -> "WindowLayer":
        return WindowLayer(self.window)

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        num_new, stored = keys.shape[-2], len(self._keys)
        if (
            not self._keys.fits(keys)
            or not self._values.fits(values)
            or values.shape[-2] != num_new
        ):
            make_fit(self, (self._keys, keys), (self._values, values))
        past, kept = min(stored, self.window - 1), self._num_kept(num_new)
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
        self._count(num_new)
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
