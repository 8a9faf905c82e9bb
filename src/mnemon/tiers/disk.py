"""Bytes in a file, behind a bound on memory: what fits in memory stays there, the rest is read."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from mnemon.tiers.ahead import Loader, ReadAhead
from mnemon.tiers.base import Fill, Record, Settle, Tier, Tile, nothing_runs
from mnemon.tiers.device import Rows, rows_of
from mnemon.tiers.segments import BLOCK_BYTES, SegmentFile, aligned_buffer, default_directory

__all__ = ["DEFAULT_MEMORY_BYTES", "DiskTier"]

DEFAULT_MEMORY_BYTES: Final = 256 << 20
_READERS = 2  # reads under way at once; more gain nothing where one nearly fills the disk
_RING_SHARE = 8  # of the memory, for buffers


@final
class DiskTier(Tier):
    """A file without a name, read past the page cache by threads that run ahead of attention.

    Of the memory given, an eighth is for buffers, the layers' newest tokens take what they need,
    and what is left holds the records that came first: they never go to disk. A step reads all
    that is stored in turn, so which records those are does not matter, as long as they stay.

    Args:
        memory_bytes: memory that the cache may use.
        directory: where the file lies; None for ``$TMPDIR`` or /var/tmp.
        limit_bytes: size the file may reach; None for what the disk holds.

    Raises:
        TierError: no file can be made there.
    """

    name = "disk"
    alignment = BLOCK_BYTES

    def __init__(
        self,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        directory: str | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._file = SegmentFile(
            default_directory() if directory is None else os.path.expanduser(directory), limit_bytes
        )
        self._claims: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._residents: list[weakref.ref[Record]] = []
        self._loader = DiskLoader(self._file)
        self._ring = ReadAhead(self._loader, self._ring_limit)

    def _bound(self, device: torch.device) -> None:
        self._loader.device = device

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def _ring_limit(self) -> int:
        return self._memory_bytes // _RING_SHARE

    def most_held(self, num_bytes: int) -> int:
        return max(1, self._ring_limit() // num_bytes - 1)

    def claim(self, owner: object, num_bytes: int) -> None:
        self._claims[owner] = num_bytes

    def reserve(self, count: int, num_bytes: int) -> None:
        stride = self.stride(num_bytes)
        in_memory = max(0, self._room()) // stride
        if count > in_memory:
            self._file.trim()
            self._file.reserve((count - in_memory) * stride)

    def preallocate(self, num_bytes: int) -> None:
        """Make the file that large, for good.

        Raises:
            DiskFull: it does not fit.
        """
        self._file.reserve(-(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES, keep=True)

    def put(self, count: int, num_bytes: int, fill: Fill) -> tuple[Record, ...]:
        stride = self.stride(num_bytes)
        room = self._room()
        if room < 0:
            self._spill(-room)
        if room >= count * stride:
            with torch.inference_mode(False):
                block = torch.empty((count, stride), dtype=torch.uint8)
            fill(block)
            records = tuple(self._record(num_bytes, Rows(block, row)) for row in range(count))
            self._residents += [weakref.ref(record) for record in records]
            return records
        memory = aligned_buffer(count * stride)
        with torch.inference_mode(False):
            rows = torch.frombuffer(memory, dtype=torch.uint8)[: count * stride]
        fill(rows.view(count, stride))
        return self._write(memoryview(memory)[: count * stride], count, num_bytes)

    def _write(self, data: memoryview, count: int, num_bytes: int) -> tuple[Record, ...]:
        stride = len(data) // count
        offsets = self._file.allocate(count, stride)
        records = tuple(self._record(num_bytes, offset) for offset in offsets)
        for first, length in _runs(offsets, stride):
            self._file.write(offsets[first], data[first * stride : (first + length) * stride])
        return records

    def _record(self, num_bytes: int, place: Any) -> Record:
        stride = self.stride(num_bytes)
        return Record(num_bytes, stride, place, partial(_let_go, self._file, stride))

    def _room(self) -> int:
        """Bytes of memory that records may still take."""
        alive = [(ref, record) for ref in self._residents if (record := ref()) is not None]
        alive = [(ref, record) for ref, record in alive if isinstance(record.place, Rows)]
        self._residents = [ref for ref, _ in alive]
        held = sum(record.stride for _, record in alive)
        ring = max(self._ring_limit(), self._ring.num_bytes)
        return self._memory_bytes - ring - sum(self._claims.values()) - held

    def _spill(self, num_bytes: int) -> None:
        """Move the newest resident records to the file (the layers' own need has grown)."""
        while num_bytes > 0 and self._residents:
            record = self._residents[-1]()
            if record is not None and isinstance(record.place, Rows):
                memory = aligned_buffer(record.stride)
                with torch.inference_mode(False):
                    torch.frombuffer(memory, dtype=torch.uint8)[: record.stride].copy_(
                        record.place.bytes()
                    )
                offset = self._file.allocate(1, record.stride)[0]
                self._file.write(offset, memoryview(memory)[: record.stride])
                record.place = offset
                num_bytes -= record.stride
            self._residents.pop()

    def stream(
        self,
        tiles: Sequence[Tile],
        then: Callable[[], Iterable[Tile]],
        held: int = 1,
        settle: Settle = nothing_runs,
    ) -> Iterator[Tensor]:
        for tile, found in self._ring.stream(tiles, then, self._is_direct, held, settle):
            if found is None:
                found = rows_of(tile)
                assert found is not None
            yield found

    def _is_direct(self, tile: Tile) -> bool:
        if not isinstance(tile[0].place, Rows) or self.device is None or self.device.type != "cpu":
            return False
        return len(tile) == 1 or rows_of(tile) is not None

    def where(self, record: Record) -> str:
        return "host" if isinstance(record.place, Rows) else "disk"

    @property
    def buffer_bytes(self) -> int:
        return self._ring.num_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._file.size


def _let_go(file: SegmentFile, stride: int, place: Any) -> None:
    if not isinstance(place, Rows):
        file.give_back(place, stride)


def _runs(offsets: Sequence[int], stride: int) -> Iterator[tuple[int, int]]:
    """Neighbours in the file: the first of each run, and how many."""
    first = 0
    for step in range(1, len(offsets) + 1):
        if step == len(offsets) or offsets[step] != offsets[step - 1] + stride:
            yield first, step - first
            first = step


@final
class DiskSlot:
    """A page-aligned buffer, and the read that fills it."""

    __slots__ = ("bytes", "device_buffer", "reading", "shape", "tensor")

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.bytes = memoryview(aligned_buffer(num_bytes))
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self.bytes, dtype=torch.uint8)
            self.device_buffer = (
                None if device.type == "cpu" else torch.empty_like(self.tensor, device=device)
            )
        self.reading: Future[None] | None = None
        self.shape = (0, 0)


