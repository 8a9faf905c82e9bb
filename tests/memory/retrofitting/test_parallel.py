"""The parallel form against loops, and against the cache it stands for."""

from __future__ import annotations

import pytest
import torch
from deciding import METHODS, control, deciding_model, dmc_cache, dms_cache, mean_of_segment
from deciding import some_ids as ids_of
from torch import Tensor

import mnemon
from mnemon.layers.compressing import CompressingLayer
from mnemon.memory.retrofitting.decisions import borrow, decision_logits, merge_weights
from mnemon.memory.retrofitting.parallel import drop_scores, pool, shift_left
from mnemon.memory.retrofitting.parts import valid_tokens

SPLITS = ([61], [1] * 61, [20, 1, 1, 17, 1, 21], [5, 30, 26])
PADDED_SPLITS = ([40], [25, *[1] * 15], [5, 30, 5], [14, 1, 1, 24], [*[1] * 20, 20])
methods = pytest.mark.parametrize(("method", "window"), METHODS)


@pytest.mark.parametrize("window", [1, 2, 3, 12, 100])
def test_pool_is_the_mean_of_the_segment_within_the_window(window: int) -> None:
    generator = torch.Generator().manual_seed(window)
    x = torch.randn(2, 3, 60, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 3, 60, generator=generator, dtype=torch.float64) + 0.1
    merged = (torch.rand(2, 3, 60, generator=generator) < 0.85).to(torch.float64)
    merged[..., 0] = 0
    runs = merged[0, 0].tolist()
    assert "1" * 13 in "".join(str(int(one)) for one in runs) or window < 12
    got = pool(x, weights, merged, window)
    for row in range(2):
        for head in range(3):
            place = row, head
            expected = mean_of_segment(x[place], weights[place], merged[place], window)
            torch.testing.assert_close(got[place], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pool_without_merging_is_bit_for_bit_what_came(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 30, 8, dtype=dtype)
    weights = torch.rand(1, 2, 30, dtype=dtype) + 1e-6
    assert torch.equal(pool(x, weights, torch.zeros(1, 2, 30, dtype=dtype), 12), x)


@pytest.mark.parametrize("window", [0, 1, 4, 30])
def test_the_mask_of_dms_shows_what_its_cache_holds(window: int) -> None:
    marks = torch.rand(24, generator=torch.Generator().manual_seed(3)) < 0.6
    log_kept = torch.zeros(1, 1, 24).masked_fill(marks, -torch.inf)
    scores = drop_scores(shift_left(log_kept), window, 24)
    for query in range(24):
        seen = (scores[0, 0, query] == 0).nonzero().flatten().tolist()
        assert seen == dms_cache(marks, window, query)
        assert set(range(max(0, query - window), query + 1)) <= set(seen)


def test_the_mask_of_dmc_shows_the_newest_token_of_every_slot() -> None:
    merged = torch.rand(24, generator=torch.Generator().manual_seed(4)) < 0.6
    log_kept = torch.zeros(1, 1, 24).masked_fill(merged, -torch.inf)
    scores = drop_scores(shift_left(log_kept), 0, 24)
    for query in range(24):
        seen = (scores[0, 0, query] == 0).nonzero().flatten().tolist()
        assert seen == dmc_cache(merged, query)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@methods
def test_all_at_once_is_the_cache_token_by_token(family: str, method: str, window: int) -> None:
    more = {"sliding_window": 9} if family == "mistral" else {}
    model = deciding_model(family, method, window, **more)
    ids = ids_of(3, 61)
    with torch.no_grad():
        control(model).recording = True
        expected = model(ids, use_cache=False).logits
        decided = dict(control(model).records)
        assert 0.25 < float(control(model).fraction()) < 0.9
        for split in SPLITS:
            cache = mnemon.Cache(model.config)
            got = feed(model, cache, ids, split)
            assert (got - expected).abs().max() < 1e-12
            for index, layer in enumerate(cache.layers):
                assert isinstance(layer, CompressingLayer)
                if not more:
                    assert torch.equal(layer.head_lengths(), slots(decided[index], method, window))
            if not more:
                lengths = sum(int(layer.head_lengths().sum()) for layer in cache.layers)
                itemsize, width = 8, 16
                assert cache.nbytes - beside(cache) == lengths * itemsize * width


def slots(decided: Tensor, method: str, window: int) -> Tensor:
    """Slots of every row and head after all tokens: sum(1 - alpha), plus the window of DMS."""
    if method == "dmc":
        return (1 - decided).sum(-1).to(torch.int32)
    left = max(0, decided.shape[-1] - window - 1)
    kept = (1 - decided[..., 1 : left + 1]).sum(-1)
    return (kept + min(decided.shape[-1], window + 1)).to(torch.int32)


def beside(cache: mnemon.Cache) -> int:
    """Bytes of what lies beside slots: marks, and the raw numbers of a few tokens."""
    names = ("marks", "carry")
    states = [layer.state().tensors for layer in cache.layers]
    return sum(state[n].numel() * state[n].element_size() for state in states for n in names
               if n in state)  # fmt: skip


def feed(model: torch.nn.Module, cache: mnemon.Cache, ids: Tensor, split: list[int]) -> Tensor:
    outs, start = [], 0
    for count in split:
        outs.append(model(ids[:, start : start + count], past_key_values=cache).logits)
        start += count
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@methods
def test_padding_takes_no_slot_and_changes_nothing(
    method: str, window: int, implementation: str
) -> None:
    model = deciding_model("llama", method, window, attn_implementation=implementation)
    long, short = ids_of(1, 40, 1), ids_of(1, 27, 2)
    ids = torch.zeros(2, 40, dtype=torch.int64)
    ids[0], ids[1, 13:] = long[0], short[0]
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = [model(one, use_cache=False).logits[0] for one in (long, short)]
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert (whole[0] - alone[0]).abs().max() < 1e-12
        assert (whole[1, 13:] - alone[1]).abs().max() < 1e-12
        for split in PADDED_SPLITS:
            cache, outs, start = mnemon.Cache(model.config), [], 0
            for count in split:
                stop = start + count
                step = model(
                    ids[:, start:stop], attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop], past_key_values=cache,
                )  # fmt: skip
                outs.append(step.logits)
                start = stop
            got = torch.cat(outs, dim=1)
            assert (got[0] - alone[0]).abs().max() < 1e-12
            assert (got[1, 13:] - alone[1]).abs().max() < 1e-12
            assert cache.num_tokens == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "window"), [("dms", 4), ("dmc", 12)])
