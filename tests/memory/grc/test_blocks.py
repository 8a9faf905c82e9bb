"""The blocks without a memory against plain maths, and with one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc import Grid, add_grc, remove_grc
from mnemon.memory.grc.blocks import (
    EncoderBlock,
    PVTBlock,
    RecurrentDecoder,
    SpatialReductionAttention,
    SwinBlock,
    WindowAttention,
)

GRID = Grid(4, 8)
IMAGE: dict[str, Callable[[], nn.Module]] = {
    "pvt": lambda: PVTBlock(12, 3, 16, reduction=2),
    "pvt without reduction": lambda: PVTBlock(12, 3, 16),
    "swin": lambda: SwinBlock(12, 3, 16, window=4),
    "swin shifted": lambda: SwinBlock(12, 3, 16, window=4, shift=2),
    "encoder": lambda: EncoderBlock(12, 3, 16),
}
each_variant = pytest.mark.parametrize("variant", ["paper", "repo"])


def heads_of(module: nn.Module, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = module.query(x), module.key(seen), module.value(seen)  # type: ignore[operator]
    return tuple(t.unflatten(-1, (3, -1)).transpose(-3, -2) for t in (q, k, v))  # type: ignore[return-value]


def test_spatial_reduction_by_hand() -> None:
    torch.manual_seed(0)
    module = SpatialReductionAttention(12, 3, 2).double()
    x = torch.randn(2, 32, 12, dtype=torch.float64)
    kernel, bias = module.reduce.weight, module.reduce.bias  # type: ignore[union-attr]
    image = x.view(2, 4, 8, 12)
    rows = []
    for row in range(2):
        for column in range(4):
            square = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            rows.append(torch.einsum("bhwc,ochw->bo", square, kernel) + bias)
    seen = module.norm(torch.stack(rows, dim=1))  # type: ignore[misc]
    q, k, v = heads_of(module, x, seen)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    wanted = module.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, GRID), wanted)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_by_hand(shift: int) -> None:
    """One masked attention over the whole image, from the coordinates of each token."""
    torch.manual_seed(0)
    side = 4
    module = WindowAttention(12, 3, side, shift).double()
    module.bias.data.normal_()
    x = torch.randn(2, 32, 12, dtype=torch.float64)
    places = [(y, c) for y in range(4) for c in range(8)]
    mask = torch.full((3, 32, 32), -math.inf, dtype=torch.float64)

    def window(y: int, c: int) -> tuple[int, ...]:
        # The window after the shift, and whether the roll has wrapped the token around.
        return (
            (y - shift) % 4 // side,
            (c - shift) % 8 // side,
            int(y < shift),
            int(c < shift),
        )

    for i, one in enumerate(places):
        for j, two in enumerate(places):
            if window(*one) == window(*two):
                down = (one[0] - shift) % 4 - (two[0] - shift) % 4
                across = (one[1] - shift) % 8 - (two[1] - shift) % 8
                row = (down + side - 1) * (2 * side - 1) + across + side - 1
                mask[:, i, j] = module.bias[row].detach()
    q, k, v = heads_of(module, x, x)
    found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wanted = module.out(found.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, GRID), wanted)


@each_variant
@pytest.mark.parametrize("name", list(IMAGE))
def test_a_memory_goes_in_and_out(name: str, variant: str) -> None:
    torch.manual_seed(0)
    block, x = IMAGE[name](), torch.randn(2, 32, 12)

    def run() -> Tensor:
        found: Tensor = block(x, grid=GRID)
        return found

    plain, keys = run(), list(block.state_dict())
    grc = add_grc(block, variant=variant, memory_length=5, initial_lambda=-math.inf)  # type: ignore[arg-type]
    assert torch.equal(run(), plain)
    (branch,) = grc.branches.values()
    branch.lambdas.data.zero_()
    before = branch.cache.cache.clone()
    trained = run()
    assert not torch.equal(trained, plain)
    assert not torch.equal(branch.cache.cache, before)
    trained.sum().backward()
    assert branch.cache.update_gate.weight.grad is not None  # type: ignore[union-attr]
    block.eval()
    kept = branch.cache.cache.clone()
    one = run()[0]
    x = x[:1]
    torch.testing.assert_close(run()[0], one)
    assert torch.equal(branch.cache.cache, kept)
    grc.remove()
    assert list(block.state_dict()) == keys
    assert torch.equal(run(), copy.deepcopy(block)(x, grid=GRID))
    torch.testing.assert_close(run(), plain[:1])


def test_sides_that_do_not_fit() -> None:
    x = torch.zeros(1, 30, 12)
    with pytest.raises(LearnedMemoryError, match="multiples of 4"):
        WindowAttention(12, 3, 4)(x, Grid(5, 6))
    with pytest.raises(LearnedMemoryError, match="multiples of 2"):
        SpatialReductionAttention(12, 3, 2)(x, Grid(5, 6))
    with pytest.raises(LearnedMemoryError, match="shift 4"):
        WindowAttention(12, 3, 4, 4)


def decoder(recurrence: int = 0) -> RecurrentDecoder:
    torch.manual_seed(0)
    made = RecurrentDecoder(20, dim=16, num_heads=2, num_layers=2, hidden=16, recurrence=recurrence)
    return made.double()


def read(model: RecurrentDecoder, ids: Tensor, length: int) -> Tensor:
    """Logits of a text, read in segments."""
    state, parts = None, []
    for begin in range(0, ids.shape[1], length):
        logits, state = model(ids[:, begin : begin + length], state)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("recurrence", [0, 5])
@pytest.mark.parametrize("variant", ["paper", "repo", None])
def test_no_token_sees_a_later_one(variant: str | None, recurrence: int) -> None:
    model = decoder(recurrence)
    if variant:
        add_grc(model, variant=variant, memory_length=4)  # type: ignore[arg-type]
    ids = torch.randint(0, 20, (2, 18))
    others = ids.clone()
    others[:, 10:] = (others[:, 10:] + 1) % 20
    for training in (True, False):
        model.train(training)
        one, two = read(model, ids, 6), read(model, others, 6)
        assert torch.equal(one[:, :10], two[:, :10])
        assert not torch.equal(one[:, 10:], two[:, 10:])


@pytest.mark.parametrize("recurrence", [0, 5])
@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_a_stream_does_not_depend_on_the_others(variant: str, recurrence: int) -> None:
    model = decoder(recurrence).train()
    add_grc(model, variant=variant, memory_length=4)  # type: ignore[arg-type]
    ids = torch.randint(0, 20, (3, 18))
    together = read(model, ids, 6)
    torch.testing.assert_close(read(model, ids[1:2], 6)[0], together[1])


def test_recurrence_over_everything_is_one_attention() -> None:
    model = decoder(recurrence=100)
    ids = torch.randint(0, 20, (2, 18))
    torch.testing.assert_close(read(model, ids, 6), read(model, ids, 18))


@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_memory_reaches_back_and_learns_through_one_step(variant: str) -> None:
    model = decoder()
    grc = add_grc(model, variant=variant, memory_length=4)  # type: ignore[arg-type]
    ids = torch.randint(0, 20, (2, 12))
    others = ids.clone()
    others[:, 0] = (others[:, 0] + 1) % 20
    assert not torch.equal(read(model, ids, 6)[:, 6:], read(model, others, 6)[:, 6:])
    first, state = model(ids[:, :6])
    assert all(not part.requires_grad for layer in state for part in layer if part is not None)
    second, _ = model(ids[:, 6:], state)
    second.sum().backward()
    for branch in grc.branches.values():
        weight = branch.cache.update_gate.weight  # type: ignore[union-attr]
        assert weight.grad.abs().sum() > 0
        assert branch.cache.cache.eq(0).all()  # the state goes from hand to hand
    first.sum().backward()
    remove_grc(model)
    assert read(model, ids, 6)[:, 6:].equal(read(model, others, 6)[:, 6:])


def test_closed_and_pinned_memories_of_a_decoder() -> None:
    model = decoder()
    ids = torch.randint(0, 20, (2, 18))
    plain = read(model, ids, 6)
    with add_grc(model, initial_lambda=-math.inf, memory_length=4):
        assert torch.equal(read(model, ids, 6), plain)
    others = (ids + 1) % 20
    others[:, 12:] = ids[:, 12:]
    with add_grc(model, pinned=True, memory_length=4):
        assert torch.equal(read(model, ids, 6)[:, 12:], read(model, others, 6)[:, 12:])
    assert torch.equal(read(model, ids, 6), plain)


def test_an_odd_head_cannot_be_rotated() -> None:
    with pytest.raises(LearnedMemoryError, match="heads of 5"):
        RecurrentDecoder(9, dim=10, num_heads=2, num_layers=1, hidden=8)
