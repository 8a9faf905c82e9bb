"""The verbs of a layer under a policy: what it knows of its tokens follows each of them."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mnemon.attention import attend
from mnemon.errors import CacheError, RecipeError, UnsupportedVerb
from mnemon.hf.kinds import LayerSpec
from mnemon.layers import DenseLayer, HybridLayer, LayerState, SharedLayer, WindowLayer
from mnemon.policies import PolicyLayer, build_all, policy_of
from mnemon.recipe import parse

HEADS, KV_HEADS, WIDTH = 4, 2, 8
RECIPES = [
    "window(8, every=1)",
    "sinks(2) + window(6, every=2)",
    "random(keep=8)",
    "h2o(keep=8)",
    "tova(keep=8, every=1)",
]
every_recipe = pytest.mark.parametrize("text", RECIPES)
SCORED = [text for text in RECIPES if text.startswith(("h2o", "tova"))]


def made(text: str) -> PolicyLayer:
    (layer,) = build_all([LayerSpec()], parse(text))
    assert isinstance(layer, PolicyLayer)
    return layer


def numbers(seed: int, rows: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a row whatever the number of rows."""
    parts = []
    for row in range(rows):
        draw = torch.Generator().manual_seed(1000 * seed + row)
        parts.append(torch.randn(HEADS + 2 * KV_HEADS, count, WIDTH, generator=draw))
    return torch.stack(parts).split([HEADS, KV_HEADS, KV_HEADS], 1)  # type: ignore[return-value]


def feed(layer: PolicyLayer, seed: int, rows: int, count: int, padding: int = 0) -> Tensor:
    """Append and attend; the first `padding` new tokens of row 0 are none."""
    query, keys, values = numbers(seed, rows, count)
    return feed_these(layer, query, keys, values, padding)


def feed_these(
    layer: PolicyLayer, query: Tensor, keys: Tensor, values: Tensor, padding: int = 0
) -> Tensor:
    count = keys.shape[2]
    past = layer.mask_sizes(count)[0] - count
    mask = None
    if padding:
        mask = torch.ones(count, past + count, dtype=torch.bool).tril(past)
        mask = mask[None, None].repeat(keys.shape[0], 1, 1, 1)
        mask[0, :, :, past : past + padding] = False
    return attend(query, *layer.append(keys, values), mask=mask, causal=mask is None)


def same(one: PolicyLayer, other: PolicyLayer) -> None:
    """Both hold the same, and go on alike."""
    assert json.dumps(one.state().meta) == json.dumps(other.state().meta)
    for (name, a), (again, b) in zip(
        one.state().tensors.items(), other.state().tensors.items(), strict=True
    ):
        assert name == again
        assert torch.equal(a, b)
    assert one.nbytes == other.nbytes
    rows = one.batch_size
    for seed in range(50, 56):
        assert torch.equal(feed(one, seed, rows, 2), feed(other, seed, rows, 2))
    for a, b in zip(one.view() or (), other.view() or (), strict=True):
        assert torch.equal(a, b)


@every_recipe
@pytest.mark.parametrize("padding", [0, 3, 11])
def test_forks_and_states(text: str, padding: int) -> None:
    layer = made(text)
    feed(layer, 0, 3, 12, padding)
    for seed in range(1, 5):
        feed(layer, seed, 3, 1)
    for copy in (_forked, _saved):
        one, other = layer.fork(), copy(layer)
        feed(layer.fork(), 9, 3, 5)
        same(one, other)


def _forked(layer: PolicyLayer) -> PolicyLayer:
    return layer.fork()


def _saved(layer: PolicyLayer) -> PolicyLayer:
    state = layer.state()
    other = PolicyLayer(DenseLayer(), layer.policy, layer.layer_index)
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    meta = json.loads(json.dumps(dict(state.meta)))
    other.load_state(LayerState(kind=state.kind, tensors=tensors, meta=meta, parts=state.parts))
    return other


@every_recipe
def test_rows(text: str) -> None:
    """After a reorder, a row goes on as the row that it now is."""
    rows = [2, 0, 0]
    one, other = made(text), made(text)
    query, keys, values = numbers(0, 3, 12)
    feed_these(one, query, keys, values)
    feed_these(other, query[rows], keys[rows], values[rows])
    one.reorder(torch.tensor(rows))
    same(one, other)
    picked = made(text)
    feed_these(picked, query[rows[:1]], keys[rows[:1]], values[rows[:1]])
    fresh = made(text)
    feed_these(fresh, query, keys, values)
    same(fresh.extract(2), picked.fork())
    chosen = made(text)
    feed_these(chosen, query, keys, values)
    chosen.select(torch.tensor([2]))
    same(chosen, picked.fork())
    picked.repeat(2)
    both = made(text)
    feed_these(both, query[[2, 2]], keys[[2, 2]], values[[2, 2]])
    same(picked, both)


@every_recipe
def test_one_row_serves_a_batch(text: str) -> None:
    one, other = made(text), made(text)
    query, keys, values = numbers(0, 1, 12)
    feed_these(one, query, keys, values)
    feed_these(other, *(x.repeat(3, 1, 1, 1) for x in (query, keys, values)))
    same_after = numbers(1, 3, 1)
    assert torch.equal(feed_these(one, *same_after), feed_these(other, *same_after))
    same(one, other)


