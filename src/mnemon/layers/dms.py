"""Dynamic Memory Sparsification: marked tokens go once they leave a window."""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.layers.compressing import Call, CompressingLayer, Past
from mnemon.layers.frozen_slots import Codec, Frozen, FrozenSlots
from mnemon.schemes import PackedFormat

__all__ = ["DMSLayer"]


@final
class DMSLayer(CompressingLayer):
    """A ring of the newest tokens, and behind it those that left it unmarked, in order of time.

    ::

        slots   |<- ring: window + 1 ->|<- kept: no mark when they left the ring ->|

    A token's mark comes with the token after it. Real tokens of a row are numbered without
    padding; number i lies in slot ``i % (window + 1)`` of the ring. All verbs of
    `CompressingLayer` work.

    Args:
        window: tokens before a query that are always seen; 0 drops a marked token at once.
        sliding: tokens that a query sees at most, itself included; None for all.
        form: a packed format for slots that do not change any more; None for the model's dtype.
        strict: refuse `append` without decisions.
        frozen: where such slots go; None: nowhere, or to the device in `form`.

    Source:
        DMS (2506.05345), the inference cache of section 3.
    """

    kind = "dms"
    method = "dms"
    _extra_names = frozenset({"marks"})

    def __init__(
        self,
        window: int,
        *,
        sliding: int | None = None,
        form: PackedFormat | None = None,
        strict: bool = False,
        frozen: Frozen | None = None,
    ) -> None:
        super().__init__(sliding=sliding, form=form, strict=strict, frozen=frozen)
        if window < 0:
            raise CacheError(f"A window of DMS holds 0 tokens or more; got {window}.")
        self.window = window
        self._marks = torch.zeros((0, 0, 0), dtype=torch.bool)  # of the ring's slots

    @property
    def _ring(self) -> int:
        return self.window + 1

    def _empty(self) -> "DMSLayer":
        frozen = self.frozen
        if frozen is not None:
            frozen = frozen.holding(FrozenSlots(Codec(self.form)))
        return DMSLayer(
            self.window, sliding=self.sliding, form=self.form, strict=self.strict, frozen=frozen
        )

    # -- writing ---------------------------------------------------------------------------------

    def _store(self, call: Call) -> None:
        keys, values, marks, valid, _ = call
        num_new = keys.shape[2]
        if not num_new and not self.slots.is_empty:
            return
        self.slots.prepare(self._like(keys, values), num_new)
        if not self._marks.numel():
            self._marks = marks.new_zeros((*marks.shape[:2], self._ring))
        if num_new == 1 and valid is None:
            if not self.slots.write_token(self._count, keys, values, marks, self._marks):
                self._store_one(keys, values, marks)
        elif num_new:
            self._store_many(call)
        if self.sliding is not None:
            self._drop_unseen()

    def _store_one(self, keys: Tensor, values: Tensor, marks: Tensor) -> None:
        slots, ring, count = self.slots, self._ring, self._count
        batch, heads = marks.shape[:2]
        slot = (count % ring)[:, None, None].expand(batch, heads, 1)
        before = ((count - 1) % ring)[:, None, None].expand(batch, heads, 1)
        self._marks.scatter_(2, before, marks)
        # What leaves the ring goes behind the kept ones; a ring with room gives its empty slot to
        # itself, and a marked token lands beyond the length, where the next one overwrites it.
        dropped = self._marks.gather(2, slot)[..., 0] & (count >= ring)[:, None]
        slots.write(slots.lengths.to(torch.int64)[..., None], *slots.read(slot))
        slots.lengths += ~dropped
        new = [keys, values]
        if self.sliding is not None:
            new.append(_positions(count[:, None], heads))
        slots.write(slot, *new)
        self._marks.scatter_(2, slot, False)
        self._count = count + 1

    def _store_many(self, call: Call) -> None:
        slots, ring, count = self.slots, self._ring, self._count
        keys, values, marks, valid, _ = call
        batch, heads, num_new = marks.shape
        if valid is None:
            valid = marks.new_ones((batch, num_new))
        numbers = _numbers(count, valid)  # [batch, new], -1 where there is padding
        after = count + valid.sum(-1)
        held = self._ring_numbers()  # [batch, ring in use]
        old_marks = self._marked_past(call)[..., : held.shape[1]]
        order = held.argsort(dim=-1)  # in order of time, so that kept ones are
        held = held.gather(1, order)
        places = order[:, None].expand(batch, heads, -1)
        ring_parts = slots.read(places)
        fresh = [keys, values]
        if self.sliding is not None:
            fresh.append(_positions(numbers, heads))
        parts = [torch.cat(pair, dim=2) for pair in zip(ring_parts, fresh, strict=True)]
        every = torch.cat([held, numbers], dim=1)
        marked = torch.cat(
            [old_marks.gather(2, places), F.pad(marks[..., 1:], (0, 1), value=False)], dim=2
        )
        leaves = ((every >= 0) & (every < (after - ring)[:, None]))[:, None]
        kept = leaves & ~marked
        # Where a row's ring is not full yet, nothing leaves and nothing is kept behind it.
        begin = slots.lengths.to(torch.int64) - count.clamp(max=ring)[:, None] + ring
        target = torch.where(kept, begin[..., None] + kept.cumsum(-1) - 1, slots.scrap())
        slots.write(target, *parts)
        stays = (numbers >= 0) & (numbers >= (after - ring)[:, None])
        slot = torch.where(stays, numbers % ring, slots.scrap())
        slot = slot[:, None].expand(batch, heads, num_new)
        slots.write(slot, *fresh)
        slots.lengths += (after.clamp(max=ring) - count.clamp(max=ring))[:, None] + kept.sum(-1)
        self._write_marks(old_marks, marked[..., -num_new:], slot, stays)
        self._count = after

    def _write_marks(
        self, old_marks: Tensor, new_marks: Tensor, slot: Tensor, stays: Tensor
    ) -> None:
        """Marks of the ring after a call; one more place than slots takes what does not stay."""
        room = F.pad(self._marks, (0, 1))
        room[..., : old_marks.shape[-1]] = old_marks
        place = torch.where(stays[:, None], slot, self._ring)
        self._marks = room.scatter(2, place, new_marks)[..., : self._ring].contiguous()

    def _ring_numbers(self) -> Tensor:
        """Numbers of the tokens in the ring's slots, [batch, slots in use], -1 where empty."""
        used = min(self._ring, self.slots.bound, max(self._seen, 0))
        slot = torch.arange(used, device=self._count.device)
        newest = self._count[:, None] - 1
        numbers = newest - (newest - slot) % self._ring
        return numbers.masked_fill((numbers < 0) | (newest < 0), -1)

    def _marked_past(self, call: Call) -> Tensor:
        """The ring's marks once the first token of `call` has marked the newest of them."""
        marks = self._marks
        decisions, valid = call.decisions, call.valid
        if valid is None:
            first = decisions[..., :1]
        else:
            at = valid.to(torch.int8).argmax(-1)[:, None, None].expand(*marks.shape[:2], 1)
            first = decisions.gather(2, at) & valid.any(-1)[:, None, None]
        newest = ((self._count - 1) % self._ring)[:, None, None].expand(*marks.shape[:2], 1)
        return marks.scatter(2, newest, first)

    def _drop_unseen(self) -> None:
        """Let slots go that the newest token no longer sees, once they are half of all."""
        assert self.sliding is not None
        slots = self.slots
        most = 2 * max(self.sliding, self._ring)
        if slots.bound < most or (longest := slots.longest()) < most:
            return
        positions = slots.parts[2][:, :, :longest, 0]
        old = (positions <= (self._count - 1 - self.sliding)[:, None, None]) & slots.live()
        old[..., : self._ring] = False
        gone = old.sum(-1)
        index = torch.arange(longest, device=gone.device)
        source = torch.where(index < self._ring, index, index + gone[..., None])
        slots.write(index.expand_as(source), *slots.read(source.clamp(max=longest - 1)))
        slots.lengths -= gone

    def _first_frozen(self) -> Tensor:
        # Behind the ring; a row whose ring is not full has nothing there.
        return torch.full_like(self.slots.lengths, self._ring, dtype=torch.int64)

    def _num_held(self, residual: int) -> int:
        return max(0, residual - self._ring)

    # -- reading ---------------------------------------------------------------------------------

    def past(self, call: Call) -> list[Past]:
        slots = self.slots
        if slots.is_empty or not self._seen:
            return []
        live = slots.live()  # [batch, heads, longest]
        longest = live.shape[-1]
        batch, _, num_new = call.decisions.shape
        valid = call.decisions.new_ones((batch, num_new)) if call.valid is None else call.valid
        queries = _numbers(self._count, valid)
        ring = self._ring_numbers()[:, :longest]
        used = ring.shape[1]
        marked = self._marked_past(call)[..., :used]
        # Of the ring a query still sees what is near; of what is kept behind it, everything.
        near = (queries[..., None] - ring[:, None] <= self.window)[:, None]
        seen = [live[:, :, None, :used] & (near | ~marked[:, :, None]), live[:, :, None, used:]]
        if self.sliding is not None:
            positions = slots.parts[2][:, :, :longest, 0]
            last = positions[:, :, None] > (queries - self.sliding)[:, None, :, None]
            seen = [seen[0] & last[..., :used], seen[1] & last[..., used:]]
        keys, values = (part[:, :, :longest] for part in slots.parts[:2])
        found = [Past(keys[:, :, :used], values[:, :, :used], seen[0])]
        if longest > used:
            found.append(Past(keys[:, :, used:], values[:, :, used:], seen[1]))
        return found

    def visible(self) -> Tensor | None:
        if self.sliding is None:
            return None
        live = self.slots.live()
        positions = self.slots.parts[2][:, :, : live.shape[-1], 0]
        return live & (positions > (self._count - 1 - self.sliding)[:, None, None])

    def _order(self) -> Tensor:
        live = self.slots.live()
        batch, heads, longest = live.shape
        ring = self._ring_numbers()[:, :longest]
        # Kept slots come first, in the order of their slots; then the ring's, by number.
        rank = torch.arange(longest, device=live.device).expand(batch, heads, longest).clone()
        rank[..., : ring.shape[1]] = longest + ring[:, None]
        rank = rank.masked_fill(~live, -1)
        order = rank.argsort(dim=-1, stable=True)
        return order.masked_fill(~live.gather(2, order), -1)

    # -- going back ------------------------------------------------------------------------------

    def _is_open(self, num_tokens: int) -> bool:
        # While nothing left a ring, all is there; a mark falls with the token that set it.
        count = self._count
        return bool((count <= self._ring).all() and (count >= num_tokens).all())

    def _take_back(self, num_tokens: int) -> None:
        self._count = self._count - num_tokens
        self.slots.lengths -= num_tokens

    def _snapshot(self, call: Call) -> dict[str, Any]:
        before = super()._snapshot(call)
        used = min(self._ring, self.slots.bound)
        before["marks"] = self._marks.clone()
        before["ring"] = [part[:, :, :used].clone() for part in self.slots.parts]
        if self.sliding is not None and not self.slots.is_empty:
            before["slots"] = self.slots.fork()  # slots may be dropped
        return before

    def _restore(self, before: dict[str, Any]) -> None:
        if "slots" in before:
            self.slots = before["slots"]
            self.slots.prepare(self.slots.parts, 0)
        super()._restore(before)
        if not self._seen:
            return
        self._marks = before["marks"]
        for part, ring in zip(self.slots.parts, before["ring"], strict=True):
            part[:, :, : ring.shape[2]] = ring

    def _clear(self) -> None:
        self._marks = torch.zeros((0, 0, 0), dtype=torch.bool)

    # -- rows and state --------------------------------------------------------------------------

    def _take_rows(self, index: Tensor) -> None:
        super()._take_rows(index)
        self._marks = self._marks.index_select(0, index)

    def _options(self) -> tuple[Any, ...]:
        return (self.window,)

    def _stack(self, layers: Sequence["DMSLayer"]) -> None:
        self._marks = torch.cat([layer._marks for layer in layers])

    def _copy(self, other: "DMSLayer") -> None:
        self._marks = other._marks.clone()

    def _facts(self) -> dict[str, Any]:
        return {"window": self.window}

    def _extra(self) -> dict[str, Tensor]:
        return {"marks": self._marks} if self._marks.numel() else {}

    def _load_extra(self, tensors: dict[str, Tensor]) -> None:
        marks = tensors.get("marks")
        expected = (*self.slots.lengths.shape, self._ring)
        if marks is None or marks.shape != expected or marks.dtype != torch.bool:
            raise CacheError(f"A saved dms layer's marks are missing or not {list(expected)} bool.")
        least = self._count.clamp(max=self._ring)[:, None]
        if bool((self.slots.lengths < least).any()):
            raise CacheError("A saved dms layer holds fewer tokens than its window.")
        self._marks = marks.clone()


def _numbers(count: Tensor, valid: Tensor) -> Tensor:
    """Numbers of new tokens, [batch, new], -1 for padding."""
    return (count[:, None] + valid.cumsum(-1) - 1).masked_fill(~valid, -1)


def _positions(numbers: Tensor, heads: int) -> Tensor:
    """Numbers as the positions of slots, int32 [batch, heads, new, 1]."""
    return numbers.to(torch.int32)[:, None, :, None].expand(-1, heads, -1, 1)
