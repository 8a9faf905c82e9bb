"""Tokens that no longer change, as the bytes that a tier keeps.

    row of a segment:  [ piece 0 | pad | piece 1 | pad | ... ]      e.g. keys, then values

A segment is so many tokens of one layer, all heads, keys and values together: one read brings what
one part of attention needs. Each row of the batch is a record of its own, so that beams, selected
rows and forks share records instead of copying them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from mnemon.formats.stand_in import StandIn
from mnemon.tiers import Record, Tier

__all__ = ["Layout", "Segment", "StoredRows", "freeze"]

_ALIGNMENT = 64


@final
@dataclass(frozen=True)
class Layout:
    """Where the pieces of a row lie in its bytes.

    Args:
        pieces: dtype and shape of each, without the batch.
    """

    pieces: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, pieces: Sequence[Tensor]) -> "Layout":
        """The layout of pieces ``[batch, ...]``."""
        return cls(tuple((piece.dtype, tuple(piece.shape[1:])) for piece in pieces))

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Offset and bytes of each piece."""
        found, offset = [], 0
        for dtype, shape in self.pieces:
            size = dtype.itemsize * torch.Size(shape).numel()
            found.append((offset, size))
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        return found

    @cached_property
    def _steps(self) -> list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
        """Dtype, shape, strides and offset of each piece, in numbers of its own dtype."""
        return [
            (
                dtype,
                shape,
                tuple(math.prod(shape[place + 1 :]) for place in range(len(shape))),
                offset // dtype.itemsize,
            )
            for (offset, _), (dtype, shape) in zip(self.spans, self.pieces, strict=True)
        ]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a row, padding between pieces included."""
        offset, size = self.spans[-1]
        return offset + size

    @property
    def content_bytes(self) -> int:
        return sum(size for _, size in self.spans)

    def read(self, rows: Tensor) -> list[Tensor]:
        """The pieces ``[rows, ...]`` in uint8 ``[rows, >= num_bytes]``; nothing is copied."""
        found = []
        for dtype, shape, strides, offset in self._steps:
            flat = rows if dtype == rows.dtype else rows.view(dtype)
            found.append(
                flat.as_strided(
                    (rows.shape[0], *shape), (flat.stride(0), *strides),
                    flat.storage_offset() + offset,
                )
            )  # fmt: skip
        return found


@final
class Segment:
    """Frozen tokens of all rows; never changes.

    Args:
        rows: the record of each row of the batch; rows may share one.
        layout: of every record.
    """

    __slots__ = ("index", "layout", "rows", "tile")

    def __init__(self, rows: Sequence[Record], layout: Layout) -> None:
        self.rows = tuple(rows)
        self.layout = layout
        places: dict[int, int] = {}
        for record in self.rows:
            places.setdefault(record.serial, len(places))
        #: Which record of `tile` each row reads; None where they correspond.
        self.index: Tensor | None = None
        if len(places) == len(self.rows):
            self.tile = self.rows
        else:
            self.tile = tuple({record.serial: record for record in self.rows}.values())
            with torch.inference_mode(False):
                self.index = torch.tensor([places[record.serial] for record in self.rows])

    def at(self, rows: Sequence[int]) -> "Segment":
        """The segment with the rows at these numbers."""
        return Segment([self.rows[row] for row in rows], self.layout)

    def pieces(self, found: Tensor) -> list[Tensor]:
        """The pieces ``[batch, ...]`` in the bytes of `tile`."""
        pieces = self.layout.read(found)
        if self.index is None:
            return pieces
        if len(self.tile) == 1:
            return [piece.expand(len(self.rows), *piece.shape[1:]) for piece in pieces]
        index = self.index.to(found.device)
        return [piece.index_select(0, index) for piece in pieces]


def freeze(tier: Tier, pieces: Sequence[Tensor], layout: Layout) -> Segment:
    """Put pieces ``[batch, ...]`` away.

    Raises:
        TierError: the tier cannot keep them; nothing changed.
    """

    def fill(rows: Tensor) -> None:
        if len(pieces) == 1 and pieces[0].dtype == torch.uint8 and len(layout.pieces) > 1:
            rows[:, : layout.num_bytes].copy_(pieces[0])  # saved bytes, as they are
            return
        for target, piece in zip(layout.read(rows), pieces, strict=True):
            target.copy_(piece.detach())
        spans = layout.spans
        for (offset, size), (following, _) in pairwise(spans):
            rows[:, offset + size : following].zero_()  # memory of ours, not of whoever had it

    return Segment(tier.put(pieces[0].shape[0], layout.num_bytes, fill), layout)


@final
class StoredRows(StandIn):
    """A segment's bytes, uint8 ``[batch, num_bytes]``, read when they are asked for.

    Args:
        tier: keeps them.
        segment: which.
        device: where the tier streams to.
    """

    tier: Tier
    segment: Segment

    @staticmethod
    def __new__(cls, tier: Tier, segment: Segment, device: torch.device) -> "StoredRows":
        made: StoredRows = Tensor._make_wrapper_subclass(
            cls, (len(segment.rows), segment.layout.num_bytes), dtype=torch.uint8, device=device
        )
        made.tier, made.segment = tier, segment
        return made

    def __init__(self, tier: Tier, segment: Segment, device: torch.device) -> None:
        del tier, segment, device  # kept by __new__

    def dense(self) -> Tensor:
        segment, size = self.segment, self.segment.layout.num_bytes
        with torch.inference_mode(False):
            for found in self.tier.stream([segment.tile], tuple):
                if segment.index is None:
                    return found[:, :size].clone()
                return found[:, :size].index_select(0, segment.index.to(found.device))
        raise AssertionError
