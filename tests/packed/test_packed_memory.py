"""Where the bytes of a decode step on a packed cache go: into memory that is there."""

import subprocess
import sys

import pytest
import torch

from mnemon.layers import PackedLayer
from mnemon.layers.storage import TokenBuffer
from mnemon.recipe import parse


def layer_of(text: str) -> PackedLayer:
    form = parse(text).packed
    assert form is not None
    return PackedLayer(form)


def new(count: int, seed: int = 0, heads: int = 2, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, width, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("text", ["int8", "int4", "int2", "fp8", "int4/int2", "int4(rotate=yes)"])
@pytest.mark.parametrize("width", [64, 80, 128, 24])
def test_token_by_token_packs_the_same_bytes_as_a_prompt(text: str, width: int) -> None:
    at_once, one_by_one = layer_of(text), layer_of(text)
    x = new(64 * 14 + 5, width=width)
    at_once.append(x, -x)
    one_by_one.append(x[:, :, :300], -x[:, :, :300])
    for place in range(300, x.shape[2]):
        piece = x[:, :, place : place + 1]
        one_by_one.append(piece, -piece)
    for ours, theirs in (
        (at_once._keys, one_by_one._keys),
        (at_once._values, one_by_one._values),
    ):
        one, other = ours.side(), theirs.side()
        assert one is not None
        assert other is not None
        assert torch.equal(one.blocks, other.blocks)
        assert torch.equal(one.factors, other.factors)
        tails = ours.tail_tokens(), theirs.tail_tokens()
        assert tails[0] is not None
        assert tails[1] is not None
        assert torch.equal(tails[0], tails[1])


def test_the_tail_stays_where_it_is() -> None:
    layer = layer_of("int4")
    layer.append(new(512), new(512))
    reserved, places = layer._keys._tail.nbytes_reserved, set()
    for step in range(300):
        layer.append(new(1, step), new(1, step))
        tail = layer._keys._tail._storage
        assert tail is not None
        places.add(tail.data.data_ptr())
        del tail
    assert len(places) == 1
    assert layer._keys._tail.nbytes_reserved == reserved


def test_a_tail_that_somebody_reads_is_left_to_them() -> None:
    layer = layer_of("int4")
    layer.append(new(512), new(512))
    held = []
    for step in range(200):
        view, _ = layer.append(new(1, step), new(1, step))
        held.append((view, view.clone()))
    for view, was in held:
        assert torch.equal(view.clone(), was)


def test_a_fork_of_a_tail_that_moves_keeps_its_tokens() -> None:
    layer = layer_of("int8")
    layer.append(new(512 + 63), new(512 + 63))
    layer.append(new(1, 1), new(1, 1))  # packs: tokens go in front
    fork = layer.fork()
    before = fork.dense_pair()[0]
    for step in range(130):
        layer.append(new(1, step), new(1, step))
    assert torch.equal(fork.dense_pair()[0], before)
    fork.append(new(3, 9), new(3, 9))
    assert torch.equal(fork.dense_pair()[0][:, :, :-3], before)


@pytest.mark.parametrize("dropped", [8, 20, 90])
def test_live_tokens_move_to_the_front(dropped: int) -> None:
    buffer = TokenBuffer(slack=64)
    x = torch.arange(100 * 4).view(1, 1, 100, 4).float()
    buffer.replace(x)
    buffer.append(x[:, :, :64])
    assert buffer.nbytes_reserved == 164 * 16
    whole = torch.cat([x, x[:, :, :64]], dim=2)
    buffer.drop_first(dropped)
    buffer.append(x[:, :, :5])
    live = buffer.live()
    assert live is not None
    assert torch.equal(live, torch.cat([whole[:, :, dropped:], x[:, :, :5]], dim=2))


def test_room_is_nobodys_until_it_is_taken() -> None:
    buffer = TokenBuffer(slack=2)
    x = torch.ones(1, 2, 30, 64)
    buffer.replace(x)
    fork = buffer.fork()
    buffer.room(1).fill_(7)
    assert len(buffer) == 30
    buffer.extend(1)
    fork.append(x[:, :, :1] * 5)
    for held, last in ((buffer.live(), 7), (fork.live(), 5)):
        assert held is not None
        assert bool((held[:, :, -1] == last).all())
        assert bool((held[:, :, :-1] == 1).all())


_GROW = """
import sys, torch
from mnemon.layers.storage import TokenBuffer
from mnemon.cli.trial import PeakMemory
buffer = TokenBuffer(slack=1)
buffer.replace(torch.ones(1, 8, 512, 4608, dtype=torch.uint8))
most = 0
for _ in range(3):
    free = buffer._storage.capacity - len(buffer)
    buffer.append(torch.ones(1, 8, free, 4608, dtype=torch.uint8))
    with PeakMemory(torch.device("cpu")) as peak:
        buffer.room(1)
    most = max(most, peak.bytes) if _ else 0  # the first loads what torch needs
print(most, buffer.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth_takes_a_small_part_of_what_is_stored() -> None:
    words = [sys.executable, "-c", _GROW]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    most, stored = (int(word) for word in done.stdout.split())
    assert most <= stored // 20, (most, stored)
