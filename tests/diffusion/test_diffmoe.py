"""Mixtures of experts: against plain loops in float64, and what the paper promises of them."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mnemon.diffusion.diffmoe import (
    KINDS,
    DiffMoE,
    ExpertChoice,
    Experts,
    MoELayer,
    TokenChoice,
    auxiliary_loss,
    cost,
    install,
    load_moe,
    moe_layers,
    recorded_usage,
    save_moe,
    set_rule,
    set_training,
    uninstall,
)
from mnemon.diffusion.digits.architecture import build_pipeline, build_transformer
from mnemon.diffusion.digits.data import NO_CLASS, load_digits
from mnemon.diffusion.digits.train import main, make_trainer
from mnemon.diffusion.digits.trainer import Trainer, TrainOptions, noised
from mnemon.errors import ModelError, ZooError

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

DIM, HIDDEN = 6, 10


def make(
    kind: str,
    num_experts: int = 3,
    capacity: float = 1.0,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A layer whose router and predictor are decided, so that no two scores are nearly equal."""
    torch.manual_seed(seed)
    layer = KINDS[kind](Experts(num_experts, DIM, HIDDEN), capacity=capacity)
    nn.init.normal_(layer.router.weight)
    if isinstance(layer, DiffMoE):
        nn.init.normal_(layer.predictor[2].weight)
    return layer.to(dtype)


