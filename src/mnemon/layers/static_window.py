"""A window of preallocated keys and values, for ``torch.compile``."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.tokens import check_mergeable, check_windows, gather_state, make_fit, stack_right
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["StaticWindowLayer"]


@final
class StaticWindowLayer(CacheLayer):
    """The last `window` tokens at a fixed address, oldest first.

    A full window moves by one slot per token: that copy is the price of a fixed address and of
    masks in time order. `crop` works until the window is full, `keep` never (`UnsupportedVerb`).

    Args:
        window: tokens that a query sees, itself included.
    """

    kind = "static_window"
    is_sliding = True
    is_compileable = True
    is_pair = True

    def __init__(self, window: int) -> None:
        if window < 1:
            raise CacheError(f"A window holds at least 1 token; got {window}.")
        self.window = window
        self._keys = StaticBuffer(window)
        self._values = StaticBuffer(window)
        self._seen: int | None = 0
        self._seen_counter: torch.Tensor | None = None

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        num_new = keys.shape[-2]
        if (
            not self._keys.fits(keys)
            or not self._values.fits(values)
            or values.shape[-2] != num_new
        ):
            make_fit(self, (self._keys, keys), (self._values, values), evicts=True)
        if torch.compiler.is_compiling() and not self._keys.is_empty and num_new == 1:
            return self._append_compiled(keys, values)
        seen = self.num_tokens
        if num_new == 0 and seen > self.window:
            result = self._past(self._keys), self._past(self._values)
        elif seen + num_new <= self.window:
            result = self._keys.append(keys), self._values.append(values)
        else:
            past = min(seen, self.window - 1)
            result = (
                self._slide(self._keys, keys, past),
                self._slide(self._values, values, past),
            )
        self._set_seen(seen + num_new)
        return result

    def _past(self, buffer: StaticBuffer) -> torch.Tensor:
        """What the next token still sees."""
        live = buffer.live()
        assert live is not None
        return live.narrow(-2, live.shape[-2] - (self.window - 1), self.window - 1)

    def _slide(self, buffer: StaticBuffer, new: torch.Tensor, past: int) -> torch.Tensor:
        live = buffer.live()
        everything = new
        if live is not None and past:
            everything = torch.cat([live.narrow(-2, live.shape[-2] - past, past), new], dim=-2)
        ending = everything.narrow(-2, everything.shape[-2] - self.window, self.window)
        if live is None:
            buffer.replace(ending)
        else:
            data = buffer.view()
            assert data is not None
            data.copy_(ending)  # the address stays
            buffer._set_length(self.window)
        return everything

    def _append_compiled(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token, without a branch on the length: shift by 0 or 1, write at the end."""
        counter = self._seen_counter
        assert counter is not None
        slots = torch.arange(self.window, device=keys.device)
        shift = (counter >= self.window).to(torch.int64)
        source = (slots + shift).clamp_max(self.window - 1)
        target = counter.clamp_max(self.window - 1).reshape(1)
        views = []
        for buffer, new in ((self._keys, keys), (self._values, values)):
            data = buffer.view()
            assert data is not None
            data.copy_(data.index_select(-2, source))
            data.index_copy_(data.ndim - 2, target, new)
            views.append(data)
        counter.add_(1)
        self._seen = None
        return views[0], views[1]

    def _sync(self) -> None:
        """Bring the Python lengths up to date after compiled steps."""
        if self._seen is None:
            assert self._seen_counter is not None
            self._seen = int(self._seen_counter)
            for buffer in (self._keys, self._values):
                buffer._set_length(min(self._seen, self.window))

    def _set_seen(self, seen: int) -> None:
        self._seen = seen
        data = self._keys.view()
        if self._seen_counter is None and data is not None:
            with torch.inference_mode(False):
                self._seen_counter = torch.zeros((), dtype=torch.int64, device=data.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._seen_counter)
        if self._seen_counter is not None:
            self._seen_counter.fill_(seen)

    def view(self) -> tuple[Keys, Values] | None:
        keys, values = self._keys.view(), self._values.view()
        return None if keys is None or values is None else (keys, values)

    @property
    def num_tokens(self) -> int:
        self._sync()
        assert self._seen is not None
        return self._seen

    @property
    def num_stored(self) -> int:
        return min(self.num_tokens, self.window)

    @property
    def max_length(self) -> int:
        return self.window

    @property
    def length_at_hand(self) -> int | None:
        return self._seen

    def traced_length(self) -> int | torch.Tensor:
        if torch.compiler.is_compiling() and self._seen_counter is not None:
            return self._seen_counter
        return self.num_tokens

    def mask_sizes(self, num_new: int) -> MaskSizes:
        seen = self.num_tokens
        if seen + num_new <= self.window:
            return self.window, 0
        past = min(seen, self.window - 1)
        return past + num_new, seen - past

    def can_crop(self, num_tokens: int) -> bool:
        if num_tokens == 0:
            return True
        return 0 <= num_tokens <= self.num_tokens <= self.window

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens from a static window of {self.window} that saw "
                f"{self.num_tokens}: what came before is gone. reset() and prefill again."
            )
        if num_tokens:
            left = self.num_tokens - num_tokens
            self._keys.crop(num_tokens)
            self._values.crop(num_tokens)
            self._set_seen(left)

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb("A window layer decides itself what to keep: no keep().")

    def reset(self) -> None:
        self._keys.clear()
        self._values.clear()
        self._set_seen(0)

    @property
    def batch_size(self) -> int:
        return self._keys.batch_size

    def reorder(self, index: torch.Tensor) -> None:
        self._sync()
        self._keys.gather_rows(index)
        self._values.gather_rows(index)

    def select(self, index: torch.Tensor) -> None:
        if not self._keys.is_empty:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence["StaticWindowLayer"]) -> "StaticWindowLayer":
        layers = [self, *others]
        merged = StaticWindowLayer(self.window)
        if check_mergeable(layers):
            check_windows([layer.window for layer in layers])
            seen = max(layer.num_tokens for layer in layers)
            stored = min(seen, self.window)
            merged._keys.replace(stack_right([one._keys.live() for one in layers], stored))
            merged._values.replace(stack_right([one._values.live() for one in layers], stored))
            merged._set_seen(seen)
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "StaticWindowLayer":
        other = StaticWindowLayer(self.window)
        seen = self.num_tokens - num_padding
        keys, values = self._keys.live(), self._values.live()
        if keys is not None and values is not None:
            rows = row_index(torch.tensor([row]), self.batch_size).to(keys.device)
            stored = min(keys.shape[-2], seen)
            first = keys.shape[-2] - stored
            other._keys.replace(keys.index_select(0, rows).narrow(-2, first, stored))
            other._values.replace(values.index_select(0, rows).narrow(-2, first, stored))
            other._set_seen(seen)
        return other

    def fork(self) -> "StaticWindowLayer":
        other = StaticWindowLayer(self.window)
        seen = self.num_tokens
        other._keys, other._values = self._keys.fork(), self._values.fork()
        other._set_seen(seen)
        return other

    def state(self) -> LayerState:
        seen = self.num_tokens
        keys, values = self._keys.live(), self._values.live()
        tensors = {} if keys is None or values is None else {"keys": keys, "values": values}
        meta = {"num_tokens": seen, "window": self.window}
        return LayerState(kind=self.kind, tensors=tensors, meta=meta)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        keys, values = gather_state(state)
        seen, window = int(state.meta["num_tokens"]), int(state.meta["window"])
        stored = 0 if keys is None else keys.shape[-2]
        if window != self.window or stored != min(seen, window):
            raise CacheError(
                f"A saved static window of {window} that saw {seen} tokens holds {stored}; this "
                f"layer's window is {self.window}."
            )
        self.reset()
        if keys is not None and values is not None:
            self._keys.replace(keys)
            self._values.replace(values)
        self._set_seen(seen)

    @property
    def nbytes(self) -> int:
        self._sync()
        return self._keys.nbytes + self._values.nbytes

    @property
    def nbytes_reserved(self) -> int:
        return self._keys.nbytes_reserved + self._values.nbytes_reserved
