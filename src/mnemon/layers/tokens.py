"""What dense, static and cross layers share: keys and values of all tokens in two buffers."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

from mnemon.errors import CacheError, CapacityError
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.storage import TokenBuffer
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = [
    "Buffer",
    "TokenLayer",
    "check_mergeable",
    "check_windows",
    "gather_state",
    "make_fit",
    "stack_right",
    "token_index",
]

Buffer = TokenBuffer | StaticBuffer | PackedBuffer


class TokenLayer(CacheLayer):
    """Keys and values of every token, in two buffers of the kind that `_new_buffer` makes."""

    is_pair = True

    def __init__(self) -> None:
        self._keys = self._new_buffer()
        self._values = self._new_buffer()
        self._dropped = 0  # logical tokens that `keep` let go
        self._tail: int | None = None  # newest tokens stored without a gap, once `keep` ran

    @abstractmethod
    def _new_buffer(self) -> Buffer: ...

    @abstractmethod
    def _empty(self) -> Self:
        """A new layer like this one, holding nothing."""

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        held_keys, held_values, num_new = self._keys, self._values, keys.shape[-2]
        if not held_keys.fits(keys) or not held_values.fits(values) or values.shape[-2] != num_new:
            make_fit(self, (held_keys, keys), (held_values, values))
        pair = held_keys.append(keys), held_values.append(values)
        if self._tail is not None:
            self._tail += num_new
        return pair

    def view(self) -> tuple[Keys, Values] | None:
        keys, values = self._keys.view(), self._values.view()
        return None if keys is None or values is None else (keys, values)

    @property
    def num_tokens(self) -> int:
        return len(self._keys) + self._dropped

    @property
    def num_stored(self) -> int:
        return len(self._keys)

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return self._keys.reading_length(num_new), self._dropped

    @property
    def _croppable(self) -> int:
        return len(self._keys) if self._tail is None else self._tail

    def can_crop(self, num_tokens: int) -> bool:
        return 0 <= num_tokens <= self._croppable

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if num_tokens == 0:
            return
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens: only the newest {self._croppable} are stored "
                f"without a gap. Remove fewer, or reset() and prefill again."
            )
        self._keys.crop(num_tokens)
        self._values.crop(num_tokens)
        if self._tail is not None:
            self._tail -= num_tokens

    def keep(self, indices: torch.Tensor) -> None:
        stored = len(self._keys)
        indices = token_index(indices, stored, self._keys.live())
        kept = indices.shape[-1]
        # The tail: how many of the newest tokens are all there, counted from the end.
        newest = torch.arange(stored - kept, stored, device=indices.device)
        gapless = (indices == newest).flip(-1).to(torch.int64).cumprod(-1).sum(-1)
        self._tail = min(self._croppable, int(gapless.min()) if kept else 0)
        self._keys.gather_tokens(indices)
        self._values.gather_tokens(indices)
        self._dropped += stored - kept

    def reset(self) -> None:
        self._keys.clear()
        self._values.clear()
        self._dropped, self._tail = 0, None

    @property
    def batch_size(self) -> int:
        return self._keys.batch_size

    def reorder(self, index: torch.Tensor) -> None:
        self._keys.gather_rows(index)
        self._values.gather_rows(index)

    def select(self, index: torch.Tensor) -> None:
        if not self._keys.is_empty:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence[Self]) -> Self:
        layers = [self, *others]
        merged = self._empty()
        if check_mergeable(layers):
            if any(layer._dropped for layer in layers):
                raise CacheError("Cannot merge caches from which keep() dropped tokens.")
            longest = max(layer.num_stored for layer in layers)
            merged._keys.replace(stack_right([layer._keys.live() for layer in layers], longest))
            merged._values.replace(stack_right([layer._values.live() for layer in layers], longest))
        return merged

    def extract(self, row: int, num_padding: int = 0) -> Self:
        if self._dropped and num_padding:
            raise CacheError("Cannot remove padding: keep() dropped tokens before.")
        other = self._empty()
        keys, values = self._keys.live(), self._values.live()
        if keys is not None and values is not None:
            rows = row_index(torch.tensor([row]), self.batch_size).to(keys.device)
            other._keys.replace(keys.index_select(0, rows)[..., num_padding:, :])
            other._values.replace(values.index_select(0, rows)[..., num_padding:, :])
        other._dropped, other._tail = self._dropped, self._tail
        return other

    def fork(self) -> Self:
        other = self._empty()
        other._keys, other._values = self._keys.fork(), self._values.fork()
        other._dropped, other._tail = self._dropped, self._tail
        return other

    def state(self) -> LayerState:
        keys, values = self._keys.live(), self._values.live()
        tensors = {} if keys is None or values is None else {"keys": keys, "values": values}
        meta = {"num_tokens": self.num_tokens, "tail": self._tail}
        return LayerState(kind=self.kind, tensors=tensors, meta=meta)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        keys, values = gather_state(state)
        seen, tail = int(state.meta["num_tokens"]), state.meta.get("tail")
        stored = 0 if keys is None else keys.shape[-2]
        if seen < stored or (tail is not None and not 0 <= int(tail) <= stored):
            raise CacheError(
                f"A saved {self.kind} layer saw {seen} tokens and holds {stored} (newest {tail} "
                f"without a gap): the state contradicts itself."
            )
        if 0 <= self.max_length < stored:
            raise CapacityError(
                f"{stored} saved tokens do not fit a {self.kind} layer of {self.max_length}."
            )
        self.reset()
        if keys is not None and values is not None:
            self._keys.adopt(keys)
            self._values.adopt(values)
        self._dropped, self._tail = seen - stored, None if tail is None else int(tail)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def nbytes_reserved(self) -> int:
        return self._keys.nbytes_reserved + self._values.nbytes_reserved


def make_fit(layer: CacheLayer, *pairs: tuple[Buffer, torch.Tensor], evicts: bool = False) -> None:
    """Make the buffers of `layer` take what comes: the slow path of every append.

    Another dtype is promoted as ``torch.cat`` would; one stored row serves a whole batch that
    begins with it (beams, several samples). What cannot be is refused before anything changes.

    Args:
        layer: whose rows are repeated.
        pairs: buffers, each with the ``[batch, ..., new, width]`` that it gets.
        evicts: the layer makes room by itself.

    Raises:
        CacheError: other rows, heads, width or dtype than the buffers hold.
        CapacityError: no room.
    """
    first = pairs[0][1]
    for buffer, new in pairs:
        if new.shape[:-1] != first.shape[:-1]:
            raise CacheError(
                f"Keys {list(first.shape)} and values {list(new.shape)} do not belong together: "
                f"batch, heads and tokens must agree."
            )
        if not evicts:
            buffer.check_room(new.shape[-2])
        held = buffer.live()
        if held is None:
            continue
        buffer.check_dtype(new.dtype)
        rows = held.shape[0]
        if held.shape[1:-2] != new.shape[1:-2] or held.shape[-1] != new.shape[-1]:
            raise CacheError(
                f"The cache holds {list(held.shape)} [batch, ..., tokens, width] and "
                f"{list(new.shape)} came: another model's layer."
            )
        if rows not in (1, new.shape[0]):
            raise CacheError(
                f"The cache holds {rows} rows and {new.shape[0]} came. Only a cache of one row "
                f"repeats itself; use cache.repeat(n) or cache.select(rows) first."
            )
    if layer.batch_size == 1 and first.shape[0] != 1:
        layer.repeat(first.shape[0])
    for buffer, new in pairs:
        buffer.promote(new.dtype)


def check_mergeable(layers: Sequence[CacheLayer]) -> bool:
    """Whether there is anything to merge.

    Raises:
        CacheError: layers of different kinds, or some are empty and some are not.
    """
    kinds = sorted({layer.kind for layer in layers})
    if len(kinds) > 1:
        raise CacheError(f"Cannot merge layers of kinds {', '.join(kinds)}: other models.")
    filled = sum(layer.batch_size > 0 for layer in layers)
    if 0 < filled < len(layers):
        raise CacheError("Cannot merge an empty cache with a filled one; leave the empty ones out.")
    return filled > 0


def check_windows(windows: Sequence[int]) -> None:
    """Raise `CacheError` unless all are the same."""
    if len(set(windows)) > 1:
        raise CacheError(f"Cannot merge windows of {sorted(set(windows))} tokens: other models.")


def stack_right(views: Sequence[torch.Tensor | None], num_tokens: int) -> torch.Tensor:
    """Rows of all `views`, aligned at the newest token, zeros on the left, `num_tokens` long.

    Raises:
        CacheError: other heads, widths, dtypes or devices.
    """
    tensors = [view for view in views if view is not None]
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape[1:-2] != first.shape[1:-2] or tensor.shape[-1] != first.shape[-1]:
            raise CacheError(
                f"Cannot merge layers of shapes {list(first.shape)} and {list(tensor.shape)}: they "
                f"come from different models."
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise CacheError(
                f"Cannot merge {first.dtype} on {first.device} with {tensor.dtype} on "
                f"{tensor.device}; move or convert one of them."
            )
    pad = torch.nn.functional.pad
    return torch.cat([pad(tensor, (0, 0, num_tokens - tensor.shape[-2], 0)) for tensor in tensors])


def gather_state(state: LayerState) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values of a saved state, or two Nones.

    Raises:
        CacheError: one without the other, or shapes that do not belong together.
    """
    if not state.tensors:
        return None, None
    if set(state.tensors) != {"keys", "values"}:
        raise CacheError(f"A saved {state.kind} layer has tensors {sorted(state.tensors)}.")
    keys, values = state.tensors["keys"], state.tensors["values"]
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
        raise CacheError(
            f"Saved keys {list(keys.shape)} and values {list(values.shape)} do not belong together."
        )
    return keys, values


def token_index(indices: torch.Tensor, num_stored: int, live: torch.Tensor | None) -> torch.Tensor:
    """`indices` as int64, checked.

    Raises:
        CacheError: not ascending, out of range, or of a shape that `keep` does not take.
    """
    whole = not indices.is_floating_point() and indices.dtype != torch.bool
    per_head = live is not None and indices.ndim == 3 and indices.shape[:2] == live.shape[:2]
    if not whole or not (indices.ndim == 1 or per_head):
        raise CacheError(
            f"keep takes int64 indices [kept] or [batch, kv_heads, kept]; got {indices.dtype} "
            f"{list(indices.shape)} for keys {None if live is None else list(live.shape)}."
        )
    indices = indices.to(torch.int64)
    if indices.shape[-1] > 1 and not bool((indices.diff(dim=-1) > 0).all()):
        raise CacheError("keep takes indices in ascending order, each once.")
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_stored):
        raise CacheError(
            f"keep takes indices in [0, {num_stored}); got {int(indices.min())} to "
            f"{int(indices.max())}."
        )
    return indices