def tokens(batch: int, count: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        batch, count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# -- the oracle: plain loops over tokens, experts and numbers --------------------------------------


class Said(NamedTuple):
    """What a layer should say."""

    output: Tensor
    rows: list[list[int]]
    auxiliary: float | None
    tau: list[float] | None


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def times(weight: Tensor, bias: Tensor | None, x: list[float]) -> list[float]:
    found = []
    for i, row in enumerate(weight.tolist()):
        found.append(sum(a * b for a, b in zip(row, x, strict=True)))
        if bias is not None:
            found[-1] += bias[i].item()
    return found


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def highest(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def oracle(layer: MoELayer, hidden: Tensor) -> Said:
    batch, count, _ = hidden.shape
    num_experts, experts = layer.num_experts, layer.experts
    pool = hidden.flatten(0, 1).tolist()
    scores = []
    for x in pool:
        powers = [math.exp(v) for v in times(layer.router.weight, None, x)]
        scores.append([power / sum(powers) for power in powers])
    rows: list[list[int]] = [[] for _ in range(num_experts)]
    auxiliary, tau = None, None
    if isinstance(layer, TokenChoice):
        for s, score in enumerate(scores):
            rows[score.index(max(score))].append(s)
        if layer.training:
            auxiliary = 0.0
            for i in range(num_experts):
                mean = sum(score[i] for score in scores) / len(pool)
                auxiliary += 0.01 * num_experts * len(rows[i]) / len(pool) * mean
    elif isinstance(layer, ExpertChoice):
        share = int(count / num_experts * layer.capacity)
        for b in range(batch):
            for i in range(num_experts):
                own = [score[i] for score in scores[b * count : (b + 1) * count]]
                rows[i] += [b * count + s for s in highest(own, share)]
    else:
        assert isinstance(layer, DiffMoE)
        first, _, second = layer.predictor
        logits = []
        for x in pool:
            inner = [v * sigmoid(v) for v in times(first.weight, first.bias, x)]
            logits.append(times(second.weight, second.bias, inner))
        share = int(len(pool) / num_experts * layer.capacity)
        tau = layer.tau.tolist()
        auxiliary = 0.0 if layer.training else None
        for i in range(num_experts):
            own = [score[i] for score in scores]
            predicted = [sigmoid(logit[i]) for logit in logits]
            if layer.training:
                rows[i] = highest(own, share)
                tau[i] = 0.95 * tau[i] + 0.05 * sorted(predicted, reverse=True)[share - 1]
                for s, p in enumerate(predicted):
                    surprise = -math.log(p if s in rows[i] else 1 - p)
                    auxiliary += surprise / (len(pool) * num_experts)
            else:
                level = tau[i] * layer.tau_scale + layer.tau_offset
                above = [s for s, p in enumerate(predicted) if p > level]
                rows[i] = above if layer.rule == "threshold" else highest(own, len(above))
    output = [[0.0] * DIM for _ in pool]
    for i in range(num_experts):
        for s in rows[i]:
            inner = [gelu(v) for v in times(experts.weight_in[i], experts.bias_in[i], pool[s])]
            said = times(experts.weight_out[i], experts.bias_out[i], inner)
            for d in range(DIM):
                output[s][d] += scores[s][i] * said[d]
    shaped = torch.tensor(output, dtype=torch.float64).view_as(hidden)
    return Said(shaped, rows, auxiliary, tau)


MODES = [
    ("diffmoe", True, "topk"),
    ("diffmoe", False, "topk"),
    ("diffmoe", False, "threshold"),
    ("token_choice", True, ""),
    ("token_choice", False, ""),
    ("expert_choice", True, ""),
    ("expert_choice", False, ""),
]


@pytest.mark.parametrize(("kind", "training", "rule"), MODES)
@pytest.mark.parametrize(
    ("num_experts", "capacity", "batch", "count"),
    [(3, 1.0, 2, 6), (4, 1.0, 3, 7), (4, 1.5, 1, 9), (2, 2.0, 2, 3), (1, 1.0, 2, 4)],
)
def test_layer_equals_plain_loops(
    kind: str, training: bool, rule: Any, num_experts: int, capacity: float, batch: int, count: int
) -> None:
    if kind == "token_choice":
        capacity = 1.0
    layer = make(kind, num_experts, capacity).train(training)
    if rule:
        layer.rule, layer.tau_scale, layer.tau_offset = rule, 0.9, 0.05
        # One expert scores all tokens alike: "the highest" are then no particular ones, but all.
        layer.tau.copy_(
            torch.linspace(0.3, 0.7, num_experts) if num_experts > 1 else -torch.ones(1)
        )
    hidden = tokens(batch, count)
    said = oracle(layer, hidden)
    output = layer(hidden)
    torch.testing.assert_close(output, said.output, rtol=1e-10, atol=1e-12)
    assert layer.usage.num_tokens == batch * count
    assert layer.usage.tokens_per_expert == tuple(len(rows) for rows in said.rows)
    if said.auxiliary is None:
        assert layer.auxiliary is None
    else:
        assert layer.auxiliary.item() == pytest.approx(said.auxiliary, rel=1e-10)
    if said.tau is not None:
        assert layer.tau.tolist() == pytest.approx(said.tau, rel=1e-10)


# -- what holds in training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "capacity", "batch", "count", "share"),
    [
        (4, 1.0, 2, 8, 4),
        (3, 1.0, 1, 8, 2),
        (3, 1.0, 5, 7, 11),
        (4, 2.0, 1, 5, 2),
        (4, 4.0, 1, 3, 3),
    ],
)
def test_in_training_each_expert_has_exactly_its_share(
    num_experts: int, capacity: float, batch: int, count: int, share: int
) -> None:
    layer = make("diffmoe", num_experts, capacity)
    layer(tokens(batch, count))
    assert layer.usage.tokens_per_expert == (share,) * num_experts
    assert layer.usage.capacity == pytest.approx(num_experts * share / (batch * count))


def test_predictor_and_trunk_do_not_see_each_other() -> None:
    layer = make("diffmoe")
    hidden = tokens(2, 6).requires_grad_()
    output = layer(hidden)
    torch.autograd.backward(layer.auxiliary, retain_graph=True)
    assert hidden.grad is None
    learned = {name for name, value in layer.named_parameters() if value.grad is not None}
    assert learned == {f"predictor.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert all(p.grad.any() for p in layer.predictor.parameters())

    layer.zero_grad()
    torch.autograd.backward(output.square().sum())
    assert hidden.grad.any()
    assert layer.router.weight.grad.any()
    assert layer.experts.weight_in.grad.flatten(1).any(1).all()
    assert all(p.grad is None for p in layer.predictor.parameters())


def test_gradients_are_those_of_the_weighted_sum() -> None:
    """Numerically: of the inputs, through experts and scores, where the choice does not change."""
    layer = make("diffmoe").eval()
    layer.tau.fill_(0.5)
    layer.rule = "threshold"
    assert torch.autograd.gradcheck(layer, (tokens(1, 4).requires_grad_(),))
    assert 0 < sum(layer.usage.tokens_per_expert) < 12


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_the_dense_feed_forward(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    dense = FeedForward(16, activation_fn="gelu-approximate")
    layer = KINDS[kind](Experts.like(dense, 1, copy=True)).train(training)
    hidden = torch.randn(3, 5, 16)
    assert torch.equal(layer(hidden), dense(hidden))  # a fresh tau is 0: inference takes all, too


@pytest.mark.parametrize("approximation", ["gelu", "gelu-approximate"])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_like_the_feed_forward(approximation: str, bias: bool) -> None:
    dense = FeedForward(8, mult=2, activation_fn=approximation, bias=bias).double()
    layer = TokenChoice(Experts.like(dense, 4, copy=True)).double()
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    best = layer.router(hidden).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(layer(hidden), dense(hidden) * best)


def test_dropout_is_the_feed_forwards() -> None:
    dense = FeedForward(8, dropout=1.0, activation_fn="gelu")
    layer = TokenChoice(Experts.like(dense, 1, copy=True))
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(layer(hidden), dense.net[2].bias.expand(2, 3, 8))
    assert not torch.allclose(layer.eval()(hidden), dense.net[2].bias.expand(2, 3, 8))


@pytest.mark.parametrize(("kind", "training", "rule"), MODES)
def test_order_of_tokens_does_not_matter(kind: str, training: bool, rule: Any) -> None:
    layer = make(kind).train(training)
    if rule:
        layer.rule = rule
        layer.tau.fill_(0.5)
    hidden = tokens(3, 6)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    if kind == "expert_choice":  # its pool is one sample
        inner = torch.randperm(6, generator=torch.Generator().manual_seed(3))
        order = torch.cat([inner + 6 * b for b in (2, 0, 1)])
    before = layer.tau.clone() if rule else None

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[order].view_as(x)

    said = layer(hidden)
    if before is not None:
        layer.tau.copy_(before)
    torch.testing.assert_close(layer(permuted(hidden)), permuted(said))
    assert not torch.allclose(permuted(said), said)


# -- tau, and what holds in inference --------------------------------------------------------------


def test_tau_follows_the_least_prediction_that_is_taken() -> None:
    layer = make("diffmoe", dtype=torch.float32)
    expected = [0.0] * 3
    for step in range(20):
        hidden = tokens(2, 6, seed=step, dtype=torch.float32)
        predicted = torch.sigmoid(layer.predictor(hidden.flatten(0, 1)))
        for i in range(3):
            fourth = sorted(predicted[:, i].tolist())[-4]
            expected[i] = 0.95 * expected[i] + 0.05 * fourth
        layer(hidden)
    assert layer.tau.tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.1  # it has moved


def test_tau_stays_in_inference_and_without_gradients() -> None:
    layer = make("diffmoe")
    layer.tau.fill_(0.25)
    with torch.no_grad():
        layer(tokens(2, 6))
    layer.eval()(tokens(2, 6))
    assert layer.tau.tolist() == [0.25] * 3


def test_topk_depends_on_batch_mates_and_threshold_does_not() -> None:
    layer = make("diffmoe").eval()
    layer.tau.fill_(0.5)
    batch = tokens(4, 6)
    changed = {}
    for rule in ("topk", "threshold"):
        layer.rule = rule
        alone = torch.cat([layer(sample) for sample in batch.split(1)])
        changed[rule] = (alone - layer(batch)).abs().max().item()
    assert changed["topk"] > 1e-2
    assert changed["threshold"] < 1e-12


@pytest.mark.parametrize("rule", ["topk", "threshold"])
@pytest.mark.parametrize("lever", ["tau_scale", "tau_offset"])
def test_lower_tau_is_more_capacity(rule: Any, lever: str) -> None:
    layer = make("diffmoe").eval()
    layer.rule = rule
    layer.tau.copy_(torch.tensor([0.4, 0.5, 0.6]))
    hidden, used = tokens(4, 10), []
    levels = [0.0, 0.5, 0.8, 1.0, 1.2, 2.5] if lever == "tau_scale" else [-1, -0.2, 0, 0.2, 0.4, 1]
    for level in levels:
        setattr(layer, lever, level)
        layer(hidden)
        used.append(layer.usage.tokens_per_expert)
    assert used[0] == (40, 40, 40)
    assert used[-1] == (0, 0, 0)
    for more, less in itertools.pairwise(used):
        assert all(a >= b for a, b in zip(more, less, strict=True))
    assert len(set(used)) >= 4


def test_expert_and_token_choice_do_not_depend_on_batch_mates() -> None:
    for kind in ("token_choice", "expert_choice"):
        layer = make(kind).eval()
        batch = tokens(4, 6)
        torch.testing.assert_close(layer(batch)[:1], layer(batch[:1]), rtol=0, atol=1e-12)


# -- losses ----------------------------------------------------------------------------------------


def test_balance_loss_is_least_for_equal_loads() -> None:
    layer = make("token_choice", 3)
    with torch.no_grad():
        layer.router.weight.zero_()
    hidden = torch.zeros(1, 6, DIM, dtype=torch.float64)
    hidden[0, range(6), [0, 1, 2, 0, 1, 2]] = 1.0
    with torch.no_grad():
        layer.router.weight[range(3), range(3)] = 50.0
    layer(hidden)
    assert layer.auxiliary.item() == pytest.approx(0.01)  # 0.01 N (3 x 1/3 x 1/3)
    layer(hidden[:, [0, 0, 0]])
    assert layer.auxiliary.item() == pytest.approx(0.03)  # 0.01 N (1 x 1)


def test_losses_are_collected_once() -> None:
    model = build_transformer("tiny")
    assert auxiliary_loss(model).item() == 0.0
    layers = install(model, "diffmoe", num_experts=4)
    set_training(model)
    step(model)
    parts = [layer.auxiliary.item() for layer in layers]
    assert min(parts) > 0.1
    total = auxiliary_loss(model)
    assert total.requires_grad
    assert total.item() == pytest.approx(sum(parts))
    assert auxiliary_loss(model).item() == 0.0
    set_training(model, False)
    step(model)
    assert auxiliary_loss(model).item() == 0.0


# -- in a transformer ------------------------------------------------------------------------------


def step(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 1, 8, 8, generator=generator)
    said: Tensor = model(
        images, timestep=torch.full((batch,), 300.0), class_labels=torch.arange(batch)
    ).sample
    return said


def awake(size: str = "tiny") -> Any:
    """A DiT whose blocks matter: fresh ones are identities."""
    model = build_transformer(size)
    torch.manual_seed(5)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.weight.normal_(std=0.05)
            block.norm1.linear.bias.fill_(0.5)
        model.proj_out_2.weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize("kind", list(KINDS))
def test_uninstall_gives_the_model_back(kind: str) -> None:
    model = awake()
    before = [block.ff for block in model.transformer_blocks]
    names, said = list(model.state_dict()), step(model)
    layers = install(model, kind, num_experts=4)
    assert [isinstance(b.ff, KINDS[kind]) for b in model.transformer_blocks] == 3 * [False, True]
    assert layers == moe_layers(model) == [model.transformer_blocks[i].ff for i in (1, 3, 5)]
    assert all(not layer.training for layer in layers)
    assert not torch.allclose(step(model), said)
    uninstall(model)
    assert all(b.ff is ff for b, ff in zip(model.transformer_blocks, before, strict=True))
    assert list(model.state_dict()) == names
    assert torch.equal(step(model), said)
    uninstall(model)  # nothing to do


def test_install_begins_as_the_paper_says() -> None:
    model = build_transformer("tiny")
    state = torch.random.get_rng_state()
    layers = install(model, num_experts=16, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    routers = torch.cat([layer.router.weight.flatten() for layer in layers])
    assert routers.std().item() == pytest.approx(0.006, rel=0.1)
    limit = 1 / math.sqrt(64)
    assert layers[0].experts.weight_in.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert layers[0].tau.tolist() == [0.0] * 16
    other = install(build_transformer("tiny"), num_experts=16, seed=3)
    for mine, same in zip(layers, other, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.parameters(), same.parameters(), strict=True)
        )
    assert not torch.equal(layers[0].experts.weight_in, layers[1].experts.weight_in)


def test_one_expert_from_dense_leaves_a_model_as_it_was() -> None:
    model = awake()
    said = step(model)
    install(model, num_experts=1, from_dense=True, every=1)
    assert len(moe_layers(model)) == 6
    set_training(model)
    assert torch.equal(step(model), said)


def test_uninstall_follows_the_model_to_another_dtype() -> None:
    model = awake()
    install(model)
    model.double()
    uninstall(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "soft"}, "kind 'soft' came; expected one of diffmoe, token_choice"),
        ({"num_experts": 0}, "num_experts 0"),
        ({"every": 7}, r"blocks \[\] were asked for; expected some of 0 .. 5"),
        ({"blocks": [6]}, r"blocks \[6\]"),
        ({"capacity": 9.0}, "capacity 9.0 came"),
        ({"capacity": 0.0}, "capacity 0.0 came"),
        ({"kind": "token_choice", "capacity": 2.0}, "a token has one expert"),
    ],
)
def test_install_refuses(change: dict[str, Any], words: str) -> None:
    model = build_transformer("tiny")
    names = list(model.state_dict())
    with pytest.raises(ModelError, match=words):
        install(model, **change)
    assert list(model.state_dict()) == names


