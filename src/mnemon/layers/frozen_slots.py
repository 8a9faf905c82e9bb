"""Slots that do not change any more: on the device in blocks, as many as a head has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from mnemon.attention.packing import pack_blocks, unpack_blocks
from mnemon.errors import CacheError
from mnemon.formats import BLOCK_TOKENS, PackedHalf, PackedSide, PackedTensor
from mnemon.layers.ragged import RaggedSlots
from mnemon.schemes import PackedFormat

__all__ = ["FROZEN_NAMES", "Codec", "Frozen", "FrozenPart", "FrozenSlots"]

_PACKED_NAMES = ("key_blocks", "key_factors", "value_blocks", "value_factors")
_DENSE_NAMES = ("old_keys", "old_values")
FROZEN_NAMES = frozenset({*_PACKED_NAMES, *_DENSE_NAMES, "frozen"})
"""Names of the tensors of a state."""


class FrozenPart(NamedTuple):
    """Some frozen tokens as attention reads them.

    Attributes:
        keys: [batch, kv_heads, tokens, head_dim]; a `PackedTensor` of a packed format.
        values: [batch, kv_heads, tokens, value_dim]; the same.
        lengths: how many of them there are, int32 [batch, kv_heads].
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def live(self) -> Tensor:
        """Which tokens are there, bool [batch, kv_heads, tokens]."""
        tokens = torch.arange(self.keys.shape[2], device=self.lengths.device)
        return tokens < self.lengths[..., None]


class Codec(NamedTuple):
    """How frozen tokens are stored: the parts of a block.

    Args:
        form: a packed format, 64 tokens to a block; None for the model's dtype, one token.
    """

    form: PackedFormat | None

    @property
    def unit(self) -> int:
        """Tokens of a block."""
        return 1 if self.form is None else BLOCK_TOKENS

    @property
    def names(self) -> tuple[str, ...]:
        return _DENSE_NAMES if self.form is None else _PACKED_NAMES

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Parts ``[batch, kv_heads, blocks, width]`` of whole blocks of tokens.

        Raises:
            CacheError: a number that is not finite, in a packed format.
        """
        if self.form is None:
            return [keys, values]
        parts: list[Tensor] = []
        for x, side in ((keys, self.form.keys), (values, self.form.values)):
            is_keys = side is self.form.keys and x is keys
            blocks, factors = pack_blocks(x.contiguous(), side.scheme(x.shape[-1]), is_keys)
            parts += [blocks, factors[..., None]]
        return parts

    def pair(self, parts: Sequence[Tensor], tails: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values in `parts`, for attention; `tails` are no tokens of the layer.

        Raises:
            CacheError: parts of other widths.
        """
        if self.form is None:
            return list(parts)
        found: list[Tensor] = []
        for number, (side, tail) in enumerate(
            zip((self.form.keys, self.form.values), tails, strict=True)
        ):
            blocks, factors = parts[2 * number : 2 * number + 2]
            packed = PackedSide(
                blocks=blocks,
                factors=factors[..., 0],
                scheme=side.scheme(tail.shape[-1]),
                width=tail.shape[-1],
                is_keys=number == 0,
            )
            found.append(PackedTensor(PackedHalf(side=packed, tail=tail)))
        return found


class Frozen(ABC):
    """Tokens of a compressing layer that do not change any more, somewhere."""

    @property
    @abstractmethod
    def is_empty(self) -> bool: ...

    @property
    @abstractmethod
    def unit(self) -> int:
        """Tokens of a row and head freeze so many at a time."""

    @abstractmethod
    def due(self) -> int:
        """How many tokens of a head are worth freezing."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """Tokens of every row and head, int32 [batch, kv_heads]."""

    @abstractmethod
    def freeze(self, slots: RaggedSlots, start: Tensor, count: Tensor) -> None:
        """Take `count` blocks of slots from `start` on, and let those behind them move up.

        Raises:
            CacheError: a number that is not finite, in a packed format.
            TierError: they cannot be kept.
        """

    @abstractmethod
    def parts(self) -> Iterator[FrozenPart]:
        """All tokens, in parts; one is valid until the next is asked for."""

    @abstractmethod
    def resident(self) -> "FrozenSlots":
        """The same tokens on the device; may be the same object."""

    @abstractmethod
    def holding(self, resident: "FrozenSlots") -> Self:
        """One like this that holds what `resident` does."""

    @abstractmethod
    def fork(self) -> Self: ...

    @abstractmethod
    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was."""

    @abstractmethod
    def nbytes_by_place(self) -> dict[str, int]: ...

    @property
    @abstractmethod
    def nbytes_reserved(self) -> int: ...

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_by_place().values())


