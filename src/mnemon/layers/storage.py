"""Memory that grows at the end of the token axis without copying the whole for every token.

    data   [batch, ..., capacity, width]          one allocation
            |<- dropped ->|<---- live ---->|<- reserve ->|
            0           start             end        capacity

Each (row, head) keeps its tokens contiguous, which is how attention reads them. On a CPU the
allocation is an anonymous mapping: reserve that was never written costs no resident memory. When
it has to grow, old pages are given back as soon as they were copied, so the peak stays near the
live bytes.
"""

import mmap
import sys
import weakref
from typing import final

import torch

from mnemon.errors import CacheError

__all__ = ["TokenBuffer"]

_MAPPED_FROM_BYTES = 1 << 20
_COPY_CHUNK_BYTES = 4 << 20
_COPY_CHUNKS = 32
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
_ROUND_TOKENS = 64


@final
class _Storage:
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
        self.born = 0 if mapping is None else _num_tensors(data)

    @property
    def is_shared(self) -> bool:
        return self.borrowed or len(self.users) > 1


@final
class TokenBuffer:
    """A tensor ``[batch, ..., tokens, width]`` that appends in place along ``tokens``.

    Forks share the allocation: whoever writes at the tip first owns it, everybody else copies.
    Views handed out earlier keep their numbers when tokens are appended; they do not survive a
    `crop` followed by an append, as with any in-place cache.

    Args:
        exact: allocate no reserve (for what is written once, such as cross attention).
    """

    __slots__ = ("__weakref__", "_end", "_exact", "_start", "_storage")

    def __init__(self, *, exact: bool = False) -> None:
        self._storage: _Storage | None = None
        self._start = 0
        self._end = 0
        self._exact = exact

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def is_empty(self) -> bool:
        return self._storage is None

    @property
    def batch_size(self) -> int:
        return -1 if self._storage is None else int(self._storage.data.shape[0])

    def reading_length(self, num_new: int) -> int:
        """Tokens that `append` of `num_new` will return."""
        return self._end - self._start + num_new

    def fits(self, new: torch.Tensor) -> bool:
        """Whether `new` goes behind the live tokens as it is: rows, heads, width and dtype."""
        storage = self._storage
        if storage is None:
            return False
        shape = new.shape
        return (
            shape[:-2] == storage.lead and shape[-1] == storage.width and new.dtype is storage.dtype
        )

    def promote(self, dtype: torch.dtype) -> None:
        """Hold a dtype that also holds `dtype`, as ``torch.cat`` would."""
        live = self.live()
        if live is None:
            return
        promoted = torch.promote_types(live.dtype, dtype)
        if promoted is live.dtype:
            return
        if torch.is_grad_enabled() and live.requires_grad:
            self.adopt(live.to(promoted))
        else:
            self._adopt(live.to(promoted), reserve=not self._exact)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Nothing: this buffer promotes."""

    def check_room(self, num_new: int) -> None:
        """Nothing: this buffer grows."""

    def view(self) -> torch.Tensor | None:
        """What attention reads: here the live tokens."""
        return self.live()

    def live(self) -> torch.Tensor | None:
        """The live tokens, ``[batch, ..., tokens, width]``; None before the first append."""
        storage = self._storage
        if storage is None:
            return None
        return storage.data.narrow(-2, self._start, self._end - self._start)

    def tail(self, num_tokens: int) -> torch.Tensor:
        """The last `num_tokens` live tokens."""
        assert self._storage is not None
        return self._storage.data.narrow(-2, self._end - num_tokens, num_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens."""
        view = self.live()
        return 0 if view is None else view.numel() * view.element_size()

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of the allocation (on a CPU the untouched part is not resident)."""
        if self._storage is None:
            return 0
        return self._storage.data.numel() * self._storage.data.element_size()

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write `new` ``[batch, ..., new, width]`` behind the live tokens and return those.

        Rows, heads and width are those of the live tokens (the caller asked `fits`).
        """
        storage, end = self._storage, self._end
        if storage is None:
            return self._append_functional(new)
        data, num_new = storage.data, new.shape[-2]
        if torch.is_grad_enabled() and (new.requires_grad or data.requires_grad):
            return self._append_functional(new)
        # Nobody else writes to memory that is all ours: its tip is our end. A graph must not ask
        # for the tip: torch's code generation stumbles over an equation between two lengths.
        is_tip = not (storage.forked or storage.borrowed) or (
            storage.tip == end and not torch.compiler.is_compiling()
        )
        if end + num_new > storage.capacity or not is_tip:
            if torch.compiler.is_compiling() and not storage.forked:
                self._make_room_in_graph(storage, num_new)
            else:
                storage = self._make_room(num_new)
            data, end = storage.data, self._end
        data.narrow(-2, end, num_new).copy_(new)
        storage.tip = self._end = end + num_new
        return data.narrow(-2, self._start, self._end - self._start)

    def replace(self, content: torch.Tensor) -> None:
        """Forget the live tokens and hold `content` ``[batch, ..., tokens, width]`` instead."""
        self._adopt(content, reserve=not self._exact)

    def adopt(self, content: torch.Tensor) -> None:
        """Hold `content` itself, without a copy; the first append copies it to a buffer."""
        self._use(_Storage(content, content.shape[-2], borrowed=True), 0, content.shape[-2])

    def drop_first(self, num_tokens: int) -> None:
        """Let go of the oldest tokens; their memory goes at the next growth."""
        self._start += num_tokens

    def crop(self, num_tokens: int) -> None:
        """Let go of the newest tokens."""
        storage = self._storage
        if storage is not None and storage.tip == self._end and not storage.is_shared:
            storage.tip -= num_tokens  # ours alone: the next append may write there
        self._end -= num_tokens

    def gather_rows(self, index: torch.Tensor) -> None:
        """Make row i what row ``index[i]`` was; `index` ``[rows]`` may repeat and drop rows."""
        storage = self._storage
        if storage is None:
            return
        index = index.to(storage.data.device)
        view = self.live()
        assert view is not None
        same_size = index.shape[0] == view.shape[0]
        if not same_size or storage.is_shared or view.requires_grad:
            self._adopt(view.index_select(0, index), reserve=not self._exact)
            return
        if view.device.type == "cpu":
            # Only rows that change are copied, and on a CPU asking which costs nothing.
            changed = (index != torch.arange(index.shape[0])).nonzero().squeeze(-1)
            if changed.numel() == 0:
                return
            view.index_copy_(0, changed, view.index_select(0, index[changed]))
        else:
            view.copy_(view.index_select(0, index))

    def gather_tokens(self, index: torch.Tensor) -> None:
        """Keep only the tokens at `index`, ``[kept]`` for all, or ``[batch, kv_heads, kept]``."""
        view = self.live()
        if view is None:
            return
        index = index.to(view.device)
        if index.ndim == 1:
            kept = view.index_select(-2, index)
        else:
            kept = view.gather(-2, index.unsqueeze(-1).expand(*index.shape, view.shape[-1]))
        self._adopt(kept, reserve=not self._exact)

    def fork(self) -> "TokenBuffer":
        """A buffer with the same tokens that shares memory until one of the two writes."""
        other = TokenBuffer(exact=self._exact)
        if self._storage is not None:
            other._use(self._storage, self._start, self._end)
        return other

    def clear(self) -> None:
        """Forget everything and free the memory."""
        if self._storage is not None:
            self._storage.users.discard(self)
        self._storage, self._start, self._end = None, 0, 0

    # -- how memory is obtained --------------------------------------------------------------

    def _use(self, storage: _Storage, start: int, end: int) -> None:
        if self._storage is not None:
            self._storage.users.discard(self)
        storage.forked = storage.forked or len(storage.users) > 0
        storage.users.add(self)
        self._storage, self._start, self._end = storage, start, end

    def _append_functional(self, new: torch.Tensor) -> torch.Tensor:
        """First append, or one that autograd has to see."""
        live = self.live()
        if live is None or live.shape[-2] == 0:
            if torch.is_grad_enabled() and new.requires_grad:
                self.adopt(new)
            else:
                self._adopt(new, reserve=not self._exact)
        elif new.shape[-2]:
            self.adopt(torch.cat([live, new], dim=-2))
        result = self.live()
        assert result is not None
        return result

    @torch.compiler.disable
    def _make_room(self, num_new: int) -> _Storage:
        """Storage whose tip is this buffer's end and that holds `num_new` more tokens."""
        storage = self._storage
        assert storage is not None
        view = self.live()
        assert view is not None
        live = view.shape[-2]
        shape = list(view.shape)
        fresh = _allocate(shape, live + num_new, view, exact=self._exact)
        source = storage if not storage.is_shared and self._owns_memory(view) else None
        _copy_and_release(view, fresh.data.narrow(-2, 0, live), source)
        fresh.tip = live
        self._use(fresh, 0, live)
        return fresh

    def _make_room_in_graph(self, storage: _Storage, num_new: int) -> None:
        """The same for a compiled graph: plain torch, the storage object stays, no graph break."""
        view = self.live()
        assert view is not None
        live = view.shape[-2]
        capacity = _capacity(live + num_new, view.device, self._exact)
        with torch.inference_mode(False):
            data = view.new_empty([*view.shape[:-2], capacity, view.shape[-1]])
        data.narrow(-2, 0, live).copy_(view)
        storage.data, storage.capacity, storage.tip = data, capacity, live
        storage.mapping, storage.born, storage.borrowed = None, 0, False
        self._start, self._end = 0, live

    def _owns_memory(self, view: torch.Tensor) -> bool:
        """Whether nobody else can read the old pages, so that they can go while we copy."""
        storage = self._storage
        assert storage is not None
        # As many tensors as at birth, and `view`: more means that somebody kept one.
        return storage.mapping is not None and 0 < _num_tensors(storage.data) <= storage.born + 1

    @torch.compiler.disable
    def _adopt(self, content: torch.Tensor, *, reserve: bool) -> None:
        tokens = content.shape[-2]
        fresh = _allocate(list(content.shape), tokens, content, exact=not reserve)
        fresh.data.narrow(-2, 0, tokens).copy_(content)
        fresh.tip = tokens
        self._use(fresh, 0, tokens)