def test_install_refuses_other_models() -> None:
    with pytest.raises(ModelError, match="a Linear came"):
        install(nn.Linear(2, 2))
    model = build_transformer("tiny")
    model.transformer_blocks[5].ff = FeedForward(64, activation_fn="geglu")
    with pytest.raises(ModelError, match="expected diffusers' FeedForward with GELU"):
        install(model)
    assert not moe_layers(model)
    install(model, blocks=[0])
    with pytest.raises(ModelError, match="uninstall"):
        install(model)


def test_set_rule_reaches_every_layer_and_refuses() -> None:
    model = build_transformer("tiny")
    with pytest.raises(ModelError, match="no DiffMoE"):
        set_rule(model, "threshold")
    layers: Any = install(model)
    set_rule(model, "threshold", tau_scale=0.5, tau_offset=0.1)
    assert {(x.rule, x.tau_scale, x.tau_offset) for x in layers} == {("threshold", 0.5, 0.1)}
    with pytest.raises(ModelError, match="rule 'mask' came"):
        set_rule(model, "mask")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "capacity"), [(k, 1.0) for k in KINDS] + [("diffmoe", 2.0)])
def test_cost_is_what_torch_counts(kind: str, capacity: float) -> None:
    model = build_transformer("tiny")

    def macs() -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step(model)
        return counter.get_total_flops() / 2

    dense, parameters = macs(), sum(p.numel() for p in model.parameters())
    assert cost(model)[:2] == (parameters, parameters)
    install(model, kind, num_experts=8, capacity=capacity)
    set_training(model)
    counted = cost(model)
    num_tokens = 2 * 64
    more = counted.expert_macs - counted.dense_macs + counted.router_macs + counted.predictor_macs
    assert macs() == dense + num_tokens * more
    assert counted.dense_macs == 3 * 2 * 64 * 256
    assert counted.expert_macs == capacity * counted.dense_macs
    assert counted.router_macs == 3 * 64 * 8
    assert counted.predictor_macs == (3 * (64 * 64 + 64 * 8) if kind == "diffmoe" else 0)
    # Beside what routes, an activated expert is a feed-forward.
    assert counted.parameters > counted.activated_parameters
    if capacity == 1:
        biases = 3 * (64 + 8) if kind == "diffmoe" else 0
        routing = counted.router_macs + counted.predictor_macs + biases
        assert counted.activated_parameters == parameters + routing


