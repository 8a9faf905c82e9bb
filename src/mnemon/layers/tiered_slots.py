"""Frozen slots in a tier: the newest gather on the device, and move in segments of all heads."""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from mnemon.layers.frozen import Layout, Segment, freeze
from mnemon.layers.frozen_slots import Codec, Frozen, FrozenPart, FrozenSlots
from mnemon.layers.order import LayerOrder
from mnemon.layers.ragged import RaggedSlots
from mnemon.tiers import Tier
from mnemon.tiers.base import Tile

__all__ = ["TieredSlots"]

SEGMENT_TOKENS = 1024
"""Tokens of the longest head that move at once, where the recipe does not say."""


@final
class TieredSlots(Frozen):
    """Segments in a tier, and what is not one yet.

    ::

        [ segment | segment | ... ]  in the tier      [ staged ]  on the device

    A segment has a place for as many tokens of every head as its longest head froze; heads that
    keep less leave room unused. Segments never change: forks, beams and selected rows share them.

    Args:
        tier: keeps them; shared by the layers of a cache.
        order: in which these layers are read.
        codec: what a block is.
        segment_tokens: tokens of the longest head that move at once.
        place: in the order; None for the next one.
    """

    def __init__(
        self,
        tier: Tier,
        order: "LayerOrder[TieredSlots]",
        codec: Codec,
        segment_tokens: int | None = None,
        place: int | None = None,
    ) -> None:
        self._tier = tier
        self._order = order
        self._place = order.join(self, place)
        self._segment_tokens = segment_tokens
        self._staged = FrozenSlots(codec)
        self._segments: list[tuple[Segment, Tensor]] = []  # with tokens of every row and head

    def _empty(self) -> "TieredSlots":
        return TieredSlots(
            self._tier,
            self._order.heir(self._place),
            self._staged.codec,
            self._segment_tokens,
            self._place,
        )

    @property
    def is_empty(self) -> bool:
        return self._staged.is_empty

    @property
    def unit(self) -> int:
        return self._staged.unit

    @property
    def segment_tokens(self) -> int:
        """Tokens of the longest head that move at once."""
        return self._segment_tokens or SEGMENT_TOKENS

    def due(self) -> int:
        # In eighths of a segment: what waits in slots is read twice when it moves.
        return max(self.unit, self.segment_tokens // 8)

    def lengths(self) -> Tensor:
        total = self._staged.lengths()
        for _, lengths in self._segments:
            total = total + lengths
        return total

    def freeze(self, slots: RaggedSlots, start: Tensor, count: Tensor) -> None:
        self._tier.bind(start.device)
        self._staged.freeze(slots, start, count)
        self._settle()

    def _settle(self) -> None:
        """Move what is staged, if it comes to a segment.

        Raises:
            TierError: the tier cannot keep it; it stays staged.
        """
        staged = self._staged
        if staged.is_empty or int(staged.lengths().max()) < self.segment_tokens:
            return
        pieces = [part.contiguous() for part in staged.live_parts()]
        layout = Layout.of(pieces)
        rows = pieces[0].shape[0]
        self._tier.claim(self, 2 * rows * layout.num_bytes)
        self._tier.reserve(rows, layout.num_bytes)
        self._segments.append((freeze(self._tier, pieces, layout), staged.lengths()))
        tails = staged.tails
        self._staged = FrozenSlots(staged.codec)
        nothing = [piece[:, :, :0] for piece in pieces]
        self._staged.add(nothing, torch.zeros_like(staged.blocks.lengths), tails)

    def tiles(self) -> Iterator[Tile]:
        """What is read for the tokens of this layer, in order."""
        return (segment.tile for segment, _ in self._segments)

    def _following(self) -> Iterator[Tile]:
        for layer in self._order.after(self._place):
            yield from layer.tiles()

    def parts(self) -> Iterator[FrozenPart]:
        codec, tails = self._staged.codec, None
        if self._segments:
            tails = self._staged.tails
            stream = self._tier.stream(list(self.tiles()), self._following)
            for found, (segment, lengths) in zip(stream, self._segments, strict=False):
                keys, values = codec.pair(segment.pieces(found), tails)
                yield FrozenPart(keys, values, lengths)
        yield from self._staged.parts()

    def resident(self) -> FrozenSlots:
        """A copy of everything on the device."""
        if not self._segments:
            return self._staged
        whole, unit = FrozenSlots(self._staged.codec), self.unit
        stream = self._tier.stream(list(self.tiles()), tuple)
        for found, (segment, lengths) in zip(stream, self._segments, strict=False):
            whole.add(segment.pieces(found), lengths // unit, self._staged.tails)
        staged = self._staged
        whole.add(staged.live_parts(), staged.blocks.lengths, staged.tails)
        return whole

    def holding(self, resident: FrozenSlots) -> "TieredSlots":
        other = self._empty()
        other._staged = resident
        other._settle()
        return other

    def fork(self) -> "TieredSlots":
        other = self._empty()
        other._staged, other._segments = self._staged.fork(), list(self._segments)
        return other

    def take_rows(self, index: Tensor) -> None:
        self._staged.take_rows(index)
        rows = index.tolist()
        self._segments = [
            (segment.at(rows), lengths.index_select(0, index.to(lengths.device)))
            for segment, lengths in self._segments
        ]

    def nbytes_by_place(self) -> dict[str, int]:
        found = dict(self._staged.nbytes_by_place())
        seen: set[int] = set()
        for segment, _ in self._segments:
            for record in segment.rows:
                if record.serial not in seen:
                    seen.add(record.serial)
                    place = self._tier.where(record)
                    found[place] = found.get(place, 0) + record.num_bytes
        return found

    @property
    def nbytes_reserved(self) -> int:
        moved = sum(self.nbytes_by_place().values()) - self._staged.nbytes
        return moved + self._staged.nbytes_reserved
