"""Each policy against loops over lists: what attention gives, and which tokens stay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.attention import attend
from mnemon.hf.attention_functions import attention_forward, eager_attention_forward
from mnemon.layers import DenseLayer
from mnemon.policies import PolicyLayer, Random, policy_of
from mnemon.recipe import parse
from policies.reference import Reference, mask_of, padded_turns

BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 8
GROUP = HEADS // KV_HEADS
LAYER = 5

RECIPES = {
    "window(5, every=1)": ("window", 5, 0),
    "sinks(2) + window(4, every=1)": ("window", 4, 2),
    "random(keep=5, seed=3, every=1)": ("random", 5, 0),
    "h2o(keep=6, every=1)": ("h2o", 6, 0),
    "h2o(keep=6, every=1, recent=0.0)": ("h2o", 6, 0),
    "tova(keep=5, every=1)": ("tova", 5, 0),
    "window(0.5, every=1)": ("window", 0.5, 0),
    "h2o(keep=0.5, every=3)": ("h2o", 0.5, 0),
    "tova(keep=0.4)": ("tova", 0.4, 0),
    "h2o(keep=6, every=4)": ("h2o", 6, 0),
}


class Module(torch.nn.Module):
    """What transformers' attention functions ask of an attention module."""

    is_causal = True
    num_key_value_groups = GROUP


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return attend(query, keys, values, mask=mask, causal=mask is None)


def _attached(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return attention_forward(Module(), query, keys, values, mask)[0].transpose(1, 2)


def _eager(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], keys.shape[2], dtype=torch.bool)
        mask = mask.tril(keys.shape[2] - query.shape[2])
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    scale = WIDTH**-0.5
    out = eager_attention_forward(Module(), query, keys, values, added, scaling=scale)[0]
    return out.transpose(1, 2)


def _repeated(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers calls torch: every key head repeated for its queries."""
    keys, values = (
        x[:, :, None, :, :].expand(-1, -1, GROUP, -1, -1).reshape(BATCH, HEADS, -1, WIDTH)
        for x in (keys, values)
    )
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal)


def _packed_heads(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """As newer releases decode: the queries of a group as rows."""
    if query.shape[2] > 1:
        return _grouped(query, keys, values, mask)
    rows = query.reshape(BATCH, KV_HEADS, GROUP, WIDTH)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return out.reshape(BATCH, HEADS, 1, WIDTH)


def _grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query=query, key=keys.contiguous(), value=values, attn_mask=mask, is_causal=causal,
        enable_gqa=True,
    )  # fmt: skip


ROUTES = [_attend, _attached, _eager, _repeated, _packed_heads, _grouped]
Route = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def made(text: str) -> tuple[PolicyLayer, Reference]:
    """An empty layer under a recipe's policy, and its loops."""
    recipe = parse(text)
    policy = policy_of(recipe)
    assert policy is not None
    name, keep, sinks = RECIPES[text]
    every = dict(recipe.policies[-1].options).get("every")

    def kept(seen: int) -> int:
        return keep if isinstance(keep, int) else max(1, int(keep * seen))

    def least(seen: int) -> int:
        step = kept(seen) // 16 if every is None else every - 1
        return sinks + max(1, kept(seen) - step)

    def luck(head: int, place: int) -> float:
        assert isinstance(policy, Random)
        return float(policy.first_scores(torch.tensor([[place]]), KV_HEADS, LAYER)[0, head, 0])

    reference = Reference(
        name,
        lambda seen: sinks + kept(seen),
        least,
        sinks=sinks,
        recent=getattr(policy, "recent", 0.5),
        luck=luck,
    )
    return PolicyLayer(DenseLayer(), policy, LAYER), reference


def numbers(seed: int, num_new: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, HEADS), (BATCH, KV_HEADS), (BATCH, KV_HEADS))
    query, keys, values = (torch.randn(*shape, num_new, WIDTH, generator=draw) for shape in shapes)
    return 2 * query, keys, values


ONE_OF_EACH = [*list(RECIPES)[:4], "tova(keep=5, every=1)"]
CASES = [(_attached, text, padding) for text in RECIPES for padding in ("none", "between")]
CASES += [(_attached, text, "left") for text in ONE_OF_EACH]
CASES += [(route, text, "between") for route in ROUTES[:-1] for text in ONE_OF_EACH[1:]]
CASES += [(route, text, "none") for route in ROUTES for text in ONE_OF_EACH[-2:]]


@pytest.mark.parametrize(("route", "text", "padding"), CASES)
def test_against_loops(route: Route, text: str, padding: str) -> None:
    layer, reference = made(text)
    hidden = torch.zeros(BATCH, 0, dtype=torch.bool)
    for seed, (num_new, before) in enumerate(padded_turns(padding)):
        query, keys, values = numbers(seed, num_new)
        new = torch.arange(num_new)[None] < torch.tensor(before)[:, None]
        hidden = torch.cat([hidden, new], 1)
        expected = reference.step(query, keys, values, new)
        mask = mask_of(layer, hidden, num_new)
        out = route(query, *layer.append(keys, values), mask)
        real = ~new[:, None, :, None].expand_as(out)
        torch.testing.assert_close(out[real], expected[real].float(), rtol=1e-4, atol=1e-5)
        stored = layer.view()
        assert stored is not None
        for got, held in zip(stored, reference.stored(), strict=True):
            assert torch.equal(got.double(), held)
        assert layer.num_tokens == hidden.shape[1]
        assert layer.num_stored <= layer.policy.bound.most(layer.num_tokens)
    assert layer.num_stored < layer.num_tokens


def test_a_random_choice_does_not_depend_on_the_batch() -> None:
    """The same row alone and behind padding keeps the same tokens."""
    text = "random(keep=5, seed=3, every=1)"
    alone, _ = made(text)
    both, _ = made(text)
    _, keys, values = numbers(0, 12)
    attend(torch.zeros(1, HEADS, 12, WIDTH), *alone.append(keys[:1], values[:1]), causal=True)
    padded = [torch.cat([x[1:, :, :4], x[:1]], 2) for x in (keys, values)]
    other = [torch.cat([x[1:, :, :4], x[1:]], 2) for x in (keys, values)]
    pair = both.append(*(torch.cat([a, b]) for a, b in zip(other, padded, strict=True)))
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[1, :4] = True
    mask = torch.ones(16, 16, dtype=torch.bool).tril()[None, None] & ~hidden[:, None, None]
    attend(torch.zeros(2, HEADS, 16, WIDTH), *pair, mask=mask)
    one, two = alone.view(), both.view()
    assert one is not None
    assert two is not None
    assert torch.equal(one[0][0], two[0][1])
    assert not torch.equal(one[0][0], two[0][0])


def test_luck_is_uniform() -> None:
    policy = policy_of(parse("random(keep=5)"))
    assert policy is not None
    drawn = policy.first_scores(torch.arange(20000)[None], 4, 7)
    assert drawn.shape == (1, 4, 20000)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    shares = torch.histc(drawn, bins=10, min=0, max=1) / drawn.numel()
    assert float((shares - 0.1).abs().max()) < 0.005
    rows = drawn[0] - drawn[0].mean(-1, keepdim=True)
    assert (
        float((rows @ rows.T / rows.square().sum(-1).mean()).fill_diagonal_(0).abs().max()) < 0.03
    )
    later = policy.first_scores(torch.arange(20000)[None], 4, 8)
    assert float((later == drawn).float().mean()) < 0.001
