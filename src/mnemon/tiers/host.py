"""Bytes in main memory: pinned, and copied on a stream of its own, where the model is on CUDA."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from mnemon.tiers.ahead import Loader, ReadAhead
from mnemon.tiers.base import Fill, Record, Settle, Tier, Tile, nothing_runs
from mnemon.tiers.device import DeviceTier, Rows, rows_of

__all__ = ["HostTier"]

_BUFFERS = 3  # one is read by attention, two are being filled


@final
class HostTier(Tier):
    """Main memory. A model on a CPU computes there, so nothing is copied: it is the device."""

    name = "host"

    def __init__(self) -> None:
        self._plain = DeviceTier()
        self._plain.bind(torch.device("cpu"))
        self._ring: ReadAhead[CudaSlot] | None = None

    def _bound(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._ring = ReadAhead(CudaLoader(device), self._limit_bytes)

    def _limit_bytes(self) -> int:
        assert self._ring is not None
        return _BUFFERS * self._ring.slot_bytes

    def put(self, count: int, num_bytes: int, fill: Fill) -> tuple[Record, ...]:
        if self._ring is None:
            return self._plain.put(count, num_bytes, fill)
        stride = self.stride(num_bytes)
        block = torch.empty((count, stride), dtype=torch.uint8, pin_memory=True)
        fill(block)
        # `fill` may have begun copies from the accelerator that are not done yet.
        torch.cuda.current_stream().synchronize()
        return tuple(Record(num_bytes, stride, Rows(block, row), _nothing) for row in range(count))

    def stream(
        self,
        tiles: Sequence[Tile],
        then: Callable[[], Iterable[Tile]],
        held: int = 1,
        settle: Settle = nothing_runs,
    ) -> Iterator[Tensor]:
        if self._ring is None:
            yield from self._plain.stream(tiles, then)
            return
        for _, found in self._ring.stream(tiles, then, _never, held, settle):
            assert found is not None
            yield found

    def most_held(self, num_bytes: int) -> int:
        return self._plain.most_held(num_bytes) if self._ring is None else 1

    def where(self, record: Record) -> str:
        return "host"

    @property
    def buffer_bytes(self) -> int:
        return 0 if self._ring is None else self._ring.num_bytes


def _nothing(place: Any) -> None:
    """Memory goes by itself."""


def _never(tile: Tile) -> bool:
    return False


@final
class CudaSlot:
    """A buffer on the accelerator, and when it is full and when it is free again."""

    __slots__ = ("buffer", "filled", "freed", "shape")

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.filled = torch.cuda.Event()
        self.freed = torch.cuda.Event()
        self.shape = (0, 0)


@final
class CudaLoader(Loader[CudaSlot]):
    """Copies from pinned memory on a stream beside the one that computes.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def new_slot(self, num_bytes: int) -> CudaSlot:
        slot = CudaSlot(num_bytes, self._device)
        slot.freed.record(torch.cuda.current_stream(self._device))
        return slot

    def start(self, tile: Tile, slot: CudaSlot) -> None:
        slot.shape = (len(tile), tile[0].stride)
        target = slot.buffer[: len(tile) * tile[0].stride].view(slot.shape)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.freed)
            whole = rows_of(tile)
            if whole is not None:
                target.copy_(whole, non_blocking=True)
            else:
                for row, record in enumerate(tile):
                    target[row].copy_(record.place.bytes(), non_blocking=True)
            slot.filled.record(self._stream)

    def finish(self, slot: CudaSlot) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(slot.filled)
        rows, stride = slot.shape
        return slot.buffer[: rows * stride].view(rows, stride)

    def release(self, slot: CudaSlot) -> None:
        slot.freed.record(torch.cuda.current_stream(self._device))
