"""Models over packed caches: every way of generating, attached or not, and the same logits."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from packed_models import MODELS, build, prompt

import mnemon
from mnemon.cache import Cache
from mnemon.errors import CacheError
from mnemon.layers import PackedLayer, PackedWindowLayer

DECODERS = [name for name in MODELS if name not in ("bart", "t5")]
RECIPES = ["int8", "int4/int2(residual=10)", "fp8(keys=token, rotate=yes)"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native kernels.*")
        yield
    transformers.logging.set_verbosity(level)


def inputs_of(name: str, batch: int = 1, count: int = 200) -> dict[str, torch.Tensor]:
    if build(name).config.is_encoder_decoder:
        return {"input_ids": prompt(batch, 9, 5), "decoder_input_ids": prompt(batch, count)}
    return {"input_ids": prompt(batch, count)}


@torch.no_grad()
def logits(name: str, recipe: str, *, attached: bool, batch: int = 2) -> torch.Tensor:
    """A prompt in two parts, then some tokens one by one."""
    model = build(name)
    cache = Cache(model.config, recipe)
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given = inputs_of(name, batch, 262)
    outs = []
    with mnemon.attach(model) if attached else nullcontext():
        for start, stop in [(0, 140), (140, 230), *((n, n + 1) for n in range(230, 262))]:
            part = given | {ids: given[ids][:, start:stop]}
            outs.append(model(**part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_attached_and_unattached_agree(name: str, recipe: str) -> None:
    torch.testing.assert_close(
        logits(name, recipe, attached=True), logits(name, recipe, attached=False),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_are_close_to_dense(name: str) -> None:
    dense = logits(name, "", attached=False)
    packed = logits(name, "int8(residual=0)", attached=False)
    assert not torch.equal(packed, dense)
    assert (packed - dense).norm() < 0.01 * dense.norm()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3_next"])
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_cache(name: str, recipe: str) -> None:
    model = build(name)
    given = inputs_of(name, 2, 230)
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    packed = Cache(model.config, recipe)
    model(**given, past_key_values=packed, use_cache=True)
    dense = Cache.from_legacy(packed.to_legacy(), model.config, num_tokens=230)
    assert dense.nbytes > packed.nbytes
    for step in range(45):
        part = given | {ids: prompt(2, 1, step)}
        got = model(**part, past_key_values=packed, use_cache=True).logits
        expected = model(**part, past_key_values=dense, use_cache=True).logits
        if step < 20:  # before the next block is packed
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if step == 30:
            packed_again = Cache.from_legacy(
                dense.to_legacy(), model.config, recipe, num_tokens=261
            )
            assert packed_again.num_tokens == 261


def test_what_is_packed_and_what_is_not() -> None:
    found = {}
    for name in MODELS:
        cache = Cache(build(name).config, "int4")
        found[name] = [layer.kind for layer in cache.layers]
    assert found["llama"] == ["packed", "packed"]
    assert found["mistral"] == ["packed_window", "packed_window"]
    assert found["gemma2"] == ["packed_window", "packed"]
    assert found["qwen3_next"] == ["recurrent", "packed"]
    cache = Cache(build("bart").config, "int4")
    assert isinstance(cache.layers[0], PackedLayer)
    assert {layer.kind for layer in cache.cross_attention_cache.layers} == {"cross"}


def generated(name: str, recipe: str | None, attached: bool, **options: Any) -> torch.Tensor:
    model = build(name)
    given = options.pop("inputs", None) or {"input_ids": prompt(options.pop("batch", 1), 170)}
    if model.config.is_encoder_decoder:
        given = {"input_ids": prompt(1, 9, 5), "decoder_input_ids": given["input_ids"]}
    cache = Cache(model.config, "" if recipe is None else recipe)
    torch.manual_seed(3)
    with mnemon.attach(model) if attached else nullcontext():
        out = model.generate(
            **given, past_key_values=cache, max_new_tokens=30, min_new_tokens=30, **options
        )
    assert cache.num_tokens >= 179
    return out


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str, mode: str) -> None:
    recipe = "int4" if name == "llama" else "int8"
    out = generated(name, recipe, True, **MODES[mode])
    assert out.shape[1] in (200, 201)  # some models put a token in front
    assert torch.equal(out, generated(name, recipe, False, **MODES[mode]))


@pytest.mark.parametrize("drafting", ["lookup", "assistant"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_drafts_give_the_tokens_of_greedy(name: str, drafting: str) -> None:
    options = {"prompt_lookup_num_tokens": 6} if drafting == "lookup" else {
        "assistant_model": build("llama")
    }  # fmt: skip
    greedy = generated(name, "int8", True, do_sample=False)
    assert torch.equal(generated(name, "int8", True, do_sample=False, **options), greedy)


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch(name: str) -> None:
    model = build(name)
    rows = prompt(2, 150)
    mask = torch.ones_like(rows)
    mask[1, :70] = 0
    rows[1, :70] = 0
    inputs = {"input_ids": rows, "attention_mask": mask}
    out = generated(name, "int8", True, inputs=dict(inputs), do_sample=False)
    assert torch.equal(out, generated(name, "int8", False, inputs=dict(inputs), do_sample=False))
    alone = Cache(model.config, "int8")
    single = model.generate(
        rows[1:, 70:], past_key_values=alone, max_new_tokens=10, min_new_tokens=10, do_sample=False
    )
    assert torch.equal(out[1, 150:160], single[0, 80:90])


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_crop_across_the_blocks_and_go_on(name: str) -> None:
    model = build(name)
    ids = prompt(1, 140)
    cache = Cache(model.config, "int8(residual=0)")
    model(ids, past_key_values=cache)
    fork = cache.fork()
    cache.crop(-37)
    got = model(ids[:, 103:], past_key_values=cache).logits
    whole = model(ids, past_key_values=Cache(model.config)).logits[:, 103:]
    assert (got - whole).norm() < 0.01 * whole.norm()
    assert fork.num_tokens == cache.num_tokens == 140
    assert isinstance(cache.layers[0], PackedLayer | PackedWindowLayer)


@torch.no_grad()
def test_merge_and_extract_keep_what_the_rows_say() -> None:
    model = build("llama")
    caches = []
    for count in (200, 131):
        cache = Cache(model.config, "int8(residual=0, keys=token)")
        with mnemon.attach(model):
            model(prompt(1, count, count), past_key_values=cache)
        caches.append(cache)
    merged = Cache.merge(caches)
    for row, cache in enumerate(caches):
        back = merged.extract(row)
        assert back.num_tokens == cache.num_tokens
        for one, other in zip(back.to_legacy(), cache.to_legacy(), strict=True):
            # Codes moved as they are; only the newest tokens may lie in the tail or in a block.
            torch.testing.assert_close(one[0], other[0], rtol=0, atol=0.02)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_refused() -> None:
    cache = Cache(build("llama").config, "int4(residual=0)")
    good = torch.randn(1, 2, 70, 32)
    cache.update(good, good, 0)
    before = cache.layers[0].state()
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = good.clone()
        wrong[0, 1, 3, 5] = bad
        for pair in ((wrong, good), (good, wrong)):
            with pytest.raises(CacheError, match="not finite"):
                cache.update(*pair, 0)
    after = cache.layers[0].state()
    assert after.meta == before.meta
    assert all(torch.equal(after.tensors[name], held) for name, held in before.tensors.items())
    cache.update(good, good, 0)
    assert cache.layers[0].num_tokens == 140


@torch.no_grad()
def test_the_report_says_how_it_is_stored() -> None:
    model = build("gemma2")
    cache = Cache(model.config, "int4/int2")
    model(prompt(1, 200), past_key_values=cache)
    rows = cache.report().rows
    assert {row.kind for row in rows} == {"packed", "packed_window"}
    assert {row.dtype for row in rows} == {"int4/int2"}
    assert sum(row.nbytes for row in rows) == cache.nbytes
