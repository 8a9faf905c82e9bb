"""The ring of buffers in which a tier reads what comes next, while attention reads what came."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, final

from torch import Tensor

from mnemon.tiers.base import Settle, Tile, nothing_runs

__all__ = ["Loader", "ReadAhead"]

Slot = TypeVar("Slot")
Serials = tuple[int, ...]


class Loader(ABC, Generic[Slot]):
    """Fills buffers of a tier: on a thread, or on a stream of an accelerator."""

    @abstractmethod
    def new_slot(self, num_bytes: int) -> Slot:
        """A buffer of `num_bytes`."""

    @abstractmethod
    def start(self, tile: Tile, slot: Slot) -> None:
        """Begin to read `tile` into `slot`."""

    @abstractmethod
    def finish(self, slot: Slot) -> Tensor:
        """Wait until what was begun is there: uint8 ``[records, stride]``.

        Raises:
            TierError: it could not be read.
        """

    @abstractmethod
    def release(self, slot: Slot) -> None:
        """What was read has been used (on an accelerator: will have been)."""


@final
class ReadAhead(Generic[Slot]):
    """So many buffers, and which tile each of them holds or is about to hold.

    Args:
        loader: fills them.
        limit_bytes: bytes of all of them together, asked before one is made; two are always there.
    """

    def __init__(self, loader: Loader[Slot], limit_bytes: Callable[[], int]) -> None:
        self._loader = loader
        self._limit_bytes = limit_bytes
        self._slot_bytes = 0
        self._num_slots = 0
        self._generation = 0  # buffers of an older one are not kept when they come back
        self._free: list[Slot] = []
        self._begun: dict[Serials, Slot] = {}

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    @property
    def num_bytes(self) -> int:
        return self._num_slots * self._slot_bytes

    def stream(
        self,
        tiles: Sequence[Tile],
        then: Callable[[], Iterable[Tile]],
        direct: Callable[..., bool],
        held: int = 1,
        settle: Settle = nothing_runs,
    ) -> Iterator[tuple[Tile, Tensor | None]]:
        """Each tile with its bytes; None for one that `direct` says needs no reading.

        See `Tier.stream` for `held` and `settle`.
        """
        upcoming = _following(tiles, then)
        holding: deque[tuple[int, int, Slot]] = deque()  # place, generation, buffer
        try:
            for place, tile in enumerate(tiles):
                while holding and holding[0][0] <= place - held:
                    self._give_back(*holding.popleft()[1:])
                if direct(tile):
                    if place == 0:
                        self._look_ahead(upcoming, place, direct)
                    yield tile, None
                    continue
                slot = self._begun.pop(_key(tile), None)
                if slot is None:
                    slot = self._begin(tile)
                holding.append((place, self._generation, slot))
                self._look_ahead(upcoming, place, direct)
                yield tile, self._loader.finish(slot)
        finally:
            settle()
            for _, generation, slot in holding:
                self._give_back(generation, slot)
        if tiles:
            self._look_ahead(upcoming, len(tiles), direct)

    def _give_back(self, generation: int, slot: Slot) -> None:
        self._loader.release(slot)
        if generation == self._generation:
            self._free.append(slot)

    def _begin(self, tile: Tile) -> Slot:
        """Have `tile` read, into the buffer that is worth least."""
        size = len(tile) * tile[0].stride
        if size > self._slot_bytes:
            self.clear()
            self._slot_bytes = size
        slot = self._take()
        if slot is None:
            if not self._begun:
                slot = self._make()
            else:
                oldest = next(iter(self._begun))
                slot = self._begun.pop(oldest)
                self._settle(slot)
        self._loader.start(tile, slot)
        return slot

    def _take(self) -> Slot | None:
        if self._free:
            return self._free.pop()
        return self._make() if self._num_slots < self._most_slots() else None

    def _make(self) -> Slot:
        slot = self._loader.new_slot(self._slot_bytes)
        self._num_slots += 1
        return slot

    def _look_ahead(
        self, upcoming: Iterator[tuple[int, Tile]], place: int, direct: Callable[..., bool]
    ) -> None:
        """Begin to read what follows `place`, as far as there are free buffers."""
        while self._free or self._num_slots < self._most_slots():
            number, tile = next(upcoming, (-1, None))
            if tile is None:
                return
            if 0 <= number <= place or direct(tile) or _key(tile) in self._begun:
                continue
            if len(tile) * tile[0].stride > self._slot_bytes:
                return
            slot = self._free.pop() if self._free else self._make()
            self._loader.start(tile, slot)
            self._begun[_key(tile)] = slot

    def _most_slots(self) -> int:
        return max(2, self._limit_bytes() // max(1, self._slot_bytes))

    def _settle(self, slot: Slot) -> None:
        """Wait for what was begun and nobody wants; its error is nobody's either."""
        try:
            self._loader.finish(slot)
        except Exception:
            return

    def clear(self) -> None:
        """Give all buffers back."""
        for slot in self._begun.values():
            self._settle(slot)
        self._begun.clear()
        self._free.clear()
        self._num_slots = 0
        self._generation += 1


def _key(tile: Tile) -> Serials:
    return tuple(record.serial for record in tile)


def _following(
    tiles: Sequence[Tile], then: Callable[[], Iterable[Tile]]
) -> Iterator[tuple[int, Tile]]:
    """`tiles` with their places, then what comes after them, with -1."""
    yield from enumerate(tiles)
    for tile in then():
        yield -1, tile