def test_float32_and_bfloat16_stay_near(method: str, window: int, dtype: torch.dtype) -> None:
    # Small weights: chaos is not what this is about. Decisions are those of float64.
    model = deciding_model("llama", method, window, dtype=dtype, initializer_range=0.02)
    ids = ids_of(2, 50)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = feed(model, mnemon.Cache(model.config), ids, [30, *[1] * 20])
    within = 2e-5 if dtype == torch.float32 else 2e-2
    assert (got - expected).abs().max() < within * float(expected.abs().max())


def test_heads_of_a_group_share_decisions_and_the_borrowed_neuron_adds_nothing() -> None:
    dmc = control(deciding_model(method="dmc", window=12)).compression
    query, keys = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8)
    logits = decision_logits(dmc, query, keys, None)
    assert logits.shape == (2, 3, 5)
    assert torch.equal(logits, keys[..., -1] + dmc.offset)
    weights = merge_weights(query, 3)
    expected = torch.sigmoid(query[..., -1].view(2, 3, 2, 5).mean(2) + 5) + 1e-6
    torch.testing.assert_close(weights, expected)
    lent_query, lent_keys = borrow(dmc, query, keys)
    plain = query[..., :-1] @ keys[..., :-1].repeat_interleave(2, dim=1).transpose(-1, -2)
    lent = lent_query @ lent_keys.repeat_interleave(2, dim=1).transpose(-1, -2)
    torch.testing.assert_close(lent, plain)

    dms = control(deciding_model(method="dms", window=4, source="neuron")).compression
    logits = decision_logits(dms, query, keys, None)
    assert torch.equal(logits, query[:, ::2, :, -1] * dms.factor + dms.offset)
    lent_query, lent_keys = borrow(dms, query, keys)
    assert torch.equal(lent_keys, keys)
    assert torch.equal(lent_query[:, 1::2], query[:, 1::2])
    assert not lent_query[:, ::2, :, -1].any()


@pytest.mark.parametrize(("method", "window"), [("dms", 3), ("dmc", 12)])
def test_a_neuron_as_source_equals_its_cache_too(method: str, window: int) -> None:
    model = deciding_model("qwen3", method, window, source="neuron")
    ids = ids_of(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = feed(model, mnemon.Cache(model.config), ids, [13, *[1] * 10, 17])
    assert (got - expected).abs().max() < 1e-12


def test_valid_tokens_of_masks() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    padded = causal & torch.tensor([False, False, True, True])
    everything = padded | ~padded.any(-1, keepdim=True)  # releases that let no row be blind
    for row in (padded, everything):
        got = valid_tokens(torch.stack([causal, row])[:, None], 4)
        assert got is not None
        assert got.tolist() == [[True] * 4, [False, False, True, True]]
    assert valid_tokens(causal[None, None], 4) is None
    blind = torch.zeros(4, 4, dtype=torch.bool)
    both = valid_tokens(torch.stack([causal, blind])[:, None], 4)
    assert both is not None
    assert both[1].tolist() == [False] * 4