@final
class DiskLoader(Loader[DiskSlot]):
    """Reads on threads, so that attention computes meanwhile; reading holds no lock of Python's.

    Args:
        file: what is read.
    """

    def __init__(self, file: SegmentFile) -> None:
        self._file = file
        self.device = torch.device("cpu")  # where the bytes are wanted
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def new_slot(self, num_bytes: int) -> DiskSlot:
        return DiskSlot(num_bytes, self.device)

    def start(self, tile: Tile, slot: DiskSlot) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="mnemon-disk")
            weakref.finalize(self, self._threads.shutdown, wait=False)
        slot.shape = (len(tile), tile[0].stride)
        slot.reading = self._threads.submit(_read, self._file, tile, slot)

    def finish(self, slot: DiskSlot) -> Tensor:
        assert slot.reading is not None
        slot.reading.result()
        rows, stride = slot.shape
        found = slot.tensor[: rows * stride]
        if slot.device_buffer is not None:
            slot.device_buffer[: rows * stride].copy_(found)
            found = slot.device_buffer[: rows * stride]
        return found.view(rows, stride)

    def release(self, slot: DiskSlot) -> None:
        reading, slot.reading = slot.reading, None
        if reading is not None and not reading.done():
            wait([reading])  # nobody came for it, and the buffer is about to be used again


def _read(file: SegmentFile, tile: Tile, slot: DiskSlot) -> None:
    stride = tile[0].stride
    places = [record.place for record in tile]
    row = 0
    while row < len(tile):
        place = places[row]
        if isinstance(place, Rows):
            slot.tensor[row * stride : (row + 1) * stride].copy_(place.bytes())
            row += 1
            continue
        stop = row + 1
        while (
            stop < len(tile)
            and not isinstance(places[stop], Rows)
            and places[stop] == places[stop - 1] + stride
        ):
            stop += 1
        file.read(place, slot.bytes[row * stride : stop * stride])
        row = stop
