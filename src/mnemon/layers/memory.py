"""Where a token buffer's memory comes from, how it moves and how it goes back.

On a CPU an allocation is an anonymous mapping, whose untouched reserve is not resident and whose
pages can be given back one by one.
"""

import math
import mmap
import sys
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, final

import torch

from mnemon.errors import CacheError

if TYPE_CHECKING:
    from mnemon.layers.storage import TokenBuffer

__all__ = [
    "Storage",
    "allocate",
    "capacity_for",
    "copy_and_release",
    "move_to_front",
    "num_tensors",
]

_MAPPED_FROM_BYTES = 256 << 10
_COPY_CHUNK_BYTES = 4 << 20
_COPY_CHUNKS = 128
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
_ROUND_TOKENS = 64
_HUGE_PAGE_BYTES = 2 << 20
_LINE_BYTES = 64
_GOLDEN = 0.618034


@final
class Storage:
    """One allocation, possibly shared by forks. `tip` is the first token slot nobody wrote.

    A borrowed allocation is somebody else's tensor (a caller's, autograd's, a mapped file): it is
    read, never written.
    """

    __slots__ = (
        "__weakref__",
        "born",
        "borrowed",
        "capacity",
        "data",
        "dtype",
        "forked",
        "lead",
        "mapping",
        "tip",
        "users",
        "width",
    )

    def __init__(
        self,
        data: torch.Tensor,
        tip: int,
        mapping: mmap.mmap | None = None,
        *,
        borrowed: bool = False,
    ) -> None:
        self.data = data
        # What every append compares with: attributes, because `data.shape` costs as much again.
        self.dtype = data.dtype
        self.lead = data.shape[:-2]
        self.width = data.shape[-1]
        self.capacity = data.shape[-2]
        self.tip = tip
        self.mapping = mapping
        self.borrowed = borrowed
        self.forked = False  # ever had two users; a compiled graph cannot count them
        self.users: weakref.WeakSet[TokenBuffer] = weakref.WeakSet()
        self.born = 0 if borrowed or data.device.type != "cpu" else num_tensors(data)

    @property
    def is_shared(self) -> bool:
        return self.borrowed or len(self.users) > 1


def move_to_front(data: torch.Tensor, start: int, count: int) -> None:
    """Move `count` tokens from `start` to 0, in pieces that do not overlap."""
    for begin in range(0, count, start):
        size = min(start, count - begin)
        data.narrow(-2, begin, size).copy_(data.narrow(-2, start + begin, size))


def num_tensors(data: torch.Tensor) -> int:
    """How many tensors, arrays and handles share the memory of `data`; 0 where torch hides it."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return 0
    handle = data.untyped_storage()  # one object however often it is asked for: count its names
    return int(count(handle._cdata)) + sys.getrefcount(handle)


def capacity_for(num_tokens: int, device: torch.device, slack: int | None) -> int:
    if slack is not None:
        return num_tokens + (max(slack, num_tokens // 16) if slack else 0)
    # Untouched reserve is free on a CPU, so double; elsewhere stay within 1/8 of what is live.
    reserve = max(num_tokens, 256) if device.type == "cpu" else max(num_tokens // 8, _ROUND_TOKENS)
    return -(-(num_tokens + reserve) // _ROUND_TOKENS) * _ROUND_TOKENS


def allocate(shape: list[int], num_tokens: int, like: torch.Tensor, slack: int | None) -> Storage:
    """Uninitialised storage for `num_tokens` and reserve; `shape` gives the other dimensions."""
    if num_tokens < 0:
        raise CacheError(f"A cache cannot hold {num_tokens} tokens.")
    shape = [*shape[:-2], capacity_for(num_tokens, like.device, slack), shape[-1]]
    item = like.element_size()
    row_bytes = shape[-2] * shape[-1] * item
    rows = math.prod(shape[:-2])
    # Outside inference mode, so that the buffer can be written in any mode later.
    with torch.inference_mode(False):
        if like.device.type == "cpu" and rows * row_bytes >= _MAPPED_FROM_BYTES:
            if slack and row_bytes % _LINE_BYTES == 0:
                row_bytes += (_spread_bytes(1) - row_bytes) % mmap.PAGESIZE
            try:
                mapping = mmap.mmap(-1, rows * row_bytes + mmap.PAGESIZE, flags=_MAP_FLAGS)
            except (OSError, ValueError):
                pass  # strict overcommit: fall through to the allocator's own message
            else:
                flat = torch.frombuffer(mapping, dtype=like.dtype)
                address = flat.data_ptr()
                first = _spread_bytes(address // mmap.PAGESIZE) if slack else 0
                strides = [row_bytes // item, shape[-1], 1]
                for dimension in reversed(shape[1:-2]):
                    strides.insert(0, strides[0] * dimension)
                live_bytes = num_tokens * shape[-1] * item
                starts = range(first, first + rows * row_bytes, row_bytes)
                _ask_for_huge_pages(mapping, address, starts, live_bytes)
                data = flat.as_strided(shape, strides, first // item)
                del flat  # one tensor at birth
                return Storage(data, 0, mapping)
        return Storage(torch.empty(shape, dtype=like.dtype, device=like.device), 0)


def _spread_bytes(number: int) -> int:
    """A place in a page for the `number`-th of several buffers that grow together.

    Buffers that begin at the same place come to their next pages at the same token, and that step
    takes a page for each of them. Multiples of the golden ratio lie evenly, however many they are.
    """
    return int(number * _GOLDEN % 1 * mmap.PAGESIZE) // _LINE_BYTES * _LINE_BYTES


def _ask_for_huge_pages(
    mapping: mmap.mmap, address: int, starts: Iterable[int], live_bytes: int
) -> None:
    """Large pages for what is about to be written; the reserve stays in small ones.

    Memory is read up to a third faster that way (fewer addresses to look up). Only whole large
    pages inside the live part of each row are asked for, so none holds untouched reserve.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or live_bytes < 2 * _HUGE_PAGE_BYTES:
        return
    for row in starts:
        start = -(-(address + row) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES - address
        stop = (address + row + live_bytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - address
        if stop > start:
            try:
                mapping.madvise(advice, start, stop - start)
            except OSError:
                return  # a kernel without them


def copy_and_release(old: torch.Tensor, new: torch.Tensor, source: Storage | None) -> None:
    """Copy `old` to `new`; give `source`'s pages back as they are copied, if it may be eaten."""
    if source is None or source.mapping is None:
        new.copy_(old)
        return
    itemsize = old.element_size()
    token_bytes = old.shape[-1] * itemsize
    first, row_bytes = old.storage_offset() * itemsize, source.data.stride(-3) * itemsize
    rows_old = old.flatten(0, -3)
    rows_new = new.flatten(0, -3)
    size_bytes = old.numel() * itemsize
    chunk_bytes = min(_COPY_CHUNK_BYTES, max(size_bytes // _COPY_CHUNKS, 4 * mmap.PAGESIZE))
    chunk = max(1, chunk_bytes // max(1, token_bytes))
    page = mmap.PAGESIZE
    for row in range(rows_old.shape[0]):
        at = first + row * row_bytes
        released = -(-at // page) * page
        for begin in range(0, old.shape[-2], chunk):
            stop = min(begin + chunk, old.shape[-2])
            rows_new[row, begin:stop].copy_(rows_old[row, begin:stop])
            reached = (at + stop * token_bytes) // page * page
            if reached > released:
                source.mapping.madvise(mmap.MADV_DONTNEED, released, reached - released)
                released = reached