@every_recipe
@pytest.mark.parametrize("lengths", [(5, 7), (7, 7)])
def test_merged_rows_go_on_as_alone(text: str, lengths: tuple[int, int]) -> None:
    layers, alone = [], []
    for row, length in enumerate(lengths):
        layer = made(text)
        query, keys, values = (x[row : row + 1] for x in numbers(0, 2, length))
        feed_these(layer, query, keys, values)
        layers.append(layer)
        alone.append(layer.fork())
    merged = layers[0].merge(layers[1:])
    assert merged.num_stored == 7
    short = 7 - lengths[0]
    for seed in range(1, 9):
        query, keys, values = numbers(seed, 2, 1)
        length, offset = merged.mask_sizes(1)
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        mask[0, :, :, : max(0, short - offset)] = False
        got = attend(query, *merged.append(keys, values), mask=mask)
        if "every=1" not in text:
            continue  # drops come at other times: padding is held as well
        for row, layer in enumerate(alone):
            own = slice(row, row + 1)
            expected = feed_these(layer, query[own], keys[own], values[own])
            torch.testing.assert_close(got[own], expected, rtol=1e-4, atol=1e-5)
    assert merged.num_stored <= 8
    with pytest.raises(CacheError, match="keep"):
        merged.merge([merged.fork()])


def test_merge_wants_the_same_settings() -> None:
    one, other = made("window(8)"), made("window(9)")
    for layer in (one, other):
        feed(layer, 0, 1, 4)
    with pytest.raises(CacheError, match="other settings"):
        one.merge([other])
    with pytest.raises(CacheError, match="kinds"):
        one.merge([made("random(keep=8)")])


# -- going back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["window(8)", "random(keep=8)", "tova(keep=8)"])
def test_crop_leaves_no_trace(text: str) -> None:
    one, other = made(text), made(text)
    feed(one, 0, 2, 5)
    feed(other, 0, 2, 5)
    feed(one, 1, 2, 2)
    assert one.can_crop(2)
    one.crop(2)
    same(one, other)
    assert not one.can_crop(1)  # tokens were dropped after it came
    with pytest.raises(CacheError, match="last dropped"):
        one.crop(1)
    assert one.can_crop(0)


def test_sums_cannot_be_taken_back() -> None:
    layer = made("h2o(keep=100)")
    feed(layer, 0, 2, 5)
    assert not layer.can_crop(1)
    assert not layer.is_croppable
    with pytest.raises(CacheError, match="scores of h2o"):
        layer.crop(1)
    layer.crop(0)


@pytest.mark.parametrize("text", SCORED)
def test_recording_is_refused_where_queries_choose(text: str) -> None:
    layer = made(text)
    with pytest.raises(UnsupportedVerb, match="Assisted decoding"):
        layer.set_recording(True)
    layer.set_recording(False)


@pytest.mark.parametrize("text", ["window(8, every=1)", "random(keep=8, every=1)"])
def test_recording_waits_with_dropping(text: str) -> None:
    """Tokens that are taken back leave no trace, though more was held meanwhile than allowed."""
    one, other = made(text), made(text)
    one.set_recording(True)
    assert one.is_recording
    for seed, (kept, taken) in enumerate([(12, 0), (2, 3), (1, 4), (5, 0)]):
        query, keys, values = numbers(seed, 2, kept + taken)
        feed_these(one, query, keys, values)
        assert one.num_stored >= kept + taken
        one.crop(taken)
        assert one.num_stored == 8
        for first in range(kept):
            part = [x[:, :, first : first + 1] for x in (query, keys, values)]
            feed_these(other, *part)
    assert one.num_tokens == other.num_tokens == 20
    for a, b in zip(one.view() or (), other.view() or (), strict=True):
        assert torch.equal(a, b)
    one.set_recording(False)
    feed(one, 40, 2, 3)
    assert one.num_stored == 8


def test_recording_is_bounded() -> None:
    layer = made("window(8)")
    layer.set_recording(True)
    feed(layer, 0, 1, 1100)
    assert layer.num_stored == 1100
    feed(layer, 1, 1, 3)
    assert layer.num_stored <= 8 + 3
    layer.set_recording(False)
    assert layer.num_stored <= 8


# -- what nobody told ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", RECIPES[:3])
def test_filled_by_hand_it_drops_at_the_next_append(text: str) -> None:
    layer, told = made(text), made(text)
    for seed in range(6):
        _, keys, values = numbers(seed, 2, 5)
        length, offset = layer.mask_sizes(5)
        assert length + offset == layer.num_tokens + 5
        got = layer.append(keys, values)
        assert got[0].shape[2] == length
        assert length <= 8 + 5
        feed(told, seed, 2, 5)
    assert layer.num_stored <= 8 + 5
    layer.set_recording(True)
    layer.set_recording(False)
    for a, b in zip(layer.view() or (), told.view() or (), strict=True):
        assert torch.equal(a, b)


