"""Memory of one side (keys or values) of a packed layer: blocks of 64 tokens, then a dense tail.

    blocks   [batch, kv_heads, blocks, block_bytes]      uint8     the first `num_skipped` tokens
    factors  [batch, kv_heads, blocks, 1]                float32   of the first block are gone
    tail     [batch, kv_heads, tokens, width]            the model's dtype

It has the verbs of a `TokenBuffer`; what it hands out is a `PackedTensor` once there are blocks.
The blocks have little reserve, the tail room for one block more than the residual.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor

from mnemon.attention.packing import pack_blocks, pack_into, unpack_blocks
from mnemon.formats import BLOCK_TOKENS, PackedHalf, PackedSide, PackedTensor, Scheme
from mnemon.formats.tokens import QuantizedTokens, blocks_of, quantize_tokens, tokens_of
from mnemon.layers.storage import TokenBuffer
from mnemon.schemes import SideFormat

__all__ = ["PackedBuffer", "Pending"]

_BLOCK_SLACK = 1
_BLOCKS_AT_ONCE = 32


class Pending(NamedTuple):
    """An append that was quantized and not yet carried out.

    Args:
        whole: the tail with the new tokens; None where they go behind it as it lies.
        forgets: all that the blocks hold so far is dropped.
        start: where in `whole` that which is kept begins.
        num_blocks: new blocks.
        apart: blocks and factors where they had no place yet; None: they lie behind the others.
    """

    whole: Tensor | None = None
    forgets: bool = False
    start: int = 0
    num_blocks: int = 0
    apart: tuple[Tensor, Tensor] | None = None


@final
class PackedBuffer:
    """One side's tokens ``[batch, kv_heads, tokens, width]``, all but the newest packed.

    Args:
        form: how they are stored.
        is_keys: keys and values are laid out differently.
        residual: newest tokens that stay dense.
    """

    __slots__ = (
        "_blocks",
        "_factors",
        "_num_skipped",
        "_scheme",
        "_tail",
        "form",
        "is_keys",
        "residual",
    )

    def __init__(self, form: SideFormat, *, is_keys: bool, residual: int) -> None:
        self.form = form
        self.is_keys = is_keys
        self.residual = residual
        self._blocks = TokenBuffer(slack=_BLOCK_SLACK)
        self._factors = TokenBuffer(slack=_BLOCK_SLACK)
        self._tail = TokenBuffer(slack=BLOCK_TOKENS)
        self._num_skipped = 0
        self._scheme: Scheme | None = None

    def _empty(self) -> "PackedBuffer":
        return PackedBuffer(self.form, is_keys=self.is_keys, residual=self.residual)

    # -- what is there -----------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_packed(self) -> int:
        """Tokens in blocks."""
        return len(self._blocks) * BLOCK_TOKENS - self._num_skipped

    @property
    def num_skipped(self) -> int:
        return self._num_skipped

    def __len__(self) -> int:
        return self.num_packed + len(self._tail)

    @property
    def is_empty(self) -> bool:
        return self._tail.is_empty

    @property
    def batch_size(self) -> int:
        return self._tail.batch_size

    def reading_length(self, num_new: int) -> int:
        """Tokens that an append of `num_new` will return."""
        return len(self) + num_new

    def fits(self, new: Tensor) -> bool:
        """Whether `new` goes behind the live tokens as it is: rows, heads, width and dtype."""
        return self._tail.fits(new)

    def promote(self, dtype: torch.dtype) -> None:
        """Hold a tail of a dtype that also holds `dtype`; blocks are what they are."""
        self._tail.promote(dtype)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Nothing: the tail promotes."""

    def check_room(self, num_new: int) -> None:
        """Nothing: it grows."""

    def scheme(self, width: int) -> Scheme:
        if self._scheme is None:
            self._scheme = self.form.scheme(width)
        return self._scheme

    def side(self) -> PackedSide | None:
        """The blocks; None while there are none."""
        blocks, factors, tail = self._blocks.live(), self._factors.live(), self._tail.live()
        if blocks is None or factors is None or tail is None or not blocks.shape[2]:
            return None
        width = tail.shape[-1]
        return PackedSide(
            blocks=blocks,
            factors=factors.squeeze(-1),
            scheme=self.scheme(width),
            width=width,
            is_keys=self.is_keys,
        )

    def tail_tokens(self) -> Tensor | None:
        """The dense tail, ``[batch, kv_heads, tokens, width]``; None before the first append."""
        return self._tail.live()

    def view(self) -> Tensor | None:
        """All tokens as attention reads them; None before the first append."""
        tail = self._tail.live()
        return None if tail is None else _view(self.side(), self._num_skipped, tail)

    live = view

    def tail(self, num_tokens: int) -> Tensor:
        """The last `num_tokens` tokens as attention reads them."""
        tail = self._tail.live()
        assert tail is not None
        return _last(self.side(), self._num_skipped, tail, num_tokens)

    def numbers(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `start` to `stop`, dequantized."""
        tail, packed = self._tail.live(), self.num_packed
        assert tail is not None
        parts = []
        if start < packed and start < stop:
            side = self.side()
            assert side is not None
            first = (start + self._num_skipped) // BLOCK_TOKENS
            last = -(-(min(stop, packed) + self._num_skipped) // BLOCK_TOKENS)
            for block in range(first, last, _BLOCKS_AT_ONCE):
                count = min(_BLOCKS_AT_ONCE, last - block)
                parts.append(unpack_blocks(side, block, count, dtype))
            begin = start + self._num_skipped - first * BLOCK_TOKENS
            parts = [torch.cat(parts, dim=2).narrow(2, begin, min(stop, packed) - start)]
        if stop > packed or not parts:
            begin = max(start - packed, 0)
            parts.append(tail[:, :, begin : max(stop - packed, begin)].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes of blocks and tail."""
        return self._blocks.nbytes + self._factors.nbytes + self._tail.nbytes

    @property
    def nbytes_reserved(self) -> int:
        """Bytes allocated."""
        buffers = (self._blocks, self._factors, self._tail)
        return sum(buffer.nbytes_reserved for buffer in buffers)

    # -- appending: quantize first, then store -----------------------------------------------

    def prepare(self, new: Tensor, kept: int | None = None) -> Pending:
        """Quantize what an append of `new` would push out of the residual; changes nothing.

        Args:
            new: ``[batch, kv_heads, new, width]``, in rows, heads and width what is stored.
            kept: tokens that will be kept; older ones need not be packed.

        Raises:
            CacheError: a number that is not finite.
        """
        old = self._tail.live()
        num_old = 0 if old is None else old.shape[-2]
        total = num_old + new.shape[-2]
        forgets = kept is not None and kept <= total
        start = total - kept if kept is not None and forgets else 0
        count = max(0, total - start - self.residual) // BLOCK_TOKENS
        if not count and new.shape[-2] <= BLOCK_TOKENS:
            return Pending()
        stop = start + count * BLOCK_TOKENS
        if old is not None and stop <= num_old and new.shape[-2] <= BLOCK_TOKENS:
            whole, source = None, old  # a decode step: no copy of the tail beside the tail
        else:
            source = new if old is None or not num_old else torch.cat([old, new], dim=-2)
            whole = source
        if not count:
            return Pending(whole, forgets, start)
        packed = source.detach()[:, :, start:stop]
        if forgets or self._blocks.is_empty or torch.compiler.is_compiling():
            apart = pack_blocks(packed, self.scheme(new.shape[-1]), self.is_keys)
            return Pending(whole, forgets, start, count, apart)
        self._pack_behind(packed, count)
        return Pending(whole, forgets, start, count)

    def _pack_behind(self, packed: Tensor, count: int) -> None:
        """Pack into the memory behind the blocks, which are as many as before."""
        width = packed.shape[-1]
        pack_into(
            packed,
            PackedSide(
                blocks=self._blocks.room(count),
                factors=self._factors.room(count).squeeze(-1),
                scheme=self.scheme(width),
                width=width,
                is_keys=self.is_keys,
            ),
        )

    def commit(self, new: Tensor, pending: Pending, num_visible: int | None = None) -> Tensor:
        """Carry out an append; returns the last `num_visible` tokens (all), new ones as given."""
        side, skipped, whole = self.side(), self._num_skipped, pending.whole
        if whole is None:
            whole = self._tail.append(new)
        result = _last(side, skipped, whole, num_visible)
        if pending.whole is None and not pending.num_blocks:
            return result
        if pending.forgets:
            self._clear_blocks()
        if pending.apart is not None:
            blocks, factors = pending.apart
            self._blocks.append(blocks)
            self._factors.append(factors.unsqueeze(-1))
        elif pending.num_blocks:
            self._blocks.extend(pending.num_blocks)
            self._factors.extend(pending.num_blocks)
        rest = pending.start + pending.num_blocks * BLOCK_TOKENS
        if pending.whole is None:
            self._tail.shed(rest, self.residual + 2 * BLOCK_TOKENS)
        else:
            self._tail.replace(whole[:, :, rest:])
        return result

    def append(self, new: Tensor) -> Tensor:
        """Store `new` and return all tokens, the new ones as they were given."""
        return self.commit(new, self.prepare(new))

    def replace(self, content: Tensor) -> None:
        """Forget the live tokens and hold dense `content` instead."""
        other = self._empty()
        other.append(content)
        self._take(other)

    def adopt(self, content: Tensor) -> None:
        """Hold dense `content`, borrowed as far as it stays dense."""
        self.hold(None, 0, content)

    def hold(self, side: PackedSide | None, num_skipped: int, tail: Tensor) -> None:
        """Borrow blocks and a tail, which fit together; a longer tail is packed."""
        self.clear()
        self._tail.adopt(tail)
        if side is not None:
            self._blocks.adopt(side.blocks)
            self._factors.adopt(side.factors.unsqueeze(-1))
            self._num_skipped = num_skipped
        if tail.shape[-2] >= self.residual + BLOCK_TOKENS:
            self.append(tail[:, :, :0])

    # -- tokens that go ----------------------------------------------------------------------

    def crop(self, num_tokens: int) -> None:
        """Let go of the newest tokens; what is left of a block goes back to the tail."""
        num_tail = len(self._tail)
        if num_tokens <= num_tail:
            self._tail.crop(num_tokens)
            return
        end = self.num_packed - (num_tokens - num_tail) + self._num_skipped
        last, rest = divmod(end, BLOCK_TOKENS)
        tail, side = self._tail.live(), self.side()
        assert tail is not None
        assert side is not None
        if rest:
            begin = self._num_skipped if last == 0 else 0
            opened = unpack_blocks(side, last, 1, tail.dtype)
            self._tail.replace(opened[:, :, begin:rest])
        else:
            self._tail.crop(num_tail)
        removed = self.num_blocks - last
        self._blocks.crop(removed)
        self._factors.crop(removed)
        if last == 0:
            self._num_skipped = 0

    def drop_first(self, num_tokens: int) -> None:
        """Let go of the oldest tokens; the memory of whole blocks goes at the next growth."""
        if num_tokens >= self.num_packed:
            self._tail.drop_first(num_tokens - self.num_packed)
            self._clear_blocks()
            return
        whole, self._num_skipped = divmod(self._num_skipped + num_tokens, BLOCK_TOKENS)
        self._blocks.drop_first(whole)
        self._factors.drop_first(whole)

    def gather_tokens(self, index: Tensor) -> None:
        """Keep only the tokens at `index`, ``[kept]`` for all, or ``[batch, kv_heads, kept]``.

        Groups within a token move as they are; groups of a channel are quantized again.
        """
        tail = self._tail.live()
        if tail is None:
            return
        index = index.to(tail.device).expand(*tail.shape[:2], index.shape[-1])
        count = max(0, index.shape[-1] - self.residual) // BLOCK_TOKENS
        front, back = index.split([count * BLOCK_TOKENS, index.shape[-1] - count * BLOCK_TOKENS], 2)
        start = int(back.min()) if back.shape[-1] else len(self)
        rest = _gather(self.numbers(start, len(self), tail.dtype), back - start)
        if count:
            found = self._quantized(int(front.max()) + 1)
            if found is not None:
                blocks, factors = blocks_of(
                    found.gather(front), self.scheme(tail.shape[-1]), tail.shape[-1], self.is_keys
                )
            else:
                dense = self.numbers(0, int(front.max()) + 1, torch.float32)
                blocks, factors = pack_blocks(
                    _gather(dense, front), self.scheme(tail.shape[-1]), self.is_keys
                )
            self._put_blocks(blocks, factors)
        else:
            self._clear_blocks()
        self._tail.replace(rest)

    @staticmethod
    def merged(buffers: "list[PackedBuffer]", num_tokens: int) -> "PackedBuffer":
        """Rows of all `buffers`, aligned at the newest token, zeros on the left."""
        first = buffers[0]
        other = first._empty()
        tails = [buffer._tail.live() for buffer in buffers]
        held = [tail for tail in tails if tail is not None]
        width, dtype = held[0].shape[-1], held[0].dtype
        count = max(0, num_tokens - first.residual) // BLOCK_TOKENS
        stop = count * BLOCK_TOKENS
        scheme = first.scheme(width)
        rests, all_blocks, all_factors = [], [], []
        for buffer in buffers:
            padding = num_tokens - len(buffer)
            end = max(stop - padding, 0)
            rest = buffer.numbers(end, len(buffer), dtype)
            rests.append(_pad_left(rest, num_tokens - stop))
            if not count:
                continue
            side = buffer.side()
            if padding == buffer._num_skipped == 0 and side is not None:
                if side.num_blocks == count:  # the same blocks as before
                    all_blocks.append(side.blocks)
                    all_factors.append(side.factors)
                    continue
            found = buffer._quantized(end)
            if found is not None:
                blocks, factors = blocks_of(found.pad_left(stop), scheme, width, first.is_keys)
            else:
                dense = _pad_left(buffer.numbers(0, end, torch.float32), stop)
                blocks, factors = pack_blocks(dense, scheme, first.is_keys)
            all_blocks.append(blocks)
            all_factors.append(factors)
        other._tail.replace(torch.cat(rests))
        if count:
            other._put_blocks(torch.cat(all_blocks), torch.cat(all_factors))
        return other

    def row(self, rows: Tensor) -> "PackedBuffer":
        """A new buffer with the rows at `rows`."""
        other = self.fork()
        other.gather_rows(rows)
        return other

    def _quantized(self, stop: int) -> QuantizedTokens | None:
        """Codes of the first `stop` tokens, one by one; None where they cannot be moved."""
        tail, side = self._tail.live(), self.side()
        assert tail is not None
        scheme = self.scheme(tail.shape[-1])
        if scheme.axis == "channel":
            return None
        parts = []
        packed = min(stop, self.num_packed)
        if packed and side is not None:
            found = tokens_of(side)
            if found is None:
                return None
            parts.append(found.narrow(self._num_skipped, packed))
        if stop > packed:
            fresh = quantize_tokens(tail.detach()[:, :, : stop - packed], scheme)
            if fresh is None:
                return None
            parts.append(fresh)
        if not parts:
            return quantize_tokens(tail.detach()[:, :, :0], scheme)
        return QuantizedTokens.cat(parts)

    # -- rows --------------------------------------------------------------------------------

    def gather_rows(self, index: Tensor) -> None:
        """Make row i what row ``index[i]`` was; `index` ``[rows]`` may repeat and drop rows."""
        for buffer in (self._blocks, self._factors, self._tail):
            buffer.gather_rows(index)

    def fork(self) -> "PackedBuffer":
        """A buffer with the same tokens that shares memory until one of the two writes."""
        other = self._empty()
        other._blocks, other._factors = self._blocks.fork(), self._factors.fork()
        other._tail = self._tail.fork()
        other._num_skipped, other._scheme = self._num_skipped, self._scheme
        return other

    def leaves(self) -> list[torch.Tensor]:
        """Blocks, factors and tail (the tail alone without blocks), each lying whole: the same
        objects until something is appended."""
        held = [self._blocks, self._factors, self._tail] if self.num_blocks else [self._tail]
        return [leaf for buffer in held for leaf in buffer.leaves()]

    def take_leaves(self, leaves: list[torch.Tensor]) -> None:
        """The reverse of `leaves`; runs no operator."""
        self.clear()
        held = [self._blocks, self._factors, self._tail] if len(leaves) > 1 else [self._tail]
        for buffer, leaf in zip(held, leaves, strict=True):
            buffer.take_leaves([leaf])

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._clear_blocks()
        self._tail.clear()
        self._scheme = None

    def _clear_blocks(self) -> None:
        self._blocks.clear()
        self._factors.clear()
        self._num_skipped = 0

    def _put_blocks(self, blocks: Tensor, factors: Tensor) -> None:
        self._clear_blocks()
        self._blocks.replace(blocks)
        self._factors.replace(factors.unsqueeze(-1))

    def _take(self, other: "PackedBuffer") -> None:
        self._blocks, self._factors, self._tail = other._blocks, other._factors, other._tail
        self._num_skipped, self._scheme = other._num_skipped, other._scheme


def _view(side: PackedSide | None, num_skipped: int, tail: Tensor) -> Tensor:
    """Blocks and tail as one tensor; the tail itself where there are no blocks."""
    if side is None:
        return tail
    return PackedTensor(PackedHalf(side=side, tail=tail, num_skipped=num_skipped))


def _last(
    side: PackedSide | None, num_skipped: int, tail: Tensor, num_tokens: int | None
) -> Tensor:
    """The last `num_tokens` of blocks and tail."""
    if num_tokens is None:
        return _view(side, num_skipped, tail)
    if side is None or num_tokens <= tail.shape[2]:
        return tail.narrow(2, tail.shape[2] - num_tokens, num_tokens)
    # Tokens of the blocks that stay in front of what is asked for.
    before = side.num_tokens + tail.shape[2] - num_tokens
    first, skipped = divmod(before, BLOCK_TOKENS)
    return _view(side.narrow(first, side.num_blocks - first), skipped, tail)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _pad_left(x: Tensor, num_tokens: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, num_tokens - x.shape[2], 0))
