"""Tiered layers: the same numbers as without a tier, the verbs, full disks, copies."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemon.attention import attend, cpu
from mnemon.attention.reference import attention
from mnemon.attention.stream import StreamedTensor
from mnemon.errors import CacheError, CapacityError, DiskFull, TierError
from mnemon.formats import PackedTensor
from mnemon.layers import CacheLayer, DenseLayer, PackedLayer, TieredLayer
from mnemon.layers.hot import DenseHot, PackedHot
from mnemon.layers.order import LayerOrder
from mnemon.schemes import PackedFormat
from mnemon.tiers import DiskTier, HostTier, Tier

HEADS, WIDTH = 2, 32
INT4 = PackedFormat.named("int4")
FORMATS = {
    "dense": (DenseLayer, lambda: DenseHot(tail_tokens=128)),
    "int4": (lambda: PackedLayer(INT4), lambda: PackedHot(INT4)),
    "int4/int2": (
        lambda: PackedLayer(PackedFormat.named("int4", "int2")),
        lambda: PackedHot(PackedFormat.named("int4", "int2")),
    ),
    "int2": (
        lambda: PackedLayer(PackedFormat.named("int2")),
        lambda: PackedHot(PackedFormat.named("int2")),
    ),
}
every_format = pytest.mark.parametrize("name", FORMATS)


def random(count: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, count, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def pair(name: str, tier: Tier | None = None) -> tuple[CacheLayer, TieredLayer]:
    """The same layer without a tier and with one, segments of 64 tokens."""
    plain, hot = FORMATS[name]
    tier = DiskTier(memory_bytes=0) if tier is None else tier
    return plain(), TieredLayer(tier, hot(), LayerOrder(), segment_tokens=64)


def both(one: CacheLayer, other: CacheLayer, verb: Callable[[CacheLayer], object]) -> None:
    verb(one)
    verb(other)


def assert_same(plain: CacheLayer, tiered: CacheLayer) -> None:
    assert plain.num_tokens == tiered.num_tokens
    assert plain.num_stored == tiered.num_stored
    assert plain.batch_size == tiered.batch_size
    one, two = plain.view(), tiered.view()
    assert one is not None
    assert two is not None
    for ours, theirs in zip(one, two, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours.clone(), theirs.clone())


@every_format
def test_verbs_give_what_they_give_without_a_tier(name: str) -> None:
    """Bit for bit, packed blocks included."""
    plain, tiered = pair(name)
    both(plain, tiered, lambda layer: layer.append(*random(500)))
    assert tiered.num_segments == 5
    assert_same(plain, tiered)
    for step in range(70):
        both(plain, tiered, lambda layer, step=step: layer.append(*random(1, step)))
    assert tiered.num_segments == 6
    assert_same(plain, tiered)
    both(plain, tiered, lambda layer: layer.reorder(torch.tensor([1, 1])))
    assert_same(plain, tiered)
    both(plain, tiered, lambda layer: layer.repeat(2))
    assert_same(plain, tiered)
    both(plain, tiered, lambda layer: layer.append(*random(3, 9, batch=4)))
    both(plain, tiered, lambda layer: layer.select(torch.tensor([3, 0])))
    assert_same(plain, tiered)
    assert_same(plain.fork(), tiered.fork())
    assert_same(plain.extract(1), tiered.extract(1))
    assert_same(plain.merge([plain]), tiered.merge([tiered]))
    both(plain, tiered, lambda layer: layer.crop(50))
    assert_same(plain, tiered)


@every_format
def test_crop_into_what_is_frozen(name: str) -> None:
    plain, tiered = pair(name)
    both(plain, tiered, lambda layer: layer.append(*random(640)))
    for count in (128, 64, 64 * 3):  # where blocks end nothing is quantized twice
        assert tiered.can_crop(count)
        both(plain, tiered, lambda layer, count=count: layer.crop(count))
        assert_same(plain, tiered)
    both(plain, tiered, lambda layer: layer.append(*random(300, 3)))
    both(plain, tiered, lambda layer: layer.crop(301))
    assert_same(plain, tiered)


@every_format
def test_keep_merge_and_padding(name: str) -> None:
    plain, tiered = pair(name)
    both(plain, tiered, lambda layer: layer.append(*random(640)))
    short_plain, short_tiered = pair(name)
    both(short_plain, short_tiered, lambda layer: layer.append(*random(300, 4)))
    assert_same(plain.merge([short_plain]), tiered.merge([short_tiered]))
    other = pair(name, HostTier())[1]
    other.append(*random(640))
    assert_same(plain.merge([plain]), tiered.merge([other]))
    index = torch.arange(0, 640, 2)
    both(plain, tiered, lambda layer: layer.keep(index))
    assert_same(plain, tiered)
    assert tiered.num_segments == 3
    assert not tiered.can_crop(2)


def test_extract_without_padding() -> None:
    plain, tiered = pair("dense")
    both(plain, tiered, lambda layer: layer.append(*random(500)))
    assert_same(plain.extract(1, 37), tiered.extract(1, 37))
    _, packed = pair("int4")
    packed.append(*random(500))
    cut = packed.extract(1, 37)
    assert cut.num_stored == 463
    assert cut.num_segments == 5
    whole, view = packed.view(), cut.view()
    assert whole is not None
    assert view is not None
    # Tokens move to other blocks, where they may be quantized again.
    torch.testing.assert_close(view[0].clone(), whole[0].clone()[1:, :, 37:], rtol=0, atol=0.7)


@every_format
def test_state_goes_to_another_tier(name: str) -> None:
    plain, tiered = pair(name)
    both(plain, tiered, lambda layer: layer.append(*random(500)))
    _, other = pair(name, HostTier())
    other.load_state(tiered.state())
    assert_same(plain, other)
    both(plain, other, lambda layer: layer.append(*random(200, 8)))
    assert_same(plain, other)
    assert other.nbytes_by_place()["host"] > 0
    assert tiered.nbytes_by_place()["disk"] > 0


def test_states_of_other_formats_are_refused() -> None:
    _, dense = pair("dense")
    dense.append(*random(500))
    _, packed = pair("int4")
    with pytest.raises(CacheError):
        packed.load_state(dense.state())
    assert packed.num_tokens == 0


@every_format
@pytest.mark.parametrize("count", [1, 7, 40])
def test_attention_streams(name: str, count: int) -> None:
    """Against the float64 reference, with everything that attention takes."""
    _, tiered = pair(name)
    tiered.append(*random(500))
    keys, values = tiered.append(*random(count, 5))
    assert isinstance(keys, StreamedTensor)
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(2, 4 * HEADS, count, WIDTH, generator=generator)
    total = 500 + count
    mask = torch.rand(2, 1, count, total, generator=generator) > 0.3
    mask[0, :, 0] = False  # a row that sees nothing
    bias = torch.randn(1, 4 * HEADS, count, total, generator=generator)
    sinks = torch.randn(4 * HEADS, generator=generator)
    for options in (
        {},
        {"causal": True},
        {"mask": mask},
        {"mask": mask, "causal": True, "sinks": sinks},
        {"softcap": 5.0, "scale": 0.3},
        {"bias": bias, "causal": True},
        {"bias": bias, "mask": mask, "softcap": 3.0, "sinks": sinks},
    ):
        expected = attention(query, keys.clone(), values.clone(), **options)
        got = attend(query, keys, values, **options)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


def test_results_do_not_depend_on_where_the_bytes_lie() -> None:
    query = torch.randn(2, 8, 1, WIDTH)
    found = []
    for tier in (HostTier(), DiskTier(memory_bytes=0), DiskTier(memory_bytes=1 << 20)):
        _, layer = pair("int4", tier)
        layer.append(*random(700))
        for _ in range(2):
            found.append(attend(query, *layer.fork().append(*random(1, 1))))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_format
@pytest.mark.usefixtures("threads")
def test_threads_that_take_turns_change_no_bit(name: str) -> None:
    query, found = torch.randn(2, 8, 1, WIDTH), []
    _, layer = pair(name, DiskTier(memory_bytes=4 << 20))
    layer.append(*random(64 * 40))
    keys, values = layer.append(*random(1, 1))
    assert isinstance(keys, StreamedTensor)
    assert keys.stream.most_held > 4
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attend(query, keys, values))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.usefixtures("threads")
def test_an_error_in_the_middle_leaves_the_stream_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    query = torch.randn(2, 8, 1, WIDTH)
    _, layer = pair("int4", DiskTier(memory_bytes=4 << 20))
    layer.append(*random(64 * 40))
    view = layer.append(*random(1, 1))
    expected, real, calls = attend(query, *view), cpu.decode_part, []

    def breaks(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(0)
        if len(calls) == 7:
            raise RuntimeError("broken")
        return real(*args, **options)

    if not cpu.is_built():
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(cpu, "decode_part", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        attend(query, *view)
    assert torch.equal(attend(query, *view), expected)


def test_tiles_are_read_packed() -> None:
    _, tiered = pair("int4")
    keys, _ = tiered.append(*random(500))
    assert not isinstance(keys, StreamedTensor)  # the first prompt is there as it was given
    keys, _ = tiered.append(*random(1, 1))
    assert isinstance(keys, StreamedTensor)
    tiles = [pair[0].shape[2] for pair in keys.stream.tiles()]
    assert tiles == [64] * 5 + [181]
    assert all(isinstance(pair[0], PackedTensor) for pair in keys.stream.tiles())


def test_each_byte_is_read_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(memory_bytes=0)
    order = LayerOrder()
    layers = [TieredLayer(tier, DenseHot(), order, segment_tokens=64) for _ in range(3)]
    for layer in layers:
        layer.append(*random(1000))
    reads: list[int] = []
    file = tier._file
    read = type(file).read

    def counted(self: object, offset: int, into: memoryview) -> None:
        reads.append(len(into))
        read(file, offset, into)

    monkeypatch.setattr(type(file), "read", counted)
    stored = file.used_bytes
    query = torch.randn(2, 4, 1, WIDTH)
    for step in range(4):
        for layer in layers:
            attend(query, *layer.append(*random(1, step)))
    ahead = tier.buffer_bytes
    assert 4 * stored <= sum(reads) <= 4 * stored + ahead


def test_rows_share_what_they_have_in_common() -> None:
    _, layer = pair("dense")
    layer.append(*random(500, batch=1))
    disk = layer.nbytes_by_place()["disk"]
    layer.repeat(4)
    assert layer.nbytes_by_place()["disk"] == disk
    fork = layer.fork()
    assert fork._segments[0].tile == layer._segments[0].tile
    layer.append(*random(200, 1, batch=4))
    assert layer.nbytes_by_place()["disk"] == disk + 4 * 3 * disk // 5


def test_a_static_cache_in_a_tier_is_bounded() -> None:
    tier = DiskTier(memory_bytes=1 << 20)
    layer = TieredLayer(tier, DenseHot(), LayerOrder(), max_tokens=600, segment_tokens=64)
    layer.append(*random(500))
    assert layer.max_length == 600
    assert tier.file_bytes >= 7 * 64 * HEADS * 2 * WIDTH * 4 * 2  # set aside at the first token
    with pytest.raises(CapacityError, match="600"):
        layer.append(*random(101))
    layer.append(*random(100))
    assert layer.num_tokens == 600


def test_a_full_disk_leaves_the_cache_as_it_was() -> None:
    size = 10 * 64 * HEADS * 2 * WIDTH * 4 * 2
    tier = DiskTier(memory_bytes=0, limit_bytes=size)
    order = LayerOrder()
    layers = [TieredLayer(tier, DenseHot(), order, segment_tokens=64) for _ in range(2)]
    plains = [DenseLayer() for _ in range(2)]
    for layer in (*layers, *plains):
        layer.append(*random(128 + 5 * 64))
    for _ in range(2):
        with pytest.raises(DiskFull):  # the first layer refuses: no layer has what others lack
            layers[0].append(*random(64, 1))
        for plain, layer in zip(plains, layers, strict=True):
            assert_same(plain, layer)
    for plain, layer in zip(plains, layers, strict=True):
        both(plain, layer, lambda layer: layer.crop(30))
        both(plain, layer, lambda layer: layer.append(*random(20, 2)))
        assert_same(plain, layer)
    for layer in layers:
        layer.crop(200)
    gc.collect()
    for layer in layers:
        layer.append(*random(190, 3))


def test_an_error_while_writing_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, tiered = pair("int4")
    both(plain, tiered, lambda layer: layer.append(*random(500, batch=1)))

    def broken(*args: object) -> None:
        raise TierError("the disk went away")

    tier = tiered._tier
    assert isinstance(tier, DiskTier)
    with monkeypatch.context() as patch:
        patch.setattr(type(tier._file), "write", broken)
        for count in (64, 300):
            with pytest.raises(TierError):
                tiered.append(*random(count, 1, batch=3))
            assert_same(plain, tiered)
    both(plain, tiered, lambda layer: layer.append(*random(300, 1, batch=3)))
    assert_same(plain, tiered)


def test_too_little_memory_is_told_before_anything_is_kept() -> None:
    tier = DiskTier(memory_bytes=4096)
    layer = TieredLayer(tier, DenseHot(), LayerOrder())
    with pytest.raises(TierError, match="memory"):
        layer.append(*random(4))
    assert layer.num_tokens == 0


def test_another_dtype_is_refused() -> None:
    _, layer = pair("dense")
    layer.append(*random(300))
    keys, values = random(1)
    with pytest.raises(CacheError, match="float32"):
        layer.append(keys.bfloat16(), values.bfloat16())


def test_any_function_sees_numbers_and_none_can_write() -> None:
    plain, tiered = pair("dense")
    both(plain, tiered, lambda layer: layer.append(*random(500)))
    view, held = tiered.view(), plain.view()
    assert view is not None
    assert held is not None
    keys = view[0]
    assert keys.shape == held[0].shape
    assert torch.equal(keys[:, :, 3:400:7] * 2, held[0][:, :, 3:400:7] * 2)
    assert torch.equal(torch.cat([keys, keys], 2), torch.cat([held[0]] * 2, 2))
    assert "StreamedTensor" in repr(keys)
    for write in (lambda: keys.zero_(), lambda: keys.__setitem__(0, 1.0), lambda: keys.add_(1)):
        with pytest.raises(CacheError, match="Write to a copy"):
            write()


def test_the_file_goes_with_the_last_copy(tmp_path: Path) -> None:
    tier = DiskTier(memory_bytes=0, directory=str(tmp_path))
    _, layer = pair("dense", tier)
    layer.append(*random(500))
    finalizer = tier._file._finalizer
    fork = layer.fork()
    del layer, tier
    gc.collect()
    assert finalizer.alive
    del fork
    gc.collect()
    assert not finalizer.alive
