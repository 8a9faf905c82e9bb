"""What the contract suite does not ask of packed layers: bytes, memory, exact moves, windows."""

import gc

import pytest
import torch

from mnemon.errors import CacheError
from mnemon.formats import PackedTensor
from mnemon.layers import DenseLayer, LayerState, PackedLayer, PackedWindowLayer
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.recipe import parse
from mnemon.schemes import PackedFormat


def form(text: str) -> PackedFormat:
    found = parse(text).packed
    assert found is not None
    return found


def new(count: int, seed: int = 0, batch: int = 1, heads: int = 2, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, count, width, generator=generator)


def packed_bytes(layer: PackedLayer) -> int:
    tails = sum(
        tail.numel() * tail.element_size()
        for buffer in (layer._keys, layer._values)
        if (tail := buffer.tail_tokens()) is not None
    )
    return layer.nbytes - tails


@pytest.mark.parametrize(("text", "most"), [("int8", 8.6), ("int4", 4.6), ("int2", 2.8)])
@pytest.mark.parametrize("width", [64, 128])
def test_bits_per_value_at_8k_tokens(text: str, most: float, width: int) -> None:
    layer = PackedLayer(form(text))
    x = new(8192, width=width).to(torch.bfloat16)
    layer.append(x[:, :, :5000], x[:, :, :5000])
    for start in range(5000, 8192, 56):
        layer.append(x[:, :, start : start + 56], x[:, :, start : start + 56])
    packed = layer._keys.num_packed
    assert 8192 - packed < 128
    values = 2 * 2 * width * packed
    assert packed_bytes(layer) * 8 / values <= most
    slack = 2 * 2 * 2 * 128 * width  # the tails' own memory
    assert layer.nbytes_reserved - slack <= packed_bytes(layer) * 1.08


def test_nothing_dense_outlives_the_forward() -> None:
    layer = PackedLayer(form("int4"))
    x = new(4096)
    keys, _ = layer.append(x, x)
    assert keys is x or torch.equal(keys, x)  # a prompt reads its own keys as they are
    assert layer.nbytes < x.numel() * 4 / 3
    del keys
    gc.collect()
    view = layer.view()
    assert view is not None
    assert isinstance(view[0], PackedTensor)
    assert view[0].half.tail.shape[2] == 64
    keys, _ = layer.append(new(70, 1), new(70, 1))
    assert isinstance(keys, PackedTensor)
    assert torch.equal(keys.half.tail[:, :, 64:], new(70, 1))
    assert (keys.half.num_blocks, layer._keys.num_blocks) == (63, 64)


def test_views_keep_their_numbers() -> None:
    layer = PackedLayer(form("int8(residual=3)"))
    handed = []
    for step in range(30):
        keys, _ = layer.append(new(17, step), new(17, step))
        handed.append((keys, keys.clone()))
    for keys, was in handed:
        assert torch.equal(keys.clone(), was)


def test_appending_does_not_copy_the_blocks() -> None:
    layer = PackedLayer(form("int4"))
    layer.append(new(64 * 40), new(64 * 40))
    moved, before = 0, -1
    for step in range(640):
        layer.append(new(1, step), new(1, step))
        side = layer._keys.side()
        assert side is not None
        moved += side.blocks.data_ptr() != before
        before = side.blocks.data_ptr()
    assert moved <= 6  # ten blocks came; reserve is a sixteenth


def test_forks_share_blocks_until_a_write() -> None:
    layer = PackedLayer(form("int8"))
    layer.append(new(300), new(300))
    fork = layer.fork()
    ours, theirs = layer._keys.side(), fork._keys.side()
    assert ours is not None
    assert theirs is not None
    assert ours.blocks.data_ptr() == theirs.blocks.data_ptr()
    fork.append(new(200, 1), new(200, 1))
    fork.reorder(torch.tensor([0]))
    after = layer._keys.side()
    assert after is not None
    assert torch.equal(after.blocks, ours.blocks)
    assert layer.num_tokens == 300


def test_keep_moves_codes_as_they_are() -> None:
    """Along tokens what is packed stays bit for bit, wherever it goes."""
    layer = PackedLayer(form("int2(keys=token, residual=10)"))
    x = new(400, batch=2)
    layer.append(x, x * 3)
    before = layer.dense_pair()
    index = torch.arange(400)[torch.arange(400) % 3 != 1]
    packed = layer._keys.num_packed
    layer.keep(index)
    after = layer.dense_pair()
    still = index < packed  # later ones were dense and are packed now, or not
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :, index[still]], other[:, :, still])
    heads = torch.stack([torch.arange(0, 200, 2), torch.arange(1, 201, 2)])[None].expand(2, 2, 100)
    before = layer.dense_pair()
    layer.keep(heads)
    after = layer.dense_pair()
    for one, other in zip(before, after, strict=True):
        expected = one.gather(2, heads[..., None].expand(2, 2, 100, 32))
        assert torch.equal(other[:, :, :60], expected[:, :, :60])
    assert layer.num_tokens == 400
    assert layer.num_stored == 100


def test_merge_and_extract_move_codes_as_they_are() -> None:
    layers = []
    for seed, count in enumerate((300, 211, 300)):
        layer = PackedLayer(form("int2(keys=token, residual=0)"))
        layer.append(new(count, seed), new(count, seed + 9))
        layers.append(layer)
    merged = layers[0].merge(layers[1:])
    for row, layer in enumerate(layers):
        padding = 300 - layer.num_tokens
        back = merged.extract(row, padding)
        assert back.num_tokens == layer.num_tokens
        count = 192 if padding else 256  # what both hold packed
        for one, other in zip(layer.dense_pair(), back.dense_pair(), strict=True):
            assert torch.equal(one[:, :, :count], other[:, :, :count])
        shown = merged.dense_pair()[0][row, :, :padding]
        assert not bool(shown.any())


