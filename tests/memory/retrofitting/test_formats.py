"""Slots of a compressing cache in packed formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deciding import deciding_model, some_ids
from torch import Tensor

import mnemon
from mnemon.errors import CacheError, RecipeError
from mnemon.layers import DMCLayer, DMSLayer
from mnemon.layers.compressing import Call, CompressingLayer
from mnemon.recipe import parse

CASES = (("dms", 4), ("dms", 0), ("dms", 90), ("dmc", 12))
cases = pytest.mark.parametrize(("method", "window"), CASES)


def packed_layer(method: str, window: int, recipe: str | None) -> CompressingLayer:
    form = None if recipe is None else parse(recipe).packed
    return (DMSLayer if method == "dms" else DMCLayer)(window, form=form)


def some_call(rows: int, tokens: int, seed: int = 0, share: float = 0.5) -> Call:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 3, tokens, 32, generator=generator)
    # Heads keep very different numbers of tokens.
    shares = torch.tensor([share / 2, share, 0.9])[:, None]
    decided = torch.rand(rows, 3, tokens, generator=generator) < shares
    assert decided[:, :, 0].any()  # a first token merges into nothing, whatever is said
    return Call(keys, values, decided)


def in_pieces(call: Call, sizes: list[int]) -> list[Call]:
    found, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        found.append(Call(*(x[:, :, part] for x in call[:3])))
        start += size
    return found


@pytest.mark.parametrize("recipe", ["int8(residual=0)", "int8", "int8(residual=200)", "fp8"])
@cases
def test_packed_slots_are_those_of_a_dense_layer(method: str, window: int, recipe: str) -> None:
    packed, dense = packed_layer(method, window, recipe), packed_layer(method, window, None)
    call = some_call(2, 900)
    for part in in_pieces(call, [300, 1, 5, 64, *[1] * 130, 400]):
        packed.store(part)
        dense.store(part)
        assert torch.equal(packed.head_lengths(), dense.head_lengths())
    assert packed.frozen is not None
    assert not packed.frozen.is_empty
    view, expected = packed.view(), dense.view()
    assert view is not None
    assert expected is not None
    for side in (0, 1):
        error = (view[side] - expected[side]).norm() / expected[side].norm()
        assert error < (0.01 if recipe.startswith("int8") else 0.04)
    assert packed.num_stored == dense.num_stored
    assert packed.nbytes < (0.55 if "200" not in recipe else 0.8) * dense.nbytes


@pytest.mark.parametrize("recipe", ["int8", "int4", "int2", "fp8", "int4/int2"])
@cases
def test_models_generate_from_packed_slots(method: str, window: int, recipe: str) -> None:
    model = deciding_model(method=method, window=window, dtype=torch.float32, head_dim=32)
    ids = some_ids(2, 330)
    cache = mnemon.Cache(model.config, f"{recipe}(residual=0)")
    dense = mnemon.Cache(model.config)
    with torch.no_grad():
        got, expected = [], []
        for start, stop in ((0, 300), *((at, at + 1) for at in range(300, 320)), (320, 330)):
            piece = ids[:, start:stop]
            got.append(model(piece, past_key_values=cache).logits)
            # The same slots through plain torch, dequantized.
            expected.append(model(piece, past_key_values=dense).logits)
    assert cache.num_tokens == dense.num_tokens == 330
    assert cache.nbytes < dense.nbytes
    if recipe == "int8":
        error = (torch.cat(got, 1) - torch.cat(expected, 1)).abs().mean()
        assert error < 0.1 * torch.cat(expected, 1).abs().mean()


@cases
def test_kernels_agree_with_plain_torch_over_packed_slots(
    method: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deciding_model(method=method, window=window, dtype=torch.float32, head_dim=32)
    ids = some_ids(2, 320)
    outs: list[Tensor] = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr("mnemon.attention.cpu.serves", lambda *_: False)
        cache = mnemon.Cache(model.config, "int4(residual=0)")
        with torch.no_grad():
            model(ids[:, :300], past_key_values=cache)
            steps = [
                model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(300, 304)
            ]
        outs.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3)


@cases
def test_verbs_of_packed_slots(method: str, window: int, tmp_path: Path) -> None:
    layer = packed_layer(method, window, "int4(residual=0)")
    layer.store(some_call(3, 500))
    before = layer.view()
    assert before is not None
    more = some_call(3, 90, 1)

    state = layer.state()
    loaded = packed_layer(method, window, "int4(residual=0)")
    loaded.load_state(state)
    other = layer.fork()
    order = torch.tensor([2, 0, 1])
    other.reorder(order)
    merged = layer.extract(0).merge([layer.extract(1), layer.extract(2)])
    for one, rows in ((loaded, None), (other, order), (merged, None)):
        view = one.view()
        assert view is not None
        for side in (0, 1):
            kept = before[side] if rows is None else before[side][rows]
            assert torch.equal(view[side], kept)
        one.store(more if rows is None else Call(*(x[rows] for x in more[:3])))
    layer.store(more)
    after = layer.view()
    assert after is not None
    for one, rows in ((loaded, None), (other, order), (merged, None)):
        view = one.view()
        assert view is not None
        assert torch.equal(view[0], after[0] if rows is None else after[0][rows])
    strange = packed_layer(method, window, "int8")
    with pytest.raises(CacheError, match="format"):
        strange.load_state(state)
    strange.store(more)
    with pytest.raises(CacheError, match="formats"):
        layer.merge([strange])


def test_recorded_calls_go_back_over_packed_slots() -> None:
    layer, plain = (packed_layer("dms", 4, "int8(residual=0)") for _ in range(2))
    start, draft, rest = some_call(2, 300), some_call(2, 100, 1), some_call(2, 40, 2)
    for one in (layer, plain):
        one.store(start)
        one.set_recording(True)
    layer.store(draft)
    layer.crop(100)
    for one in (layer, plain):
        one.store(rest)
        one.crop(0)
    assert torch.equal(layer.head_lengths(), plain.head_lengths())
    view, expected = layer.view(), plain.view()
    assert view is not None
    assert expected is not None
    torch.testing.assert_close(view[0], expected[0], rtol=0, atol=0.05)


def test_files_of_packed_slots(tmp_path: Path) -> None:
    model = deciding_model(method="dms", dtype=torch.float32, head_dim=32)
    ids = some_ids(2, 400)
    cache = mnemon.Cache(model.config, "int4")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache", model=model)
        loaded = mnemon.load_cache(tmp_path / "cache", model)
        assert loaded.nbytes == cache.nbytes
        assert str(loaded.recipe) == "int4"
        one = some_ids(2, 1, 5)
        got = model(one, past_key_values=loaded).logits
        torch.testing.assert_close(got, model(one, past_key_values=cache).logits)
    # What a head does not hold takes no place in the file.
    assert (tmp_path / "cache").stat().st_size < 1.1 * cache.nbytes + 20_000


def test_recipes_that_do_not_fit_are_refused() -> None:
    config = deciding_model(method="dms").config
    for recipe in ("static(64)", "window(64)"):
        with pytest.raises(RecipeError, match="dms"):
            mnemon.Cache(config, recipe)
    with pytest.raises(RecipeError, match="dmc"):
        mnemon.Cache(config, "dmc")
    for recipe in ("dms(4)", "dms + dmc", "dms + h2o(keep=4)"):
        with pytest.raises(RecipeError):
            mnemon.Cache(config, recipe)
    named = mnemon.Cache(config, "dms + int4 + host")
    assert [layer.kind for layer in named.layers] == ["dms", "dms"]
    plain = deciding_model(method="dms")
    mnemon.memory.detach_compression(plain)
    with pytest.raises(RecipeError, match="retrofitted"):
        mnemon.Cache(plain.config, "dms")
    sliding = deciding_model("mistral", "dmc", 12, sliding_window=16).config
    with pytest.raises(RecipeError, match="16 tokens"):
        mnemon.Cache(sliding, "int4")
    with pytest.raises(CacheError, match="16 tokens"):
        DMSLayer(4, sliding=16, form=parse("int4").packed)


@pytest.mark.parametrize("recipe", ["host", "disk", "int8 + host", "int4 + disk"])
@cases
def test_tiers_give_what_the_device_gives(method: str, window: int, recipe: str) -> None:
    model = deciding_model(method=method, window=window, dtype=torch.float32, head_dim=32)
    ids = some_ids(2, 700)
    form = recipe.split(" + ")[0] if "+" in recipe else "dense"
    tier = recipe.split(" + ")[-1]
    packed = "" if form == "dense" else f"{form}(residual=0)"
    tiered = mnemon.Cache(model.config, " + ".join(filter(None, [packed, f"{tier}(segment=64)"])))
    device = mnemon.Cache(model.config, packed)
    with torch.no_grad():
        for start, stop in ((0, 400), *((at, at + 1) for at in range(400, 410)), (410, 690)):
            model(ids[:, start:stop], past_key_values=device)
            model(ids[:, start:stop], past_key_values=tiered)
        places = tiered.nbytes_by_place()
        # The disk tier keeps in memory what fits there.
        assert places.get("host", 0) + places.get("disk", 0) > 0
        assert places["device"] < 0.85 * device.nbytes
        for one, other in zip(tiered.layers, device.layers, strict=True):
            assert torch.equal(one.head_lengths(), other.head_lengths())
        rest = ids[:, 690:]
        expected = model(rest, past_key_values=device.fork()).logits
        within = {"rtol": 1e-3, "atol": 1e-3} if form == "dense" else {"rtol": 0.3, "atol": 0.3}
        got = model(rest, past_key_values=tiered.fork()).logits
        torch.testing.assert_close(got, expected, **within)
        order = torch.tensor([1, 0])
        moved = tiered.fork()
        moved.reorder_cache(order)
        swapped = model(rest[order], past_key_values=moved).logits
        torch.testing.assert_close(swapped, got[order], rtol=1e-4, atol=1e-4)
        merged = mnemon.Cache.merge([tiered.extract(0), tiered.extract(1)])
        again = model(rest, past_key_values=merged).logits
        torch.testing.assert_close(again, got, rtol=1e-4, atol=1e-4)
        one = ids[:, -1:]
        step = model(one, past_key_values=tiered).logits
        torch.testing.assert_close(step, model(one, past_key_values=device).logits, **within)


def test_files_of_slots_in_a_tier(tmp_path: Path) -> None:
    model = deciding_model(method="dms", dtype=torch.float32, head_dim=32)
    ids, one = some_ids(2, 400), some_ids(2, 1, 5)
    cache = mnemon.Cache(model.config, "disk(segment=64)")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache", model=model)
        loaded = mnemon.load_cache(tmp_path / "cache", model)
        assert set(loaded.nbytes_by_place()) > {"device"}
        got = model(one, past_key_values=loaded).logits
        torch.testing.assert_close(got, model(one, past_key_values=cache).logits)
