"""The gated recurrent cache: its update, its buffer, its gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc import FifoCache, GatedRecurrentCache, MemoryCache
from mnemon.memory.grc.interpolate import interpolate_tokens
from mnemon.memory.grc.settings import summary_width

each_variant = pytest.mark.parametrize("variant", ["paper", "repo"])
each_kind = pytest.mark.parametrize("kind", [GatedRecurrentCache, FifoCache])


def cache_of(variant: str, kind: type[MemoryCache] = GatedRecurrentCache, **more: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    made = kind(10, num_heads=2, ratio=0.6, memory_length=5, variant=variant, **more)  # type: ignore[arg-type]
    made.double()
    made.cache.normal_()
    return made


def tokens(batch: int = 4, length: int = 9) -> Tensor:
    return torch.randn(batch, length, 10, dtype=torch.float64)


@each_variant
def test_gates_are_shares_and_the_update_lies_between(variant: str) -> None:
    module = cache_of(variant)
    summary, old = module.summarise(tokens()), module.cache.expand(4, -1, -1)
    update, reset = module.gates(summary, old)
    for gate in (update, reset):
        assert 0 < gate.min() < gate.max() < 1
    joined = [reset * old, summary] if variant == "repo" else [summary, reset * old]
    new = module.candidate(torch.cat(joined, -1))
    if variant == "repo":
        new = module.norm(functional.gelu(new))
    found = module.update(summary, old)
    assert (found >= torch.minimum(old, new) - 1e-12).all()
    assert (found <= torch.maximum(old, new) + 1e-12).all()
    torch.testing.assert_close(found, torch.lerp(old, new, update))


@each_kind
@each_variant
def test_training_stores_the_mean_of_the_updates(variant: str, kind: type[MemoryCache]) -> None:
    module = cache_of(variant, kind).train()
    x = tokens()
    alone = [module.step(row[None], module.cache).caches[0] for row in x]
    step = module.step(x, module.cache)
    wanted = torch.stack(alone)
    torch.testing.assert_close(step.caches, wanted)
    read = module(x)
    torch.testing.assert_close(module.cache, wanted.mean(0).detach())
    torch.testing.assert_close(read, wanted if variant == "repo" else wanted.mean(0)[None])


def test_a_step_touches_no_state() -> None:
    module = cache_of("paper").train()
    before = copy.deepcopy(module.state_dict())
    given = torch.randn(4, 5, 6, dtype=torch.float64)
    kept = given.clone()
    module.step(tokens(), given)
    assert torch.equal(given, kept)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@each_variant
def test_rows_of_padding_count_for_nothing(variant: str) -> None:
    module = cache_of(variant).train()
    x, real = tokens(), torch.ones(4, 9, dtype=torch.bool)
    real[1:3] = False
    step = module.step(x, module.cache, real)
    wanted = module.step(x[[0, 3]], module.cache)
    torch.testing.assert_close(step.mean, wanted.mean)
    torch.testing.assert_close(step.caches[1], module.cache)
    assert int(step.num_rows) == 2
    before = module.cache.clone()
    module(x, torch.zeros_like(real))
    assert torch.equal(module.cache, before)


@each_variant
def test_evaluation_and_pinning_leave_the_buffer(variant: str) -> None:
    for module in (cache_of(variant).eval(), cache_of(variant, pinned=True).train()):
        before = module.cache.clone()
        read = module(tokens())
        assert torch.equal(module.cache, before)
        assert len(read) == (4 if variant == "repo" else 1)
        if variant == "paper":
            assert torch.equal(read[0], before)


@each_variant
def test_gradients_stay_within_one_step(variant: str) -> None:
    module = cache_of(variant).train()
    first, second = tokens().requires_grad_(), tokens().requires_grad_()
    kept = module(first)
    assert not module.cache.requires_grad
    module(second).square().sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert second.grad.abs().sum() > 0
    assert module.update_gate.weight.grad.abs().sum() > 0
    kept.sum().backward()  # its own graph is still whole: nothing was overwritten in it
    assert first.grad is not None


@each_kind
def test_a_state_dict_goes_round_before_the_first_forward(kind: type[MemoryCache]) -> None:
    saved = io.BytesIO()
    first = cache_of("repo", kind)
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = kind(10, num_heads=2, ratio=0.6, memory_length=5, variant="repo").double()
    assert second.cache.shape == (5, 6)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(second.cache, first.cache)
    x = tokens()
    assert torch.equal(first.train()(x), second.train()(x))


@each_variant
def test_copies_and_pickles_after_a_step(variant: str) -> None:
    module = cache_of(variant).train()
    module(tokens()).sum().backward()
    x = tokens()
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    wanted = module(x)
    assert torch.equal(copied(x), wanted)
    assert torch.equal(pickled(x), wanted)
    assert torch.equal(copied.cache, module.cache)


@each_variant
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_one_step(variant: str, reentrant: bool) -> None:
    plain, checked = cache_of(variant).train(), cache_of(variant).train()
    for _ in range(3):
        x = tokens()
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(one).square().sum().backward()
        checkpoint(checked, two, use_reentrant=reentrant).square().sum().backward()
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(two.grad, one.grad)
        torch.testing.assert_close(checked.cache, plain.cache)
    for ours, theirs in zip(checked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_checkpointing_of_an_older_forward_is_refused() -> None:
    module = cache_of("paper").train()
    outs = [checkpoint(module, tokens().requires_grad_(), use_reentrant=False) for _ in range(2)]
    with pytest.raises(LearnedMemoryError, match="run backward after each forward"):
        outs[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = cache_of("repo").to(dtype).train()
    read = module(tokens().to(dtype))
    assert read.dtype == module.cache.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cache_of("paper").float().train()
        mixed(tokens().float()).sum().backward()
    assert mixed.cache.dtype == torch.float32


@each_variant
def test_compiled_whole(variant: str) -> None:
    torch.compiler.reset()
    module, other = cache_of(variant).train(), cache_of(variant).train()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, real = tokens(), torch.rand(4, 9) > 0.3
        torch.testing.assert_close(compiled(x, real), module(x, real))
        torch.testing.assert_close(other.cache, module.cache)


@pytest.mark.parametrize("slots", [1, 3, 8, 20])
def test_slots_are_those_of_the_real_tokens_alone(slots: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, 3, dtype=torch.float64)
    whole = interpolate_tokens(x, slots, torch.ones(5, 8, dtype=torch.bool))
    torch.testing.assert_close(whole, interpolate_tokens(x, slots))
    real = torch.rand(5, 8) > 0.4
    real[0] = False
    x[~real] = float("nan")
    found = interpolate_tokens(x, slots, real)
    assert torch.equal(found[0], torch.zeros(slots, 3, dtype=torch.float64))
    for row in range(1, 5):
        torch.testing.assert_close(
            found[row], interpolate_tokens(x[row, real[row]][None], slots)[0]
        )


@pytest.mark.parametrize(
    ("dim", "heads", "ratio", "kept"),
    [(64, 4, 0.5, 32), (64, 4, 0.01, 4), (64, 4, 1.0, 64), (12, 3, 0.4, 6), (10, 5, 0.3, 5)],
)
def test_the_width_is_whole_heads(dim: int, heads: int, ratio: float, kept: int) -> None:
    assert summary_width(dim, heads, ratio) == kept


def test_fifo_moves_up() -> None:
    module = FifoCache(4, ratio=1.0, memory_length=8)
    old = torch.arange(8.0)[None, :, None].expand(1, 8, 4)
    found = module.update(torch.arange(10.0, 18.0)[None, :, None].expand(1, 8, 4), old)
    assert found[0, :, 0].tolist() == [2, 3, 4, 5, 6, 7, 11.5, 15.5]


def test_other_channels_are_refused() -> None:
    with pytest.raises(LearnedMemoryError, match="tokens of 7 channels"):
        cache_of("paper")(torch.zeros(1, 3, 7, dtype=torch.float64))