@every_recipe
def test_an_attention_that_tells_nothing_is_an_error(text: str) -> None:
    layer = made(text)
    _, keys, values = numbers(0, 2, 6)
    layer.append(keys, values)[0].sum()
    feed(layer, 1, 2, 1)  # below the bound nothing is needed
    with pytest.raises(CacheError, match=r"mnemon\.attach\(model\)"):
        feed(layer, 2, 2, 9)
    before = layer.num_stored
    _, keys, values = numbers(3, 2, 1)
    if not text.startswith("tova"):
        with pytest.raises(CacheError, match="reset"):
            layer.append(keys, values)
        assert layer.num_stored == before
    layer.reset()
    feed(layer, 1, 2, 12)
    assert layer.num_stored <= 8


def test_a_bias_by_position_is_an_error_once_tokens_have_to_go() -> None:
    layer = made("window(8)")
    query, keys, values = numbers(0, 1, 6)
    bias = torch.randn(1, HEADS, 6, 6)
    attend(query, *layer.append(keys, values), bias=bias, causal=True)
    with pytest.raises(CacheError, match="by position"):
        feed(layer, 1, 1, 6)


def test_a_second_reader_of_the_same_keys_tells_nothing_new() -> None:
    """Layers that share keys (Gemma 3n) attend to them after the tokens were dropped."""
    layer = made("h2o(keep=8)")
    query, keys, values = numbers(0, 1, 20)
    pair = layer.append(keys, values)
    first = attend(query, *pair, causal=True)
    scores = layer.state().tensors["scores"].clone()
    assert layer.num_stored == 8
    assert torch.equal(attend(query, *pair, causal=True), first)
    assert torch.equal(layer.state().tensors["scores"], scores)


# -- files, building -------------------------------------------------------------------------------


def _other(state: LayerState, **changes: object) -> LayerState:
    fields = {
        "kind": state.kind, "tensors": state.tensors, "meta": state.meta, "parts": state.parts,
    } | changes  # fmt: skip
    return LayerState(**fields)  # type: ignore[arg-type]


BAD: list[Callable[[LayerState], LayerState]] = [
    lambda state: _other(state, kind="window"),
    lambda state: _other(state, parts=()),
    lambda state: _other(state, meta={}),
    lambda state: _other(state, meta={**state.meta, "layer_index": 7}),
    lambda state: _other(state, meta={**state.meta, "num_unseen": -1}),
    lambda state: _other(state, meta={**state.meta, "num_since_drop": 99}),
    lambda state: _other(state, meta={**state.meta, "is_biased": 1}),
    lambda state: _other(state, tensors={}),
    lambda state: _other(state, tensors={**state.tensors, "more": torch.zeros(1)}),
    lambda state: _other(
        state, tensors={**state.tensors, "scores": state.tensors["scores"][:, :, :1]}
    ),
    lambda state: _other(
        state, tensors={k: v for k, v in state.tensors.items() if k != "num_padding"}
    ),
]


@pytest.mark.parametrize("change", range(len(BAD)))
def test_states_that_contradict_themselves(change: int) -> None:
    layer = made("h2o(keep=8)")
    feed(layer, 0, 2, 12, 11)
    good = layer.state()
    assert set(good.tensors) == {"scores", "hidden", "num_padding"}
    other = made("h2o(keep=8)")
    feed(other, 5, 2, 3)
    before = other.num_stored
    with pytest.raises(CacheError):
        other.load_state(BAD[change](good))
    assert other.num_stored == before
    other.load_state(good)
    same(layer, other)


def test_other_settings_are_another_cache() -> None:
    layer = made("h2o(keep=8)")
    feed(layer, 0, 2, 4)
    for text in ("h2o(keep=9)", "h2o(keep=8, recent=0.25)", "tova(keep=8)"):
        with pytest.raises(CacheError):
            made(text).load_state(layer.state())


def test_only_layers_that_keep_every_token_are_put_under_a_policy() -> None:
    specs = [
        LayerSpec(),
        LayerSpec(window=4),
        LayerSpec(attends=False),
        LayerSpec(num_states=1),
        LayerSpec(attends=False, num_states=1),
        LayerSpec(window=4, num_states=1),
    ]
    layers = build_all(specs, parse("window(8)"))
    assert [type(layer) for layer in layers[:3]] == [PolicyLayer, WindowLayer, SharedLayer]
    kinds = [layer.attention.kind for layer in layers if isinstance(layer, HybridLayer)]
    assert kinds == ["window_sinks", "window"]
    assert layers[4].kind == "recurrent"
    for spec in (
        LayerSpec(indexed=True),
        LayerSpec(counts_keys=True),
        LayerSpec(foreign=lambda: None),
    ):
        with pytest.raises(RecipeError, match="no token may go"):
            build_all([spec], parse("window(8)"))


def test_policies_are_settings() -> None:
    policy = policy_of(parse("random(keep=0.25, seed=4)"))
    assert policy == policy_of(parse("random(seed=4, keep=0.25)"))
    assert policy is not None
    with pytest.raises(AttributeError):
        policy.seed = 3  # type: ignore[attr-defined, misc]
    assert policy_of(parse("int4")) is None