@final
class FrozenSlots(Frozen):
    """Blocks on the device, with a number of live ones for every row and head.

    Args:
        codec: what a block is.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        #: A slot is a block.
        self.blocks = RaggedSlots()
        self._tails: tuple[Tensor, Tensor] | None = None  # of no tokens: width, dtype, device

    @property
    def is_empty(self) -> bool:
        return self.blocks.is_empty

    @property
    def unit(self) -> int:
        return self.codec.unit

    def due(self) -> int:
        return self.codec.unit

    def lengths(self) -> Tensor:
        return self.blocks.lengths * self.codec.unit

    def freeze(self, slots: RaggedSlots, start: Tensor, count: Tensor) -> None:
        most, unit = int(count.max()), self.codec.unit
        if not most:
            return
        place = start[..., None] + torch.arange(most * unit, device=start.device)
        keys, values = slots.read(place.clamp(max=slots.scrap()))[:2]
        self.add(self.codec.encode(keys, values), count, (keys[:, :, :0], values[:, :, :0]))
        longest = slots.longest()
        index = torch.arange(longest, device=start.device).expand(*start.shape, longest)
        source = torch.where(index < start[..., None], index, index + (count * unit)[..., None])
        slots.write(index, *slots.read(source.clamp(max=longest - 1)))
        slots.lengths -= count * unit
        slots.longest()

    def add(self, parts: Sequence[Tensor], count: Tensor, tails: tuple[Tensor, Tensor]) -> None:
        """Add the first `count` blocks of every row and head of `parts`."""
        if self._tails is None:
            self._tails = tails[0].clone(), tails[1].clone()
        most = parts[0].shape[2]
        self.blocks.prepare(parts, most)
        number = torch.arange(most, device=count.device)
        target = self.blocks.lengths.to(torch.int64)[..., None] + number
        target = target.masked_fill(number >= count[..., None], self.blocks.scrap())
        self.blocks.write(target, *parts)
        self.blocks.lengths += count
        self.blocks.longest()

    @property
    def tails(self) -> tuple[Tensor, Tensor]:
        """Keys and values of no tokens."""
        assert self._tails is not None
        return self._tails

    def live_parts(self) -> list[Tensor]:
        """The parts of as many blocks as the longest head has."""
        most = self.blocks.longest()
        return [part[:, :, :most] for part in self.blocks.parts]

    def parts(self) -> Iterator[FrozenPart]:
        if not self.is_empty:
            keys, values = self.codec.pair(self.live_parts(), self.tails)
            yield FrozenPart(keys, values, self.lengths())

    def numbers(self) -> list[Tensor]:
        """Keys and values, dequantized, [batch, kv_heads, tokens of the longest head, width]."""
        found = []
        for x in self.codec.pair(self.live_parts(), self.tails):
            if isinstance(x, PackedTensor):
                side = x.half.side
                assert side is not None
                x = unpack_blocks(side, 0, side.num_blocks, x.dtype)
            found.append(x)
        return found

    def resident(self) -> "FrozenSlots":
        return self

    def holding(self, resident: "FrozenSlots") -> "FrozenSlots":
        return resident

    # -- rows and state --------------------------------------------------------------------------

    def fork(self) -> "FrozenSlots":
        other = FrozenSlots(self.codec)
        other.blocks, other._tails = self.blocks.fork(), self._tails
        return other

    def take_rows(self, index: Tensor) -> None:
        self.blocks.take_rows(index)
        if self._tails is not None:
            keys, values = self._tails
            self._tails = keys.index_select(0, index), values.index_select(0, index)

    @staticmethod
    def stacked(
        sources: "Sequence[FrozenSlots]", shapes: Sequence[tuple[int, int]]
    ) -> "FrozenSlots":
        """The rows of all `sources`, of `shapes` [batch, kv_heads] where one holds none."""
        filled = next((one for one in sources if not one.is_empty), None)
        result = FrozenSlots(sources[0].codec)
        if filled is None:
            return result
        blocks = []
        for one, shape in zip(sources, shapes, strict=True):
            if one.is_empty:
                nothing = RaggedSlots()
                nothing.unpack(
                    torch.zeros(shape, dtype=torch.int32, device=filled.blocks.lengths.device),
                    [part.new_empty((0, part.shape[-1])) for part in filled.blocks.parts],
                )
                blocks.append(nothing)
            else:
                blocks.append(one.blocks)
        result.blocks = RaggedSlots.stacked(blocks)
        batch = sum(shape[0] for shape in shapes)
        keys, values = (tail.new_empty((batch, *tail.shape[1:])) for tail in filled.tails)
        result._tails = keys, values
        return result

    def nbytes_by_place(self) -> dict[str, int]:
        return {"device": self.blocks.nbytes}

    @property
    def nbytes_reserved(self) -> int:
        return self.blocks.nbytes_reserved

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as the tensors of a state; empty while there is nothing."""
        if self.is_empty:
            return {}
        found = dict(zip(self.codec.names, self.blocks.packed(), strict=True))
        return found | {"frozen": self.blocks.lengths.clone()}

    def load(self, tensors: dict[str, Tensor], keys: Tensor, values: Tensor) -> None:
        """Hold what `tensors` gave; `keys` and `values` are slots of the same layer.

        Raises:
            CacheError: numbers that contradict each other.
        """
        counts = tensors["frozen"]
        if counts.shape != keys.shape[:2] or bool((counts < 0).any()):
            raise CacheError(f"Saved counts of frozen slots are {list(counts.shape)}: damaged.")
        self._tails = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.blocks.unpack(counts, [tensors[name] for name in self.codec.names])
        for given, held in zip(self.numbers(), (keys, values), strict=True):
            if given.shape[-1] != held.shape[-1] or given.dtype != held.dtype:
                raise CacheError(
                    f"Saved frozen slots are {list(given.shape)} {given.dtype}, the others "
                    f"{list(held.shape)} {held.dtype}: damaged."
                )

    def facts(self) -> dict[str, Any]:
        """JSON-able: what two layers that are stored alike have in common."""
        form = self.codec.form
        if form is None:
            return {}
        return {
            "keys": list(form.keys), "values": list(form.values), "residual": form.residual,
        }  # fmt: skip
