"""Memory that grows at the end of the token axis without copying the whole for every token.

    data   [batch, ..., capacity, width]          one allocation
            |<- dropped ->|<---- live ---->|<- reserve ->|
            0           start             end        capacity

Each (row, head) keeps its tokens contiguous, which is how attention reads them. On a CPU the
allocation is an anonymous mapping: reserve that was never written costs no resident memory. When
it has to grow, old pages are given back as soon as they were copied, so the peak stays near the
live bytes. Where tokens were dropped in front and nobody reads them, the live ones move there and
nothing is allocated.
"""

from typing import final

import torch

from mnemon.layers.memory import (
    Storage,
    allocate,
    capacity_for,
    copy_and_release,
    move_to_front,
    num_tensors,
)

__all__ = ["TokenBuffer"]

_MOST_MOVES = 4  # live tokens that move to the front of their memory, for each that was dropped


@final
class TokenBuffer:
    """A tensor ``[batch, ..., tokens, width]`` that appends in place along ``tokens``.

    Forks share the allocation: whoever writes at the tip first owns it, everybody else copies.
    Views handed out earlier keep their numbers when tokens are appended; they do not survive a
    `crop` followed by an append, as with any in-place cache.

    Args:
        exact: allocate no reserve (for what is written once, such as cross attention).
        slack: reserve for so many tokens, or a sixteenth of the live ones if that is more, on
            every device; None for what suits the device.
    """

    __slots__ = ("__weakref__", "_end", "_exact", "_slack", "_start", "_storage")

    def __init__(self, *, exact: bool = False, slack: int | None = None) -> None:
        self._storage: Storage | None = None
        self._start = 0
        self._end = 0
        self._exact = exact
        self._slack = 0 if exact else slack

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

    def room(self, num_new: int) -> torch.Tensor:
        """Memory for `num_new` tokens behind the live ones: written first, then `extend`.

        Something is stored, and nobody is shown the memory before.
        """
        storage = self._storage
        assert storage is not None
        is_tip = storage.tip == self._end or not (storage.forked or storage.borrowed)
        if self._end + num_new > storage.capacity or not is_tip:
            storage = self._make_room(num_new)
        return storage.data.narrow(-2, self._end, num_new)

    def extend(self, num_new: int) -> None:
        """The memory that `room` gave holds tokens now."""
        assert self._storage is not None
        self._storage.tip = self._end = self._end + num_new

    #: Tensors that `leaves` gives.
    NUM_LEAVES = 1

    def leaves(self) -> list[torch.Tensor]:
        """The live tokens as a tensor that lies whole: the same object until something is appended.

        A buffer with reserve lets go of it.
        """
        live = self.live()
        assert live is not None
        assert self._storage is not None
        data = self._storage.data
        if live.shape != data.shape:
            self.adopt(live.contiguous())
            data = self._storage.data
        return [data]

    def take_leaves(self, leaves: list[torch.Tensor]) -> None:
        """The reverse of `leaves`; runs no operator."""
        self.adopt(leaves[0])

    def writable(self) -> torch.Tensor | None:
        """The live tokens in memory that no fork reads, to be changed in place."""
        live = self.live()
        if live is not None and self._storage is not None and self._storage.is_shared:
            self.replace(live)
            live = self.live()
        return live

    def replace(self, content: torch.Tensor) -> None:
        """Forget the live tokens and hold `content` ``[batch, ..., tokens, width]`` instead."""
        self._adopt(content, reserve=not self._exact)

    def adopt(self, content: torch.Tensor) -> None:
        """Hold `content` itself, without a copy; the first append copies it to a buffer."""
        self._use(Storage(content, content.shape[-2], borrowed=True), 0, content.shape[-2])

    def drop_first(self, num_tokens: int) -> None:
        """Let go of the oldest tokens; their memory goes at the next growth."""
        self._start += num_tokens

    def shed(self, num_tokens: int, most: int) -> None:
        """`drop_first` in memory of ours for at most `most` tokens; otherwise move to less."""
        storage = self._storage
        assert storage is not None
        if storage.borrowed or storage.capacity > most:
            live = self.live()
            assert live is not None
            self.replace(live.narrow(-2, num_tokens, len(self) - num_tokens))
        else:
            self.drop_first(num_tokens)

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
        other = TokenBuffer(exact=self._exact, slack=self._slack)
        if self._storage is not None:
            other._use(self._storage, self._start, self._end)
        return other

    def clear(self) -> None:
        """Forget everything and free the memory."""
        if self._storage is not None:
            self._storage.users.discard(self)
        self._storage, self._start, self._end = None, 0, 0

    # -- how memory is obtained --------------------------------------------------------------

    def _use(self, storage: Storage, start: int, end: int) -> None:
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
    def _make_room(self, num_new: int) -> Storage:
        """Storage whose tip is this buffer's end and that holds `num_new` more tokens."""
        storage = self._storage
        assert storage is not None
        view = self.live()
        assert view is not None
        live = view.shape[-2]
        is_ours = not storage.is_shared and self._owns_memory(view)
        if is_ours and live + num_new <= storage.capacity and live <= _MOST_MOVES * self._start:
            move_to_front(storage.data, self._start, live)
            storage.tip = live
            self._start, self._end = 0, live
            return storage
        shape = list(view.shape)
        fresh = allocate(shape, live + num_new, view, self._slack)
        source = storage if is_ours and storage.mapping is not None else None
        copy_and_release(view, fresh.data.narrow(-2, 0, live), source)
        fresh.tip = live
        self._use(fresh, 0, live)
        return fresh

    def _make_room_in_graph(self, storage: Storage, num_new: int) -> None:
        """The same for a compiled graph: plain torch, the storage object stays, no graph break."""
        view = self.live()
        assert view is not None
        live = view.shape[-2]
        capacity = capacity_for(live + num_new, view.device, self._slack)
        with torch.inference_mode(False):
            data = view.new_empty([*view.shape[:-2], capacity, view.shape[-1]])
        data.narrow(-2, 0, live).copy_(view)
        storage.data, storage.capacity, storage.tip = data, capacity, live
        storage.mapping, storage.born, storage.borrowed = None, 0, False
        self._start, self._end = 0, live

    def _owns_memory(self, view: torch.Tensor) -> bool:
        """Whether nobody else can read the memory, so that it can be given back or written."""
        storage = self._storage
        assert storage is not None
        # As many tensors as at birth, and `view`: more means that somebody kept one.
        return 0 < num_tensors(storage.data) <= storage.born + 1

    @torch.compiler.disable
    def _adopt(self, content: torch.Tensor, *, reserve: bool) -> None:
        tokens = content.shape[-2]
        fresh = allocate(list(content.shape), tokens, content, self._slack if reserve else 0)
        fresh.data.narrow(-2, 0, tokens).copy_(content)
        fresh.tip = tokens
        self._use(fresh, 0, tokens)
