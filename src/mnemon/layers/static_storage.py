"""Memory of a fixed size at a fixed address, as compiled graphs want it.

The length lives twice: as a Python int for whoever asks, and as a counter on the device, which is
all that a compiled graph touches. After a compiled step the int is stale and read back on demand.
"""

from typing import final

import torch

from mnemon.errors import CacheError, CapacityError

__all__ = ["StaticBuffer"]


@final
class StaticBuffer:
    """A tensor ``[batch, ..., capacity, width]`` filled from the front; `TokenBuffer`'s verbs.

    Args:
        capacity: tokens that fit.
    """

    __slots__ = ("__weakref__", "_data", "_idle", "_length", "capacity", "counter")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._data: torch.Tensor | None = None
        self._length: int | None = 0
        self._idle = False  # cleared: the memory waits for another batch
        self.counter: torch.Tensor | None = None

    def __len__(self) -> int:
        if self._length is None:
            assert self.counter is not None
            self._length = int(self.counter)
        return self._length

    @property
    def is_length_known(self) -> bool:
        """Whether the length is known here, without asking the device."""
        return self._length is not None

    @property
    def is_empty(self) -> bool:
        return self._data is None or self._idle

    @property
    def batch_size(self) -> int:
        return -1 if self._data is None or self._idle else int(self._data.shape[0])

    def reading_length(self, num_new: int) -> int:
        """Attention reads the whole buffer; the mask hides what is not filled."""
        return self.capacity

    def fits(self, new: torch.Tensor) -> bool:
        """Whether `new` goes behind what is filled as it is: rows, heads, width and dtype."""
        data = self._data
        if data is None or self._idle:
            return False
        held, shape = data.shape, new.shape
        return shape[:-2] == held[:-2] and shape[-1] == held[-1] and new.dtype is data.dtype

    def promote(self, dtype: torch.dtype) -> None:
        """Nothing: `check_dtype` refused another dtype, because the address cannot change."""

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise `CacheError` unless `dtype` is the one that is held."""
        data = None if self._idle else self._data
        if data is not None and dtype != data.dtype:
            raise CacheError(
                f"The static cache holds {data.dtype} and {dtype} came. Its memory cannot change; "
                f"convert what comes, or use the default recipe, which promotes."
            )

    def check_room(self, num_new: int) -> None:
        """Raise `CapacityError` unless `num_new` tokens fit."""
        if not torch.compiler.is_compiling() and len(self) + num_new > self.capacity:
            raise self._full(num_new)

    def _full(self, num_new: int) -> CapacityError:
        return CapacityError(
            f"A static cache of {self.capacity} tokens holds {len(self)} and {num_new} more came. "
            f"Use a larger static(n), or the default recipe, which grows."
        )

    def view(self) -> torch.Tensor | None:
        """What attention reads: the whole buffer, ``[batch, ..., capacity, width]``."""
        return None if self._idle else self._data

    def live(self) -> torch.Tensor | None:
        """The filled part, ``[batch, ..., tokens, width]``; None before the first append."""
        if self._data is None or self._idle:
            return None
        return self._data.narrow(-2, 0, len(self))

    @property
    def nbytes(self) -> int:
        live = self.live()
        return 0 if live is None else live.numel() * live.element_size()

    @property
    def nbytes_reserved(self) -> int:
        return 0 if self._data is None else self._data.numel() * self._data.element_size()

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write `new` ``[batch, ..., new, width]`` behind what is filled; return the whole buffer.

        Rows, heads, width and dtype are those of what is held (the caller asked `fits`).

        Raises:
            CapacityError: no room (in a compiled graph torch raises its own index error).
        """
        if self._data is None or self._idle:
            self._allocate(new)
        data, counter = self._data, self.counter
        assert data is not None
        assert counter is not None
        num_new = new.shape[-2]
        if torch.compiler.is_compiling():
            positions = torch.arange(num_new, device=data.device) + counter
            data.index_copy_(data.ndim - 2, positions, new)
            counter.add_(num_new)
            self._length = None
            return data
        stop = len(self) + num_new
        if stop > self.capacity:
            raise self._full(num_new)
        data.narrow(-2, stop - num_new, num_new).copy_(new)
        self._set_length(stop)
        return data

    #: Tensors that `leaves` gives.
    NUM_LEAVES = 2

    def leaves(self) -> list[torch.Tensor]:
        """The whole memory and the counter on the device."""
        assert self._data is not None
        assert self.counter is not None
        return [self._data, self.counter]

    def take_leaves(self, leaves: list[torch.Tensor]) -> None:
        """The reverse of `leaves`; runs no operator, so the length is asked for later."""
        self._data, self.counter = leaves
        self._length, self._idle = None, False

    def replace(self, content: torch.Tensor) -> None:
        """Hold `content` ``[batch, ..., tokens, width]`` instead of what was there."""
        if content.shape[-2] > self.capacity:
            raise CapacityError(
                f"{content.shape[-2]} tokens do not fit a static cache of {self.capacity}."
            )
        self._allocate(content)
        assert self._data is not None
        self._data.narrow(-2, 0, content.shape[-2]).copy_(content)
        self._set_length(content.shape[-2])

    adopt = replace

    def crop(self, num_tokens: int) -> None:
        self._set_length(len(self) - num_tokens)

    def gather_rows(self, index: torch.Tensor) -> None:
        live = self.live()
        if live is None:
            return
        rows = live.index_select(0, index.to(live.device))
        if rows.shape[0] == live.shape[0]:
            live.copy_(rows)  # keeps the address that a compiled graph knows
        else:
            self.replace(rows)

    def gather_tokens(self, index: torch.Tensor) -> None:
        live = self.live()
        if live is None:
            return
        index = index.to(live.device)
        if index.ndim == 1:
            kept = live.index_select(-2, index)
        else:
            kept = live.gather(-2, index.unsqueeze(-1).expand(*index.shape, live.shape[-1]))
        live.narrow(-2, 0, kept.shape[-2]).copy_(kept)
        self._set_length(kept.shape[-2])

    def fork(self) -> "StaticBuffer":
        """A copy: the address is part of a static buffer's contract, so nothing is shared."""
        other = StaticBuffer(self.capacity)
        live = self.live()
        if live is not None:
            other.replace(live)
        return other

    def clear(self) -> None:
        """Forget everything; the memory and its address stay."""
        if self._data is not None:
            self._data.zero_()
            self._set_length(0)
            self._idle = True

    def _set_length(self, length: int) -> None:
        assert self.counter is not None
        self._length = length
        self.counter.fill_(length)

    def _allocate(self, like: torch.Tensor) -> None:
        shape = (*like.shape[:-2], self.capacity, like.shape[-1])
        idle, self._idle = self._idle, False
        data = self._data
        if idle and data is not None and data.shape == shape and data.dtype == like.dtype:
            return  # zeroed by clear(), and at the address that a compiled graph knows
        compiling = torch.compiler.is_compiling()
        # Zeros, not garbage: masked scores of NaN would poison a softmax.
        if compiling:
            self._data = torch.zeros(shape, dtype=like.dtype, device=like.device)
            self.counter = torch.zeros((), dtype=torch.int64, device=like.device)
        else:
            with torch.inference_mode(False):
                self._data = torch.zeros(shape, dtype=like.dtype, device=like.device)
                self.counter = torch.zeros((), dtype=torch.int64, device=like.device)
            torch._dynamo.mark_static_address(self._data)
            torch._dynamo.mark_static_address(self.counter)
        self._length = 0
