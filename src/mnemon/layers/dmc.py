"""Dynamic Memory Compression: tokens merge into the newest slot, or begin a new one."""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.layers.compressing import Call, CompressingLayer, Past
from mnemon.layers.frozen_slots import Codec, Frozen, FrozenSlots
from mnemon.schemes import PackedFormat

__all__ = ["DMCLayer"]


@final
class DMCLayer(CompressingLayer):
    """Slots in order of time, of which the newest is open: a merged token writes it anew.

    What comes in as a token's keys and values is the mean of its segment up to it; the model
    computes it from the raw numbers of the newest tokens (`carry`), which lie here from call to
    call. All verbs of `CompressingLayer` work.

    Args:
        window: tokens of a segment that its mean covers; `carry` holds one less.
        sliding: tokens that a query sees at most, itself included; None for all.
        form: a packed format for slots that do not change any more; None for the model's dtype.
        strict: refuse `append` without decisions.
        frozen: where such slots go; None: nowhere, or to the device in `form`.

    Source:
        DMC (2403.09636), the inference cache of section 3.
    """

    kind = "dmc"
    method = "dmc"
    _extra_names = frozenset({"carry"})

    def __init__(
        self,
        window: int = 12,
        *,
        sliding: int | None = None,
        form: PackedFormat | None = None,
        strict: bool = False,
        frozen: Frozen | None = None,
    ) -> None:
        super().__init__(sliding=sliding, form=form, strict=strict, frozen=frozen)
        if window < 1:
            raise CacheError(f"A slot of DMC averages 1 token or more; got {window}.")
        self.window = window
        #: Raw numbers of the newest tokens, [batch, kv_heads, n, width]; empty before the first.
        self.carry = torch.zeros((0, 0, 0, 0))

    def _empty(self) -> "DMCLayer":
        frozen = self.frozen
        if frozen is not None:
            frozen = frozen.holding(FrozenSlots(Codec(self.form)))
        return DMCLayer(
            self.window, sliding=self.sliding, form=self.form, strict=self.strict, frozen=frozen
        )

    # -- writing ---------------------------------------------------------------------------------

    def _store(self, call: Call) -> None:
        keys, values, merged, valid, raw = call
        num_new = keys.shape[2]
        self.slots.prepare(self._like(keys, values), num_new)
        if raw is not None:
            if not self.carry.numel():
                # Of weight 0 and not merged: a mean never reaches so far.
                size = (*raw.shape[:2], self.window - 1, raw.shape[3])
                self.carry = raw.new_zeros(size)
            self.carry = torch.cat([self.carry, raw], dim=2)[:, :, num_new:]
        if (
            num_new == 1
            and valid is None
            and self.slots.write_token(self._count, keys, values, merged)
        ):
            pass
        elif num_new:
            self._write(call)
        if self.sliding is not None:
            self._drop_unseen()

    def _write(self, call: Call) -> None:
        keys, values, merged, valid, _ = call
        num_new, slots = keys.shape[2], self.slots
        heads = keys.shape[1]
        lengths = slots.lengths.to(torch.int64)
        if not self._started:
            # A row's first token has nothing to merge into.
            here = merged.new_ones(merged.shape[0], num_new) if valid is None else valid
            first = (here.cumsum(-1) == 1) & (self._count == 0)[:, None]
            merged = merged & ~first[:, None]
        opens = ~merged if valid is None else ~merged & valid[:, None]
        target = lengths[..., None] + opens.cumsum(-1) - 1
        if num_new > 1:
            # Only the last token of a segment stays in its slot.
            goes_on = F.pad(merged[..., 1:], (0, 1), value=False)
            hidden = goes_on if valid is None else goes_on | ~valid[:, None]
            target = target.masked_fill(hidden, slots.scrap())
        new = [keys, values]
        if valid is None:
            valid_count: Tensor | int = num_new
            numbers = self._count[:, None] + torch.arange(num_new, device=lengths.device)
        else:
            valid_count = valid.sum(-1)
            numbers = self._count[:, None] + valid.cumsum(-1) - 1
        if self.sliding is not None:
            new.append(numbers.to(torch.int32)[:, None, :, None].expand(-1, heads, -1, 1))
        slots.write(target, *new)
        slots.lengths += opens.sum(-1)
        self._count = self._count + valid_count

    def _drop_unseen(self) -> None:
        """Let slots go that the newest token no longer sees, once they are half of all."""
        assert self.sliding is not None
        slots = self.slots
        if slots.bound < 2 * self.sliding or (longest := slots.longest()) < 2 * self.sliding:
            return
        positions = slots.parts[2][:, :, :longest, 0]
        old = (positions <= (self._count - 1 - self.sliding)[:, None, None]) & slots.live()
        gone = old.sum(-1)
        index = torch.arange(longest, device=gone.device)
        source = (index + gone[..., None]).clamp(max=longest - 1)
        slots.write(index.expand_as(source), *slots.read(source))
        slots.lengths -= gone

    def _first_frozen(self) -> Tensor:
        return torch.zeros_like(self.slots.lengths, dtype=torch.int64)

    def _num_held(self, residual: int) -> int:
        return max(residual, 1)  # the open slot is written again

    # -- reading ---------------------------------------------------------------------------------

    def past(self, call: Call) -> list[Past]:
        slots = self.slots
        if slots.is_empty or not self._seen:
            return []
        live = slots.live()
        batch, heads, num_new = call.decisions.shape
        longest = live.shape[-1]
        if call.valid is None:
            joins = call.decisions[..., 0]
            queries = self._count[:, None] + torch.arange(num_new, device=live.device)
        else:
            at = call.valid.to(torch.int8).argmax(-1)[:, None, None].expand(batch, heads, 1)
            joins = call.decisions.gather(2, at)[..., 0] & call.valid.any(-1)[:, None]
            queries = self._count[:, None] + call.valid.cumsum(-1) - 1
        # The open slot is no longer what it was if the first new token merges into it.
        left = slots.lengths - joins.to(torch.int32)
        slot = torch.arange(longest, device=live.device)
        seen = (slot < left[..., None])[:, :, None]
        if self.sliding is not None:
            positions = slots.parts[2][:, :, :longest, 0]
            seen = seen & (positions[:, :, None] > (queries - self.sliding)[:, None, :, None])
        keys, values = (part[:, :, :longest] for part in slots.parts[:2])
        return [Past(keys, values, seen)]

    def visible(self) -> Tensor | None:
        if self.sliding is None:
            return None
        live = self.slots.live()
        positions = self.slots.parts[2][:, :, : live.shape[-1], 0]
        return live & (positions > (self._count - 1 - self.sliding)[:, None, None])

    def _order(self) -> Tensor:
        longest = self.slots.longest()
        slot = torch.arange(longest, device=self.slots.lengths.device)
        order = slot - (longest - self.slots.lengths.to(torch.int64))[..., None]
        return order.clamp(min=-1)

    # -- going back ------------------------------------------------------------------------------

    def _is_open(self, num_tokens: int) -> bool:
        return False  # a slot does not say what it was before a token merged into it

    def _take_back(self, num_tokens: int) -> None:
        raise AssertionError("nothing goes back without a record")

    def _snapshot(self, call: Call) -> dict[str, Any]:
        before = super()._snapshot(call)
        before["carry"] = self.carry
        if not self.slots.is_empty:
            before["open"] = self.slots.read(self._open_slot())
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
        self.carry = before["carry"]
        self.slots.write(self._open_slot(), *before["open"])

    def _open_slot(self) -> Tensor:
        return (self.slots.lengths.to(torch.int64) - 1).clamp(min=0)[..., None]

    def _clear(self) -> None:
        self.carry = torch.zeros((0, 0, 0, 0))

    # -- rows and state --------------------------------------------------------------------------

    def _take_rows(self, index: Tensor) -> None:
        super()._take_rows(index)
        if self.carry.numel():
            self.carry = self.carry.index_select(0, index)

    def _options(self) -> tuple[Any, ...]:
        return (self.window,)

    def _stack(self, layers: Sequence["DMCLayer"]) -> None:
        carries = [layer.carry for layer in layers]
        if len({carry.shape[1:] for carry in carries}) > 1:
            raise CacheError("Cannot merge dmc layers of which some were filled by hand.")
        self.carry = torch.cat(carries)

    def _copy(self, other: "DMCLayer") -> None:
        self.carry = other.carry

    def _facts(self) -> dict[str, Any]:
        return {"window": self.window}

    def _extra(self) -> dict[str, Tensor]:
        return {"carry": self.carry} if self.carry.numel() else {}

    def _load_extra(self, tensors: dict[str, Tensor]) -> None:
        carry = tensors.get("carry")
        self._clear()
        if carry is None:
            return
        if (
            carry.ndim != 4
            or carry.shape[:2] != self.slots.lengths.shape
            or (carry.shape[2] != self.window - 1)
        ):
            raise CacheError(f"A saved dmc layer's carry is {list(carry.shape)}: damaged.")
        self.carry = carry
