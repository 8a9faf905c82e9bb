"""The disk tier: what stays in memory, what goes to the file, and what comes back."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnemon.errors import DiskFull, TierError
from mnemon.tiers import DeviceTier, DiskTier, HostTier, Record, Tier

MIB = 1 << 20


def put(tier: Tier, value: int, count: int = 1, num_bytes: int = 5000) -> tuple[Record, ...]:
    def fill(rows: Tensor) -> None:
        rows.copy_(torch.arange(value, value + count, dtype=torch.uint8)[:, None])

    return tier.put(count, num_bytes, fill)


def bound(tier: Tier) -> Tier:
    tier.bind(torch.device("cpu"))
    return tier


def first_bytes(tier: Tier, tiles: list[tuple[Record, ...]]) -> list[list[int]]:
    return [found[:, 0].tolist() for found in tier.stream(tiles, tuple)]


@pytest.mark.parametrize(
    "make",
    [DeviceTier, HostTier, lambda: DiskTier(memory_bytes=0), lambda: DiskTier(memory_bytes=MIB)],
)
def test_bytes_come_back_in_the_order_asked_for(make: object) -> None:
    assert callable(make)
    tier = bound(make())
    one, two = put(tier, 1, 3), put(tier, 10, 2)
    tiles = [two, one, one[1:], (one[2], two[0]), (two[1], two[0])]
    assert first_bytes(tier, tiles) == [[10, 11], [1, 2, 3], [2, 3], [3, 10], [11, 10]]
    assert first_bytes(tier, []) == []
    for found in tier.stream([one], tuple):
        assert found.shape == (3, one[0].stride)
        assert bool((found[:, :5000] == found[:, :1]).all())


def test_memory_is_filled_first_and_kept() -> None:
    tier = DiskTier(memory_bytes=MIB)
    bound(tier)
    records = [put(tier, value, num_bytes=100_000)[0] for value in range(12)]
    places = [tier.where(record) for record in records]
    assert places == ["host"] * 8 + ["disk"] * 4  # an eighth is for buffers
    assert first_bytes(tier, [(record,) for record in records]) == [[n] for n in range(12)]
    assert tier.buffer_bytes <= 2 * records[0].stride


def test_memory_makes_way_for_the_layers_own() -> None:
    tier = DiskTier(memory_bytes=MIB)
    bound(tier)

    class Layer:
        pass

    layer = Layer()
    records = [put(tier, value, num_bytes=100_000)[0] for value in range(8)]
    tier.claim(layer, MIB // 2)
    last = put(tier, 8, num_bytes=100_000)[0]
    places = [tier.where(record) for record in (*records, last)]
    assert places == ["host"] * 3 + ["disk"] * 6
    assert first_bytes(tier, [(r,) for r in (*records, last)]) == [[n] for n in range(9)]
    del layer
    assert tier.where(put(tier, 9, num_bytes=100_000)[0]) == "host"


def test_what_nobody_holds_makes_room() -> None:
    tier = DiskTier(memory_bytes=0, limit_bytes=4 * 8192)
    bound(tier)
    records = [put(tier, value) for value in range(4)]
    with pytest.raises(DiskFull):
        put(tier, 9)
    with pytest.raises(DiskFull):
        tier.reserve(1, 5000)
    assert first_bytes(tier, records) == [[0], [1], [2], [3]]
    del records[1]
    gc.collect()
    tier.reserve(1, 5000)
    records.append(put(tier, 7))
    assert first_bytes(tier, records) == [[0], [2], [3], [7]]
    records.clear()
    gc.collect()
    tier.reserve(1, 5000)
    assert tier.file_bytes == 8192


def test_records_are_page_aligned_and_nothing_of_memory_leaks() -> None:
    tier = DiskTier(memory_bytes=0)
    assert tier.stride(1) == tier.stride(4096) == 4096
    assert tier.stride(4097) == 8192


def test_a_tier_serves_one_device() -> None:
    tier = bound(HostTier())
    tier.bind(torch.device("cpu"))
    with pytest.raises(TierError, match="one device"):
        tier.bind(torch.device("meta"))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="path"):
        DiskTier(directory=str(tmp_path / "nowhere"))