def test_capacity_is_recorded_for_every_call() -> None:
    model = awake()
    layers = install(model, num_experts=4)
    for layer in layers:
        layer.tau.fill_(0.5)
    with recorded_usage(model) as calls, torch.no_grad():
        for seed, batch in enumerate((2, 3)):
            step(model, batch, seed)
    step(model)  # no longer
    assert [call.usage[0].num_tokens for call in calls] == [128, 192]
    assert [call.timesteps.tolist() for call in calls] == [[300.0] * 2, [300.0] * 3]
    for call in calls:
        sums = [sum(one.tokens_per_expert) / one.num_tokens for one in call.usage]
        assert call.capacity == pytest.approx(sum(sums) / 3)
    assert 0 < calls[0].capacity < 4
    assert calls[0].capacity != calls[1].capacity


# -- odd cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffmoe", "expert_choice"])
def test_too_few_tokens_are_an_error(kind: str) -> None:
    with pytest.raises(ModelError, match=r"2 tokens for 3 experts .* give a larger batch"):
        make(kind)(tokens(1, 2))
    assert make("diffmoe").eval()(tokens(1, 2)).shape == (1, 2, DIM)  # inference needs no share


@pytest.mark.parametrize(("kind", "training", "rule"), MODES)
def test_sixteen_bits(kind: str, training: bool, rule: Any) -> None:
    layer = make(kind, dtype=torch.bfloat16).train(training)
    hidden = tokens(2, 6, dtype=torch.bfloat16)
    if rule:
        assert layer.tau.dtype == torch.float32
        layer.rule = rule
        layer.tau.fill_(0.5)
    exact = make(kind).train(training)
    exact.load_state_dict(layer.state_dict())
    if rule:
        exact.rule = rule
    said = layer(hidden)
    assert said.dtype == torch.bfloat16
    torch.testing.assert_close(said.double(), exact(hidden.double()), rtol=0.05, atol=0.02)
    if training:
        total = said.float().square().sum()
        if layer.auxiliary is not None:
            total = total + layer.auxiliary
        torch.autograd.backward(total)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_autocast() -> None:
    layer = make("diffmoe", dtype=torch.float32)
    hidden = tokens(2, 6, dtype=torch.float32)
    exact = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = layer(hidden)
    torch.testing.assert_close(said.float(), exact, rtol=0.05, atol=0.02)


