"""Slots that do not change any more, in a packed format: blocks of 64, as many as a head has."""

from typing import Any, final

import torch
from torch import Tensor

from mnemon.attention.packing import pack_blocks, unpack_blocks
from mnemon.formats import BLOCK_TOKENS, PackedHalf, PackedSide, PackedTensor
from mnemon.layers.ragged import RaggedSlots
from mnemon.schemes import PackedFormat

__all__ = ["FROZEN_NAMES", "FrozenSlots"]


@final
class FrozenSlots:
    """Blocks of keys and values with a number of live ones for every row and head.

    Args:
        form: how they are stored.
    """

    __slots__ = ("_tails", "blocks", "form")

    def __init__(self, form: PackedFormat) -> None:
        self.form = form
        #: Blocks and factors of keys, then of values: a slot is a block.
        self.blocks = RaggedSlots()
        self._tails: tuple[Tensor, Tensor] | None = None  # of no tokens: width, dtype, device

    @property
    def is_empty(self) -> bool:
        return self.blocks.is_empty

    def lengths(self) -> Tensor:
        """Tokens of every row and head, int32 [batch, kv_heads]."""
        return self.blocks.lengths * BLOCK_TOKENS

    def freeze(self, slots: RaggedSlots, start: Tensor, count: Tensor) -> None:
        """Take ``64 * count`` slots from `start` on, and let those behind them move up.

        Args:
            slots: keys and values, dense.
            start: int64 [batch, kv_heads].
            count: blocks of every row and head, int64 [batch, kv_heads].

        Raises:
            CacheError: a number that is not finite.
        """
        most = int(count.max())
        if not most:
            return
        within = torch.arange(BLOCK_TOKENS, device=start.device)
        for number in range(most):
            place = start[..., None] + number * BLOCK_TOKENS + within
            keys, values = slots.read(place.clamp(max=slots.scrap()))[:2]
            parts = [*self._pack(keys, is_keys=True), *self._pack(values, is_keys=False)]
            self._prepare(parts, keys, values)
            target = torch.where(count > number, self.blocks.lengths, self.blocks.scrap())
            self.blocks.write(target[..., None].to(torch.int64), *parts)
            self.blocks.lengths += count > number
        longest = slots.longest()
        index = torch.arange(longest, device=start.device).expand(*start.shape, longest)
        source = torch.where(index < start[..., None], index, index + (count * 64)[..., None])
        slots.write(index, *slots.read(source.clamp(max=longest - 1)))
        slots.lengths -= count * BLOCK_TOKENS
        slots.longest()

    def _pack(self, x: Tensor, *, is_keys: bool) -> tuple[Tensor, Tensor]:
        side = self.form.keys if is_keys else self.form.values
        blocks, factors = pack_blocks(x.contiguous(), side.scheme(x.shape[-1]), is_keys)
        return blocks, factors[..., None]

    def _prepare(self, parts: list[Tensor], keys: Tensor, values: Tensor) -> None:
        if self._tails is None:
            self._tails = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.blocks.prepare(parts, 1)

    def pair(self) -> tuple[PackedTensor, PackedTensor]:
        """Keys and values as attention reads them, [batch, kv_heads, 64 * most blocks, width]."""
        assert self._tails is not None
        most = self.blocks.longest()
        found = []
        for side, is_keys in ((0, True), (1, False)):
            tail = self._tails[side]
            blocks, factors = (
                part[:, :, :most] for part in self.blocks.parts[2 * side : 2 * side + 2]
            )
            scheme = (self.form.keys if is_keys else self.form.values).scheme(tail.shape[-1])
            packed = PackedSide(
                blocks=blocks,
                factors=factors[..., 0],
                scheme=scheme,
                width=tail.shape[-1],
                is_keys=is_keys,
            )
            found.append(PackedTensor(PackedHalf(side=packed, tail=tail)))
        return found[0], found[1]

    def live(self) -> Tensor:
        """Which of these tokens are live, bool [batch, kv_heads, 64 * most blocks]."""
        return self.blocks.live().repeat_interleave(BLOCK_TOKENS, dim=-1)

    def numbers(self) -> list[Tensor]:
        """Keys and values dequantized, [batch, kv_heads, 64 * most blocks, width]."""
        found = []
        for packed in self.pair():
            side = packed.half.side
            assert side is not None
            found.append(unpack_blocks(side, 0, side.num_blocks, packed.dtype))
        return found

    # -- rows and state --------------------------------------------------------------------------

    def fork(self) -> "FrozenSlots":
        other = FrozenSlots(self.form)
        other.blocks, other._tails = self.blocks.fork(), self._tails
        return other

    def take_rows(self, index: Tensor) -> None:
        self.blocks.take_rows(index)
        if self._tails is not None:
            keys, values = self._tails
            self._tails = keys.index_select(0, index), values.index_select(0, index)

    @staticmethod
    def stacked(sources: "list[FrozenSlots]", shapes: list[tuple[int, int]]) -> "FrozenSlots":
        """The rows of all `sources`, of `shapes` [batch, kv_heads] where one holds none."""
        filled = next((one for one in sources if not one.is_empty), None)
        result = FrozenSlots(sources[0].form)
        if filled is None or filled._tails is None:
            return result
        for one, shape in zip(sources, shapes, strict=True):
            if one.is_empty:
                one.blocks.unpack(
                    torch.zeros(shape, dtype=torch.int32, device=filled.blocks.lengths.device),
                    [part.new_empty((0, part.shape[-1])) for part in filled.blocks.parts],
                )
        result.blocks = RaggedSlots.stacked([one.blocks for one in sources])
        batch = sum(shape[0] for shape in shapes)
        keys, values = (tail.new_empty((batch, *tail.shape[1:])) for tail in filled._tails)
        result._tails = keys, values
        return result

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as the tensors of a state; empty while there is nothing."""
        if self.is_empty:
            return {}
        names = ("key_blocks", "key_factors", "value_blocks", "value_factors")
        found = dict(zip(names, self.blocks.packed(), strict=True))
        return found | {"blocks": self.blocks.lengths.clone()}

    def load(self, tensors: dict[str, Tensor], keys: Tensor, values: Tensor) -> None:
        """Hold what `tensors` gave; `keys` and `values` are slots of the same layer.

        Raises:
            CacheError: numbers that contradict each other.
        """
        names = ("key_blocks", "key_factors", "value_blocks", "value_factors")
        self.blocks.unpack(tensors["blocks"], [tensors[name] for name in names])
        self._tails = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.pair()  # says what does not fit

    def facts(self) -> dict[str, Any]:
        """JSON-able: what two layers that are stored alike have in common."""
        form = self.form
        return {
            "keys": list(form.keys), "values": list(form.values), "residual": form.residual,
        }  # fmt: skip


FROZEN_NAMES = frozenset({"key_blocks", "key_factors", "value_blocks", "value_factors", "blocks"})
"""Names of the tensors of a state."""