def test_extract_copies_no_token_it_drops() -> None:
    layer = PackedLayer(form("int4"))
    layer.append(new(500, batch=2), new(500, batch=2))
    alone = layer.extract(1, 150)
    assert alone._keys.num_skipped == 150 - 128
    assert torch.equal(alone.dense_pair()[0][0], layer.dense_pair()[0][1, :, 150:])
    assert alone.nbytes < layer.nbytes / 2
    alone.append(new(3), new(3))
    alone.crop(alone.num_tokens - 10)  # into the first block, of which tokens are gone
    assert torch.equal(alone.dense_pair()[0][0], layer.dense_pair()[0][1, :, 150:160])
    assert alone._keys.num_skipped == 0


def test_merge_refuses_other_formats() -> None:
    one, other = PackedLayer(form("int4")), PackedLayer(form("int4(residual=1)"))
    for layer in (one, other):
        layer.append(new(3), new(3))
    with pytest.raises(CacheError, match="residual=1"):
        one.merge([other])


@pytest.mark.parametrize("parts", [(1,) * 700, (700,), (350, 1, 349), (90,) * 7 + (70,), (63, 637)])
def test_a_window_forgets_whole_blocks(parts: tuple[int, ...]) -> None:
    layer, dense = PackedWindowLayer(200, form("int8(residual=5)")), DenseLayer()
    x = new(700)
    start = 0
    for count in parts:
        piece = x[:, :, start : start + count]
        length, offset = layer.mask_sizes(count)
        keys, values = layer.append(piece, piece)
        dense.append(piece, piece)
        assert keys.shape == values.shape
        assert keys.shape[2] == length
        assert offset == start + count - length
        torch.testing.assert_close(keys.clone(), x[:, :, offset : start + count], rtol=0, atol=0.05)
        assert torch.equal(keys[:, :, -count:], piece)
        start += count
        assert layer.num_stored == min(start, 199)
        assert layer._keys.num_blocks <= 199 // 64 + 1
    assert layer.num_tokens == 700
    view = layer.view()
    assert view is not None
    torch.testing.assert_close(view[0].clone(), x[:, :, 501:], rtol=0, atol=0.05)


def test_states_that_contradict_themselves() -> None:
    layer = PackedLayer(form("int4"))
    layer.append(new(300), new(300))
    good = layer.state()
    other = PackedLayer(form("int4"))
    keys = good.tensors["keys_blocks"]
    for tensors, meta in [
        ({"keys_blocks": keys[..., :-64]}, {}),
        ({"keys_blocks": keys[:, :, :-1]}, {}),
        ({"keys_blocks": keys.float()}, {}),
        ({"keys_factors": good.tensors["keys_factors"].double()}, {}),
        ({"keys": good.tensors["keys"][:, :1]}, {}),
        ({"keys": good.tensors["keys"].to(torch.int32)}, {}),
        ({}, {"skipped": 64}),
        ({}, {"skipped": -1}),
        ({}, {"num_tokens": 3}),
    ]:
        state = LayerState(
            kind="packed", tensors={**good.tensors, **tensors}, meta={**good.meta, **meta}
        )
        with pytest.raises(CacheError):
            other.load_state(state)
    with pytest.raises(CacheError, match="another recipe"):
        PackedLayer(form("int8")).load_state(good)
    with pytest.raises(CacheError, match="another recipe"):
        PackedLayer(form("int4(rotate=yes)")).load_state(good)
    assert other.num_tokens == 0
    other.load_state(good)
    assert torch.equal(other.dense_pair()[1], layer.dense_pair()[1])


def test_a_dense_pair_is_packed_when_it_is_loaded() -> None:
    layer = PackedLayer(form("int8"))
    x = new(300)
    state = layer.state()
    layer.load_state(
        LayerState(
            kind="packed", tensors={"keys": x, "values": x}, meta={**state.meta, "num_tokens": 300}
        )
    )
    assert layer._keys.num_blocks == 3
    torch.testing.assert_close(layer.dense_pair()[0], x, rtol=0, atol=0.05)
    assert torch.equal(layer.dense_pair()[0][:, :, 192:], x[:, :, 192:])


def test_crop_back_and_forth_does_not_drift() -> None:
    """Opening a block and packing it again, many times over."""
    layer = PackedLayer(form("int4(residual=0)"))
    x = new(64)
    layer.append(x, x)
    first = layer.dense_pair()[0]
    for _ in range(20):
        rest = layer.dense_pair()[0][:, :, -10:]
        layer.crop(10)
        assert layer._keys.num_blocks == 0
        layer.append(rest, rest)
        assert layer._keys.num_blocks == 1
    assert (layer.dense_pair()[0] - first).abs().max() < 0.02


def test_buffers_report_what_they_hold() -> None:
    buffer = PackedBuffer(form("int4").keys, is_keys=True, residual=0)
    assert buffer.is_empty
    assert buffer.view() is None
    assert (buffer.nbytes, buffer.nbytes_reserved, len(buffer)) == (0, 0, 0)
    buffer.append(new(130))
    side, tail = buffer.side(), buffer.tail_tokens()
    assert side is not None
    assert tail is not None
    assert buffer.nbytes == side.nbytes + tail.numel() * 4
    assert (len(buffer), buffer.num_packed) == (130, 128)
