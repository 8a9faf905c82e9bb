"""What dense, static and cross layers share: keys and values of all tokens in two buffers."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

from mnemon.errors import CacheError
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.storage import TokenBuffer

__all__ = ["Buffer", "TokenLayer", "gather_state", "stack_right"]

Buffer = TokenBuffer | StaticBuffer


class TokenLayer(CacheLayer):
    """Keys and values of every token, in two buffers of the kind that `_new_buffer` makes."""

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

    def append(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._keys.is_empty and self._keys.batch_size != keys.shape[0]:
            match_batch(self, keys.shape[0])
        all_keys = self._keys.append(keys)
        try:
            all_values = self._values.append(values)
        except BaseException:
            self._keys.crop(keys.shape[-2])
            raise
        if self._tail is not None:
            self._tail += keys.shape[-2]
        return all_keys, all_values

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
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
        indices = _token_index(indices, stored)
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


def match_batch(layer: CacheLayer, batch_size: int) -> None:
    """One stored row serves a whole batch that begins with it (beams, several samples).

    Raises:
        CacheError: more than one row is stored.
    """
    if layer.batch_size != 1:
        raise CacheError(
            f"The cache holds {layer.batch_size} rows and {batch_size} came. Only a cache of one "
            f"row repeats itself; use cache.repeat(n) or cache.select(rows) first."
        )
    layer.repeat(batch_size)


def check_mergeable(layers: Sequence[CacheLayer]) -> bool:
    """Whether there is anything to merge.

    Raises:
        CacheError: some are empty and some are not.
    """
    filled = sum(layer.batch_size > 0 for layer in layers)
    if 0 < filled < len(layers):
        raise CacheError("Cannot merge an empty cache with a filled one; leave the empty ones out.")
    return filled > 0


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
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise CacheError(
            f"Saved keys {list(keys.shape)} and values {list(values.shape)} do not belong together."
        )
    return keys, values


def _token_index(indices: torch.Tensor, num_stored: int) -> torch.Tensor:
    if indices.ndim not in (1, 3):
        raise CacheError(
            f"keep takes indices [kept] or [batch, kv_heads, kept]; got {list(indices.shape)}."
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
