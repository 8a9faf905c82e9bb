"""Bytes stay where the model computes."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from mnemon.tiers.base import Fill, Record, Settle, Tier, Tile, nothing_runs

__all__ = ["DeviceTier", "Rows", "rows_of"]


@final
class Rows:
    """A row of a block of memory: where a record of a memory tier lies."""

    __slots__ = ("block", "row")

    def __init__(self, block: Tensor, row: int) -> None:
        self.block = block
        self.row = row

    def bytes(self) -> Tensor:
        return self.block[self.row]


def rows_of(tile: Tile) -> Tensor | None:
    """The records of `tile` as one uint8 ``[records, stride]``, if they lie in memory like that."""
    first = tile[0].place
    if not isinstance(first, Rows):
        return None
    if len(tile) == 1:
        return first.block.narrow(0, first.row, 1)
    for step, record in enumerate(tile):
        place = record.place
        if not isinstance(place, Rows) or place.block is not first.block:
            return None
        if place.row != first.row + step:
            return None
    return first.block.narrow(0, first.row, len(tile))


def _nothing(place: Any) -> None:
    """Memory goes by itself."""


@final
class DeviceTier(Tier):
    """Plain memory beside the model; nothing is copied to be read."""

    name = "device"

    def put(self, count: int, num_bytes: int, fill: Fill) -> tuple[Record, ...]:
        stride = self.stride(num_bytes)
        with torch.inference_mode(False):
            block = torch.empty((count, stride), dtype=torch.uint8, device=self.device)
        fill(block)
        return tuple(Record(num_bytes, stride, Rows(block, row), _nothing) for row in range(count))

    def stream(
        self,
        tiles: Sequence[Tile],
        then: Callable[[], Iterable[Tile]],
        held: int = 1,
        settle: Settle = nothing_runs,
    ) -> Iterator[Tensor]:
        for tile in tiles:
            found = rows_of(tile)
            yield torch.stack([record.place.bytes() for record in tile]) if found is None else found

    def most_held(self, num_bytes: int) -> int:
        return sys.maxsize  # nothing is read

    def where(self, record: Record) -> str:
        return "device"

    @property
    def buffer_bytes(self) -> int:
        return 0
