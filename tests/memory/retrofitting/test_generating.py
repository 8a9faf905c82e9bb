"""Retrofitted models through plain `generate`, and every verb of their caches on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deciding import deciding_model, some_ids
from torch import Tensor
from transformers import PreTrainedModel

import mnemon
from mnemon.errors import CacheError, LearnedMemoryError, RecipeError, UnsupportedVerb
from mnemon.layers import DMCLayer, DMSLayer
from mnemon.layers.compressing import Call, CompressingLayer

CASES = (
    ("llama", "dms", 4), ("llama", "dms", 0), ("llama", "dmc", 12),
    ("qwen3", "dms", 4), ("mistral", "dms", 3), ("mistral", "dmc", 12),
)  # fmt: skip
cases = pytest.mark.parametrize(("family", "method", "window"), CASES)


def build(family: str, method: str, window: int) -> PreTrainedModel:
    more = {"sliding_window": 11} if family == "mistral" else {}
    return deciding_model(family, method, window, dtype=torch.float64, **more)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Without a cache, all at once for every token."""
    for _ in range(count):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids


def padded_pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.zeros(2, ids.shape[1], dtype=torch.int64)
    pair[0], pair[1, 9:] = ids[0], ids[0, : ids.shape[1] - 9]
    mask = torch.ones_like(pair)
    mask[1, :9] = 0
    return pair, mask


@pytest.mark.parametrize("attached", [False, True])
@cases
def test_greedy_multi_turn_padding_and_beams(
    family: str, method: str, window: int, attached: bool
) -> None:
    model = build(family, method, window)
    ids = some_ids(1, 23)
    first = greedy(model, ids, 12)
    if attached:
        mnemon.attach(model)
    cache = mnemon.Cache(model.config)
    options = {"do_sample": False}
    got = model.generate(ids, past_key_values=cache, max_new_tokens=12, **options)
    assert torch.equal(got, first)
    turn = torch.cat([got, some_ids(1, 5, 7)], dim=1)
    got = model.generate(
        turn, attention_mask=torch.ones_like(turn), past_key_values=cache, max_new_tokens=7,
        **options,
    )  # fmt: skip
    assert torch.equal(got, greedy(model, turn, 7))

    pair, mask = padded_pair(ids)
    cache = mnemon.Cache(model.config)
    got = model.generate(
        pair, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **options
    )
    assert torch.equal(got[:1], first)
    assert torch.equal(got[1:, 9:], greedy(model, ids[:, :14], 12))

    beams = {"num_beams": 3, "max_new_tokens": 9, "attention_mask": mask, **options}
    cache = mnemon.Cache(model.config)
    with_cache = model.generate(pair, past_key_values=cache, **beams)
    assert torch.equal(with_cache, model.generate(pair, use_cache=False, **beams))


@cases
def test_drafts_go_back(family: str, method: str, window: int) -> None:
    model, assistant = build(family, method, window), build(family, "dms", 100)
    mnemon.memory.detach_compression(assistant)
    ids = some_ids(1, 23)
    expected = greedy(model, ids, 14)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        cache = mnemon.Cache(model.config)
        # 4.57 cannot look up drafts without a token that ends: one that never comes.
        got = model.generate(
            ids, past_key_values=cache, max_new_tokens=14, do_sample=False, eos_token_id=999, **more
        )
        assert torch.equal(got, expected)


@cases
def test_recorded_calls_are_taken_back_exactly(family: str, method: str, window: int) -> None:
    model, ids = build(family, method, window), some_ids(2, 60)
    with torch.no_grad():
        cache = mnemon.Cache(model.config)
        model(ids[:, :20], past_key_values=cache)
        cache.activate_past_recording()
        start = 20
        for count, back in ((7, 3), (1, 1), (12, 9), (20, 20), (1, 0), (4, 2)):
            model(ids[:, start : start + count], past_key_values=cache)
            cache.crop(-back)
            start += count - back
            assert cache.num_tokens == start
        model(ids[:, start : start + 2], past_key_values=cache)
        model(ids[:, start + 2 : start + 3], past_key_values=cache)
        cache.crop(-3)
        again = model(ids[:, start : start + 10], past_key_values=cache).logits
        fresh = mnemon.Cache(model.config)
        model(ids[:, :start], past_key_values=fresh)
        expected = model(ids[:, start : start + 10], past_key_values=fresh).logits
        for one, other in zip(cache.layers, fresh.layers, strict=True):
            assert torch.equal(one.head_lengths(), other.head_lengths())
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_what_was_not_recorded_is_refused_and_nothing_changes() -> None:
    model, ids = build("llama", "dmc", 12), some_ids(1, 30)
    cache = mnemon.Cache(model.config)
    with torch.no_grad():
        # Releases that do not announce drafts record the last call.
        model(ids[:, :29], past_key_values=cache)
        model(ids[:, 29:], past_key_values=cache)
    before = cache.nbytes, cache.num_tokens
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(UnsupportedVerb):
        cache.layers[0].keep(torch.arange(3))
    assert (cache.nbytes, cache.num_tokens) == before