def _num_tensors(data: torch.Tensor) -> int:
    """How many tensors, arrays and handles share the memory of `data`; 0 where torch hides it."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return 0
    handle = data.untyped_storage()  # one object however often it is asked for: count its names
    return int(count(handle._cdata)) + sys.getrefcount(handle)


def _capacity(num_tokens: int, device: torch.device, exact: bool) -> int:
    if exact:
        return num_tokens
    # Untouched reserve is free on a CPU, so double; elsewhere stay within 1/8 of what is live.
    reserve = max(num_tokens, 256) if device.type == "cpu" else max(num_tokens // 8, _ROUND_TOKENS)
    return -(-(num_tokens + reserve) // _ROUND_TOKENS) * _ROUND_TOKENS


def _allocate(shape: list[int], num_tokens: int, like: torch.Tensor, *, exact: bool) -> _Storage:
    """Uninitialised storage for `num_tokens` and reserve; `shape` gives the other dimensions."""
    if num_tokens < 0:
        raise CacheError(f"A cache cannot hold {num_tokens} tokens.")
    shape = [*shape[:-2], _capacity(num_tokens, like.device, exact), shape[-1]]
    size_bytes = like.element_size()
    for dimension in shape:
        size_bytes *= dimension
    # Outside inference mode, so that the buffer can be written in any mode later.
    with torch.inference_mode(False):
        if like.device.type == "cpu" and size_bytes >= _MAPPED_FROM_BYTES:
            try:
                mapping = mmap.mmap(-1, size_bytes, flags=_MAP_FLAGS)
            except (OSError, ValueError):
                pass  # strict overcommit: fall through to the allocator's own message
            else:
                data = torch.frombuffer(mapping, dtype=like.dtype).view(shape)
                return _Storage(data, 0, mapping)
        return _Storage(torch.empty(shape, dtype=like.dtype, device=like.device), 0)


def _copy_and_release(old: torch.Tensor, new: torch.Tensor, source: _Storage | None) -> None:
    """Copy `old` to `new`; give `source`'s pages back as they are copied, if it may be eaten."""
    if source is None or source.mapping is None or not source.data.is_contiguous():
        new.copy_(old)
        return
    width, itemsize = old.shape[-1], old.element_size()
    row_bytes = source.capacity * width * itemsize
    rows_old = old.flatten(0, -3)
    rows_new = new.flatten(0, -3)
    first = (old.data_ptr() - source.data.data_ptr()) // itemsize // width
    size_bytes = old.numel() * itemsize
    chunk_bytes = min(_COPY_CHUNK_BYTES, max(size_bytes // _COPY_CHUNKS, 16 * mmap.PAGESIZE))
    chunk = max(1, chunk_bytes // max(1, width * itemsize))
    page = mmap.PAGESIZE
    for row in range(rows_old.shape[0]):
        for begin in range(0, old.shape[-2], chunk):
            stop = min(begin + chunk, old.shape[-2])
            rows_new[row, begin:stop].copy_(rows_old[row, begin:stop])
            low = row * row_bytes + (first + begin) * width * itemsize
            high = row * row_bytes + (first + stop) * width * itemsize
            low, high = -(-low // page) * page, high // page * page
            if high > low:
                source.mapping.madvise(mmap.MADV_DONTNEED, low, high - low)