def test_state_goes_round_before_the_first_forward() -> None:
    fresh, other = make("diffmoe", seed=0), make("diffmoe", seed=9)
    assert "tau" in fresh.state_dict()
    other.load_state_dict(fresh.state_dict())
    for step_ in range(3):
        assert torch.equal(fresh(tokens(2, 6, seed=step_)), other(tokens(2, 6, seed=step_)))
    assert torch.equal(fresh.tau, other.tau)
    third = make("diffmoe", seed=4).eval()
    third.load_state_dict(fresh.state_dict())
    assert torch.equal(third(tokens(2, 6)), fresh.eval()(tokens(2, 6)))
    assert fresh.tau.any()


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("moe") / "pipeline"
    model = awake()
    layers: Any = install(model, num_experts=4, capacity=2)
    for layer in layers:
        layer.tau.copy_(torch.tensor([0.4, 0.45, 0.5, 0.55]))
    save_moe(build_pipeline(model), folder)
    with torch.no_grad():
        return folder, step(model)


def test_pipeline_comes_back_from_disk(saved: tuple[Path, Tensor]) -> None:
    folder, said = saved
    pipe = load_moe(folder)
    with torch.no_grad():
        assert torch.equal(step(pipe.transformer), said)
    layers: Any = moe_layers(pipe.transformer)
    assert [layer.capacity for layer in layers] == [2.0] * 3
    assert layers[0].tau.tolist() == pytest.approx([0.4, 0.45, 0.5, 0.55])
    with recorded_usage(pipe.transformer) as calls:
        images = pipe(
            class_labels=[3], num_inference_steps=3, guidance_scale=2.0, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    assert images.shape == (1, 8, 8, 1)
    assert len(calls) == 3
    with pytest.raises(ModelError, match="loaded with its experts"):
        uninstall(pipe.transformer)
    assert load_moe(folder, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def rewrite(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "moe.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "moe.json").unlink(), "has no moe.json"),
        (lambda folder: (folder / "moe.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "moe.json").write_text("[]"), r"has format \[\]"),
        (rewrite(format=2), "has format 2, this mnemon reads 1"),
        (rewrite(kind="soft"), "has kind 'soft'"),
        (rewrite(num_experts="4"), "expected num_experts"),
        (rewrite(blocks=["a"]), "expected num_experts"),
        (rewrite(num_experts=8), r"bias_in: \(4, 256\), expected \(8, 256\)"),
        (rewrite(kind="token_choice", capacity=1), "predictor.* expected nothing"),
        (rewrite(blocks=[1, 3]), r"blocks.5.ff.* and \d+ more"),
        (rewrite(blocks=[9]), r"blocks \[9\]"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "no transformer/config"),
        (
            lambda folder: os.truncate(
                folder / "transformer" / "diffusion_pytorch_model.safetensors", 1000
            ),
            "is damaged",
        ),
    ],
)
def test_damaged_folders(
    saved: tuple[Path, Tensor], tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    change(folder)
    with pytest.raises(ModelError, match=words):
        load_moe(folder)


def test_save_refuses_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no experts"):
        save_moe(build_pipeline(build_transformer("tiny")), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


# -- training --------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "size": "tiny", "objective": "flow", "batch": 4, "steps": 3, "device": "cpu",
}  # fmt: skip


def test_dense_step_is_a_plain_step(tmp_path: Path) -> None:
    """Bit for bit what the trainer did before it knew of processes and experts."""
    trainer = Trainer(TrainOptions(out=tmp_path, **SMALL))
    model = build_transformer("tiny")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    digits = load_digits()
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(len(digits.labels), (4,), generator=generator)
        dropped = torch.rand(4, generator=generator) < 0.1
        labels = digits.labels[rows].masked_fill(dropped, NO_CLASS)
        inputs, steps, target = noised(digits.images[rows], "flow", generator)
        rate = min(1.0, (number + 1) / 100)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * number / 3))
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        loss = F.mse_loss(model(inputs, timestep=steps, class_labels=labels).sample, target)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        assert trainer.train_step() == loss.item()
    ours, theirs = trainer.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not {"experts", "moe"} & trainer._identity().keys()  # as in checkpoints of before


def test_command_line_trains_experts(tmp_path: Path) -> None:
    given = [
        "--out", str(tmp_path), "--size", "tiny", "--objective", "flow", "--batch", "4",
        "--device", "cpu", "--experts", "4",
    ]  # fmt: skip
    main([*given, "--steps", "2"])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    name = "transformer_blocks.1.ff."
    assert (state["model"][f"{name}tau"] > 0).all()
    pipe = load_moe(tmp_path / "pipeline")
    layers: Any = moe_layers(pipe.transformer)
    assert [(layer.kind, layer.num_experts, layer.training) for layer in layers] == 3 * [
        ("diffmoe", 4, False)
    ]
    torch.testing.assert_close(layers[0].tau, state["average"][f"{name}tau"])
    learned = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert (learned["experts"], learned["moe"]) == (4, "diffmoe")
    # The predictor has learned: only the further loss could teach it.
    before = make_trainer(TrainOptions(out=tmp_path / "fresh", **SMALL, experts=4))
    fresh = before.model.state_dict()[f"{name}predictor.2.weight"]
    assert not torch.equal(fresh, state["model"][f"{name}predictor.2.weight"])
    with pytest.raises(ZooError, match=r"'experts': 4.*'moe': 'diffmoe'"):
        main([*given, "--steps", "2", "--resume", "--moe", "token_choice"])


def kth(layer: DiffMoE, hidden: Tensor) -> Tensor:
    return layer.predictor(hidden.flatten(0, 1)).sigmoid().sort(0).values[-4]


def one_rank(rank: int, folder: str) -> None:
    """What each of two processes does in the test below."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    found: dict[str, Any] = {}
    pool = make("diffmoe")
    for number in range(3):
        pool(tokens(2, 6, seed=10 * rank + number))
    found["tau"] = pool.tau
    choice = make("token_choice")
    choice(tokens(2, 6, seed=rank))
    found["balance"] = choice.auxiliary.item()
    dense = Trainer(TrainOptions(out=Path(folder) / "two", **SMALL))
    found["losses"] = [dense.train_step() for _ in range(3)]
    found["weights"] = dense.model.state_dict()
    with pytest.raises(ZooError, match="a batch of 3 came for 2 processes"):
        Trainer(TrainOptions(out=Path(folder) / "odd", **SMALL | {"batch": 3}))
    mixture = make_trainer(TrainOptions(out=Path(folder) / "moe", **SMALL, experts=4))
    mixture.run(quiet=True)
    found["mixture"] = mixture.model.state_dict()
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    other = torch.multiprocessing.get_context("spawn").Process(
        target=one_rank, args=(1, str(tmp_path))
    )
    other.start()
    try:
        one_rank(0, str(tmp_path))
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    layer, tau = make("diffmoe"), torch.zeros(3, dtype=torch.float64)
    for number in range(3):
        seen = [kth(layer, tokens(2, 6, seed=10 * rank + number)) for rank in (0, 1)]
        tau = 0.95 * tau + 0.05 * (seen[0] + seen[1]) / 2
    assert not torch.allclose(*seen)
    torch.testing.assert_close(first["tau"], tau)
    assert torch.equal(first["tau"], second["tau"])

    whole = make("token_choice")
    whole(torch.cat([tokens(2, 6, seed=rank) for rank in (0, 1)]))
    mean = (first["balance"] + second["balance"]) / 2
    assert mean == pytest.approx(whole.auxiliary.item(), rel=1e-12)
    assert first["balance"] != second["balance"]

    alone = Trainer(TrainOptions(out=tmp_path / "one", **SMALL))
    losses = [alone.train_step() for _ in range(3)]
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    for part in ("weights", "mixture"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-5)
    assert (first["mixture"]["transformer_blocks.1.ff.tau"] > 0).all()
    assert len(moe_layers(load_moe(tmp_path / "moe" / "pipeline").transformer)) == 3
