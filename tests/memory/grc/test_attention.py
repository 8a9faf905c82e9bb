"""GRC attention against the equations, and what must hold of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.memory.grc.reference import grc_attention, weights_of

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc import GRCAttention, Grid, SelfAttention, add_grc, remove_grc

VARIANTS = ("paper", "repo")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def attention(variant: str, dim: int = 12, heads: int = 3, **options: object) -> GRCAttention:
    """In float64, with a buffer that is not zero."""
    torch.manual_seed(3)
    made = GRCAttention(dim, heads, variant=variant, **options).double()  # type: ignore[arg-type]
    made.memory.cache.cache.normal_()
    made.memory.lambdas.data.normal_()
    return made


def padded(batch: int, tokens: int) -> torch.Tensor:
    """Padding behind, before, and in the middle."""
    real = torch.ones(batch, tokens, dtype=torch.bool)
    real[0, -2:] = False
    real[1, :3] = False
    real[2, 2:4] = False
    return real


@each_variant
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("ratio", "slots", "tokens"),
    [(0.5, 7, 7), (0.4, 5, 8), (1.0, 11, 6), (0.01, 1, 9), (2 / 3, 3, 7)],
)
def test_equals_the_equations(
    variant: str, training: bool, ratio: float, slots: int, tokens: int
) -> None:
    module = attention(variant, ratio=ratio, memory_length=slots).train(training)
    x = torch.randn(3, tokens, 12, dtype=torch.float64)
    real = padded(3, tokens)
    weights = weights_of(module)
    found = module(x, real=real)
    wanted, buffer = grc_attention(weights, x.numpy(), real.numpy(), 3, variant, training=training)
    at = real.numpy()
    np.testing.assert_allclose(found.detach().numpy()[at], wanted[at], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(module.memory.cache.cache.numpy(), buffer, rtol=1e-12, atol=1e-12)


@each_variant
def test_equals_the_equations_over_steps_and_in_a_grid(variant: str) -> None:
    module = attention(variant, memory_length=4).train()
    real = torch.ones(2, 6, dtype=torch.bool)
    for _ in range(3):
        x = torch.randn(2, 6, 12, dtype=torch.float64)
        weights = weights_of(module)
        found = module(x, grid=Grid(2, 3))
        wanted, buffer = grc_attention(
            weights, x.numpy(), real.numpy(), 3, variant, training=True, grid=(2, 3)
        )
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(module.memory.cache.cache.numpy(), buffer, rtol=1e-11)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lambda_of_minus_infinity_is_plain_attention(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = SelfAttention(16, 4).to(dtype)
    x, real = torch.randn(3, 9, 16, dtype=dtype), padded(3, 9)
    before = plain(x, real=real)
    keys = list(plain.state_dict())
    add_grc(plain, variant=variant, memory_length=5, initial_lambda=-math.inf)  # type: ignore[arg-type]
    for training in (True, False):
        assert torch.equal(plain.train(training)(x, real=real), before)
    loss = plain.train()(x, real=real).square().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in plain.parameters())
    remove_grc(plain)
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain(x, real=real), before)


@each_variant
def test_a_sample_does_not_depend_on_its_mates_at_evaluation(variant: str) -> None:
    module = attention(variant, memory_length=6).eval()
    x = torch.randn(3, 8, 12, dtype=torch.float64)
    real = padded(3, 8)
    buffer = module.memory.cache.cache.clone()
    together = module(x, real=real)
    for row in range(3):
        alone = module(x[row : row + 1], real=real[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)
    assert torch.equal(module.memory.cache.cache, buffer)


@each_variant
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_as_if_it_were_not_there(variant: str, training: bool) -> None:
    module = attention(variant, memory_length=6).train(training)
    buffer = module.memory.cache.cache.clone()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    bare = module(x)
    after = module.memory.cache.cache.clone()
    for before, behind in ((0, 4), (3, 0), (2, 2)):
        module.memory.cache.cache.copy_(buffer)
        junk = 1e3 * torch.randn(2, before + 5 + behind, 12, dtype=torch.float64)
        real = torch.zeros(2, before + 5 + behind, dtype=torch.bool)
        junk[:, before : before + 5] = x
        real[:, before : before + 5] = True
        found = module(junk, real=real)[:, before : before + 5]
        torch.testing.assert_close(found, bare, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module.memory.cache.cache, after, rtol=1e-10, atol=1e-10)


def test_a_mask_hides_tokens_from_the_memory_too() -> None:
    module = attention("paper", memory_length=6).train()
    buffer = module.memory.cache.cache.clone()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    by_padding = module(x, real=real)
    after = module.memory.cache.cache.clone()
    module.memory.cache.cache.copy_(buffer)
    by_mask = module(x, mask=real[:, None, :].expand(2, 5, 5))
    torch.testing.assert_close(by_mask[real], by_padding[real])
    torch.testing.assert_close(module.memory.cache.cache, after)
    assert module(x, mask=torch.eye(5).bool()).isfinite().all()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert module(x, real=nothing).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0}, {"ratio": 1.5}, {"memory_length": 0}, {"variant": "other"}],
)
def test_options_outside_their_bounds(options: dict[str, object]) -> None:
    with pytest.raises(LearnedMemoryError, match="came"):
        GRCAttention(12, 3, **options)  # type: ignore[arg-type]


def test_wrong_calls_say_what_came() -> None:
    with pytest.raises(LearnedMemoryError, match="multiple of the heads"):
        GRCAttention(10, 3)
    module = GRCAttention(12, 3, variant="repo")
    x = torch.zeros(2, 5, 12)
    with pytest.raises(LearnedMemoryError, match=r"real of shape \(2, 4\)"):
        module(x, real=torch.ones(2, 4).bool())
    with pytest.raises(LearnedMemoryError, match=r"mask of shape .*float32"):
        module(x, mask=torch.ones(5, 5))
    with pytest.raises(LearnedMemoryError, match="5 tokens and Grid"):
        module(x, grid=Grid(2, 2))