@cases
def test_rows_files_and_forks_go_on_alike(
    family: str, method: str, window: int, tmp_path: Path
) -> None:
    model, ids = build(family, method, window), some_ids(3, 50)
    rest = ids[:, 30:]
    with torch.no_grad():
        cache = mnemon.Cache(model.config)
        model(ids[:, :30], past_key_values=cache)
        expected = model(rest, past_key_values=cache.fork()).logits

        cache.save(tmp_path / "cache", model=model)
        loaded = mnemon.load_cache(tmp_path / "cache", model)
        assert loaded.nbytes == cache.nbytes
        got = model(rest, past_key_values=loaded).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

        order = torch.tensor([2, 0, 0])
        moved = cache.fork()
        moved.reorder_cache(order)
        got = model(rest[order], past_key_values=moved).logits
        torch.testing.assert_close(got, expected[order], rtol=1e-5, atol=1e-5)

        alone = [cache.extract(row) for row in range(3)]
        for row, one in enumerate(alone):
            got = model(rest[row : row + 1], past_key_values=one.fork()).logits
            torch.testing.assert_close(got, expected[row : row + 1], rtol=1e-5, atol=1e-5)
        merged = mnemon.Cache.merge(alone)
        got = model(rest, past_key_values=merged).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        # All of that left the first one as it was.
        got = model(rest, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "window"), [("dms", 4), ("dmc", 12)])
def test_without_the_native_kernel_the_slots_are_the_same(
    method: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("mistral", method, window), some_ids(2, 50)
    caches = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr("mnemon.layers.ragged.serves_slots", lambda *_: False)
        cache = mnemon.Cache(model.config)
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            for at in range(9, 50):
                model(ids[:, at : at + 1], past_key_values=cache)
        caches.append(cache)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        states = one.state().tensors, other.state().tensors
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [DMSLayer(4), DMCLayer(12)], ids=["dms", "dmc"])
def test_memory_holds_the_live_slots_only(layer: CompressingLayer) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 4000, 16, generator=generator)
    decided = torch.rand(2, 3, 4000, generator=generator) < torch.tensor([0.5, 0.75, 0.9])[:, None]
    decided[..., 0] = False
    raw = torch.randn(2, 3, 4000, 34, generator=generator) if layer.kind == "dmc" else None
    for at in range(0, 4000, 100):
        part = slice(at, at + 100)
        layer.store(
            Call(keys[:, :, part], keys[:, :, part], decided[:, :, part], None,
                 None if raw is None else raw[:, :, part])
        )  # fmt: skip
    share = layer.head_lengths().double().mean(0) / 4000
    assert (share - torch.tensor([0.5, 0.25, 0.1])).abs().max() < 0.03
    assert layer.nbytes < 1.05 * 2 * 4000 * 0.85 * 2 * 16 * 4
    assert layer.nbytes_reserved < 2.2 * 2 * 3 * layer.num_stored * 2 * 16 * 4 + 1e5


def test_a_model_without_its_adapter_and_other_caches_are_refused() -> None:
    model, ids = build("llama", "dms", 4), some_ids(1, 20)
    with pytest.raises(LearnedMemoryError, match="past_key_values=mnemon"):
        model.generate(ids, max_new_tokens=3)
    config = model.config
    cache = mnemon.Cache(config)
    mnemon.memory.detach_compression(model)
    with pytest.raises(CacheError, match="load_retrofitted"), torch.no_grad():
        model(ids, past_key_values=cache)
    config.mnemon_memory = {"method": "dms", "window": 4, "source": "projection"}
    with pytest.raises(RecipeError, match="static"):
        mnemon.Cache(config, "static(64)")
    config.mnemon_memory = {"method": "h2o", "window": 4, "source": "projection"}
    with pytest.raises(LearnedMemoryError, match="dmc"):
        mnemon.Cache(config)


@pytest.mark.parametrize(("method", "window"), [("dms", 4), ("dmc", 12)])
def test_a_mask_that_hides_what_is_cached_is_refused(method: str, window: int) -> None:
    model, ids = build("llama", method, window), some_ids(2, 20)
    cache = mnemon.Cache(model.config)
    mask = torch.ones(2, 20, dtype=torch.int64)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        mask[1, 4] = 0
        with pytest.raises(LearnedMemoryError, match="row 1"):
            model(ids[:, 10:], attention_mask=mask, past_key_values=cache)
        assert cache.num_tokens == 10


def test_no_gradient_is_lost_without_a_word() -> None:
    model, ids = build("llama", "dms", 4), some_ids(1, 20)
    loss = model(ids, past_key_values=mnemon.Cache(model.config), labels=ids).loss
    with pytest.raises(LearnedMemoryError, match="use_cache=False"):
        loss.backward()
