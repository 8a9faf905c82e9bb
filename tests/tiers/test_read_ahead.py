"""The ring of buffers: what is read, in which order, and into how many buffers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemon.errors import TierError
from mnemon.tiers.ahead import Loader, ReadAhead
from mnemon.tiers.base import Record, Tile


class Slot:
    def __init__(self, num_bytes: int) -> None:
        self.buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        self.tile: Tile | None = None


class Diary(Loader[Slot]):
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.made = 0
        self.broken: set[int] = set()

    def new_slot(self, num_bytes: int) -> Slot:
        self.made += 1
        return Slot(num_bytes)

    def start(self, tile: Tile, slot: Slot) -> None:
        assert slot.tile is None, "the buffer is in use"
        slot.tile = tile
        self.started.append(tile[0].place)

    def finish(self, slot: Slot) -> Tensor:
        assert slot.tile is not None
        tile, slot.tile = slot.tile, None
        if tile[0].place in self.broken:
            raise TierError("broken")
        size = len(tile) * tile[0].stride
        slot.buffer[:size] = tile[0].place
        return slot.buffer[:size].view(len(tile), -1)

    def release(self, slot: Slot) -> None:
        slot.tile = None


def tile(place: int, stride: int = 64, rows: int = 1) -> Tile:
    return tuple(Record(stride, stride, place, lambda place: None) for _ in range(rows))


def never(tile: Tile) -> bool:
    return False


def read(ring: ReadAhead[Slot], tiles: Sequence[Tile], then: Sequence[Tile] = ()) -> list[Any]:
    return [int(found[0, 0]) for _, found in ring.stream(tiles, lambda: then, never)]


def test_order_and_content() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 3 * 64)
    tiles = [tile(place) for place in range(10)]
    assert read(ring, tiles) == list(range(10))
    assert diary.started == list(range(10))
    assert diary.made == 3
    assert ring.num_bytes == 3 * 64


def test_what_follows_is_read_before_it_is_asked_for() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 3 * 64)
    layers = [[tile(10 * layer + place) for place in range(4)] for layer in range(3)]
    assert read(ring, layers[0], [*layers[1], *layers[2]]) == [0, 1, 2, 3]
    assert diary.started == [0, 1, 2, 3, 10, 11, 12]
    assert read(ring, layers[1], [*layers[2], *layers[0]]) == [10, 11, 12, 13]
    assert diary.started == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22]


def test_what_was_read_in_vain_makes_room() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 3 * 64)
    read(ring, [tile(1)], [tile(2), tile(3), tile(4)])
    assert read(ring, [tile(7), tile(8), tile(9), tile(6)]) == [7, 8, 9, 6]
    assert diary.made == 3


def test_two_buffers_are_always_there() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 0)
    assert read(ring, [tile(place) for place in range(4)]) == [0, 1, 2, 3]
    assert diary.made == 2


def test_larger_tiles_take_larger_buffers() -> None:
    ring = ReadAhead(Diary(), lambda: 0)
    read(ring, [tile(1), tile(2)], [tile(3)])
    assert read(ring, [tile(4, 128, 2), tile(5, 128, 2), tile(6)]) == [4, 5, 6]
    assert ring.slot_bytes == 256


def test_streams_within_streams() -> None:
    ring = ReadAhead(Diary(), lambda: 2 * 64)
    outer = [tile(place) for place in range(5)]
    inner = [tile(place) for place in range(20, 25)]
    found = []
    for _, got in ring.stream(outer, lambda: (), never):
        assert got is not None
        found.append((int(got[0, 0]), read(ring, inner), int(got[0, 0])))
    assert found == [(place, [20, 21, 22, 23, 24], place) for place in range(5)]


def test_a_stream_that_is_left_gives_its_buffer_back() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 2 * 64)
    for _ in range(5):
        for _, _found in ring.stream([tile(1), tile(2), tile(3)], lambda: (), never):
            break
    assert diary.made <= 3


def test_tiles_in_memory_are_not_read() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 4 * 64)
    tiles = [tile(place) for place in range(6)]
    stream = ring.stream(tiles, lambda: (), lambda tile: tile[0].place % 2 == 0)
    assert [found is None for _, found in stream] == [True, False] * 3
    assert diary.started == [1, 3, 5]


def test_buffers_in_use_at_once_are_not_read_into() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 4 * 64)
    tiles = [tile(place) for place in range(9)]
    held: list[Tensor] = []
    settled = []

    def settle() -> None:
        settled.append([int(found[0, 0]) for found in held[-3:]])

    for _, found in ring.stream(tiles, lambda: tiles, never, 3, settle):
        assert found is not None
        held.append(found)
        first = len(held) - 1
        assert [int(x[0, 0]) for x in held[-3:]] == list(range(max(0, first - 2), first + 1))
    assert settled == [[6, 7, 8]]
    assert diary.made == 4


def test_an_error_comes_when_its_tile_is_asked_for() -> None:
    diary = Diary()
    ring = ReadAhead(diary, lambda: 3 * 64)
    diary.broken = {2}
    tiles = [tile(place) for place in range(4)]
    with pytest.raises(TierError):
        read(ring, tiles)
    diary.broken = set()
    assert read(ring, tiles) == [0, 1, 2, 3]
    diary.broken = {9}
    assert read(ring, [tile(1)], [tile(9)]) == [1]  # nobody asked for it
    assert read(ring, [tile(place) for place in (3, 4, 5, 6)]) == [3, 4, 5, 6]
