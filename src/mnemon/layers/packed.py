"""Every token, in a few bits per number; the newest ones in the model's dtype."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError
from mnemon.layers.base import LayerState, row_index
from mnemon.layers.packed_pair import (
    append_pair,
    dense_pair,
    fill_pair,
    new_pair,
    pair_facts,
    pair_tensors,
)
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.tokens import TokenLayer, check_mergeable
from mnemon.schemes import PackedFormat
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["PackedLayer", "check_formats", "check_shapes"]


@final
class PackedLayer(TokenLayer):
    """Keys and values packed in blocks of 64 tokens, behind them a dense tail.

    ::

        stored    [ packed blocks of 64 tokens ][ tail: residual .. residual + 63 tokens ]
        append    quantizes whole blocks that leave the residual, once attention has them as given

    All verbs work. `crop` into a block puts the rest of that block back into the tail, dequantized.
    `keep` and `merge` of different lengths move tokens to other blocks: where groups lie within a
    token their codes move unchanged, where they lie along a channel the tokens are quantized again.
    Gradients flow to what the tail holds, not into blocks.

    Args:
        form: how keys and values are stored.
    """

    kind = "packed"

    _keys: PackedBuffer
    _values: PackedBuffer

    def __init__(self, form: PackedFormat) -> None:
        self.form = form
        super().__init__()
        self._keys, self._values = new_pair(form)

    def _new_buffer(self) -> PackedBuffer:
        return PackedBuffer(self.form.keys, is_keys=True, residual=self.form.residual)

    def _empty(self) -> "PackedLayer":
        return PackedLayer(self.form)

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        pair = append_pair(self, (self._keys, keys), (self._values, values))
        if self._tail is not None:
            self._tail += keys.shape[-2]
        return pair

    def merge(self, others: Sequence["PackedLayer"]) -> "PackedLayer":
        layers = [self, *others]
        merged = self._empty()
        if check_mergeable(layers):
            check_formats([layer.form for layer in layers])
            if any(layer._dropped for layer in layers):
                raise CacheError("Cannot merge caches from which keep() dropped tokens.")
            longest = max(layer.num_stored for layer in layers)
            pairs = [[layer._keys for layer in layers], [layer._values for layer in layers]]
            check_shapes(pairs)
            merged._keys, merged._values = (PackedBuffer.merged(pair, longest) for pair in pairs)
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "PackedLayer":
        if self._dropped and num_padding:
            raise CacheError("Cannot remove padding: keep() dropped tokens before.")
        other = self._empty()
        if not self._keys.is_empty:
            rows = row_index(torch.tensor([row]), self.batch_size)
            other._keys, other._values = self._keys.row(rows), self._values.row(rows)
            other._keys.drop_first(num_padding)
            other._values.drop_first(num_padding)
        other._dropped, other._tail = self._dropped, self._tail
        return other

    def dense_pair(self) -> tuple[Keys, Values]:
        return dense_pair(self._keys, self._values)

    @property
    def stored_as(self) -> str:
        return "" if self._keys.is_empty else self.form.name

    def state(self) -> LayerState:
        meta = {"num_tokens": self.num_tokens, "tail": self._tail}
        return LayerState(
            kind=self.kind,
            tensors=pair_tensors(self._keys, self._values),
            meta=meta | pair_facts(self._keys, self._values),
        )

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        seen, tail = int(state.meta["num_tokens"]), state.meta.get("tail")
        keys, values = new_pair(self.form)
        fill_pair(keys, values, state)
        stored = len(keys)
        if seen < stored or (tail is not None and not 0 <= int(tail) <= stored):
            raise CacheError(
                f"A saved {self.kind} layer saw {seen} tokens and holds {stored} (newest {tail} "
                f"without a gap): the state contradicts itself."
            )
        self._keys, self._values = keys, values
        self._dropped, self._tail = seen - stored, None if tail is None else int(tail)


def check_formats(forms: Sequence[PackedFormat]) -> None:
    """Raise `CacheError` unless all are the same."""
    if len(set(forms)) > 1:
        raise CacheError(
            f"Cannot merge layers stored as {forms[0]} and as {set(forms) - {forms[0]}}."
        )


def check_shapes(pairs: Sequence[Sequence[PackedBuffer]]) -> None:
    """Raise `CacheError` unless the buffers of each list have heads, width, dtype in common."""
    for buffers in pairs:
        tails = [tail for buffer in buffers if (tail := buffer.tail_tokens()) is not None]
        first = tails[0]
        for other in tails[1:]:
            if other.shape[1] != first.shape[1] or other.shape[-1] != first.shape[-1]:
                raise CacheError(
                    f"Cannot merge layers of {first.shape[1]} heads of {first.shape[-1]} and "
                    f"{other.shape[1]} heads of {other.shape[-1]}: they come from different models."
                )
            if other.dtype != first.dtype or other.device != first.device:
                raise CacheError(
                    f"Cannot merge {first.dtype} on {first.device} with {other.dtype} on "
                    f"{other.device}; move or convert one of them."
                )
