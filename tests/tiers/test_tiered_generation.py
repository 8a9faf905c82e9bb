"""Whole models: a tiered cache gives the tokens that the cache without a tier gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import mnemon
from mnemon.errors import CacheError, CapacityError, RecipeError, TierError
from mnemon.layers import TieredLayer

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
TIERS = ("host(segment=64)", "disk(memory=1MiB, segment=64)")
MODES = ("greedy", "padded", "chunked", "beams", "assisted", "lookup")


@pytest.fixture(scope="module")
def models() -> tuple[tf.LlamaForCausalLM, tf.LlamaForCausalLM]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SHAPE)).eval()
    draft = tf.LlamaForCausalLM(tf.LlamaConfig(**{**_SHAPE, "num_hidden_layers": 1})).eval()
    return model, draft


def prompt(rows: int = 2, count: int = 300) -> torch.Tensor:
    return torch.randint(3, 64, (rows, count), generator=torch.Generator().manual_seed(1))


def generate(
    models: tuple[Any, Any], recipe: str, mode: str, attached: bool = True
) -> tuple[torch.Tensor, mnemon.Cache]:
    model, draft = models
    cache = mnemon.Cache(model.config, recipe)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "past_key_values": cache}
    ids = prompt()
    mask = torch.ones_like(ids)
    if mode == "padded":
        mask[0, :37] = 0
    elif mode == "chunked":
        options["prefill_chunk_size"] = 90
    elif mode == "beams":
        options["num_beams"] = 3
    elif mode in ("assisted", "lookup"):
        ids, mask = ids[:1], mask[:1]
        options |= (
            {"assistant_model": draft} if mode == "assisted" else {"prompt_lookup_num_tokens": 4}
        )
    if attached:
        mnemon.attach(model)
    try:
        return model.generate(ids, attention_mask=mask, **options), cache
    finally:
        if attached:
            mnemon.detach(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["dense", "int4"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_without_a_tier(models: Any, mode: str, form: str) -> None:
    expected, _ = generate(models, form, mode)
    for tier in TIERS:
        got, cache = generate(models, f"{form} + {tier}", mode)
        assert torch.equal(got, expected)
        layer = cache.layers[0]
        assert isinstance(layer, TieredLayer)
        assert layer.num_segments >= 2
        assert cache.num_tokens >= 300


@pytest.mark.parametrize("recipe", ["disk(memory=1MiB, segment=64)", "static(400) + host"])
def test_models_that_are_not_attached_see_numbers(models: Any, recipe: str) -> None:
    expected, _ = generate(models, "", "padded", attached=False)
    got, _ = generate(models, recipe, "padded", attached=False)
    assert torch.equal(got, expected)


def test_a_static_tiered_cache_is_full_in_the_first_layer(models: Any) -> None:
    model = models[0]
    cache = mnemon.Cache(model.config, "static(310) + disk(memory=1MiB, segment=64)")
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        with pytest.raises(CapacityError):
            model(prompt(count=11), past_key_values=cache)
        assert {layer.num_tokens for layer in cache.layers} == {300}
        model(prompt(count=10), past_key_values=cache)
    assert cache.num_tokens == 310


@pytest.mark.parametrize("form", ["dense", "int4"])
def test_save_and_load(models: Any, tmp_path: Path, form: str) -> None:
    model = models[0]
    mnemon.attach(model)
    try:
        cache = mnemon.Cache(model.config, f"{form} + disk(memory=1MiB, segment=64)")
        mnemon.prefill(model, prompt(1), cache)
        cache.save(tmp_path / "prompt.safetensors")
        loaded = mnemon.load_cache(tmp_path / "prompt.safetensors", model)
        assert loaded.nbytes_by_place() == cache.nbytes_by_place()
        outs = [
            model.generate(prompt(1), past_key_values=each, max_new_tokens=12, do_sample=False)
            for each in (cache, loaded)
        ]
    finally:
        mnemon.detach(model)
    assert torch.equal(outs[0], outs[1])


def test_verbs_of_a_cache(models: Any) -> None:
    model = models[0]
    cache = mnemon.Cache(model.config, "disk(memory=1MiB, segment=64)")
    plain = mnemon.Cache(model.config)
    with torch.no_grad():
        for each in (cache, plain):
            model(prompt(), past_key_values=each)
    fork, alone = cache.fork(), cache.extract(1)
    cache.crop(-100)
    plain_fork = plain.fork()
    plain.crop(-100)
    both = mnemon.Cache.merge([alone, alone.fork()])
    assert both.batch_size == 2
    for one, two in ((cache, plain), (fork, plain_fork)):
        assert one.num_tokens == two.num_tokens
        for ours, theirs in zip(one.layers, two.layers, strict=True):
            assert torch.equal(ours.keys.clone(), theirs.keys)
    with pytest.raises(CacheError):
        cache.to_legacy()


def test_the_report_says_where_bytes_lie(models: Any) -> None:
    model = models[0]
    cache = mnemon.Cache(model.config, "disk(memory=1MiB, segment=64)")
    with torch.no_grad():
        model(prompt(4, 1500), past_key_values=cache)
    report = cache.report()
    text = str(report)
    assert "on device" in text
    assert "on host" in text
    assert "on disk" in text
    (row,) = report.rows
    assert row.kind == "tiered"
    assert sum(row.places.values()) == cache.nbytes == sum(cache.nbytes_by_place().values())
    assert cache.nbytes_by_place()["disk"] > 0
    assert "on disk" not in str(mnemon.Cache(model.config).report())


def test_windows_and_states_stay_where_they_are() -> None:
    config = tf.Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 6}, sliding_window=16, query_pre_attn_scalar=16
    )
    kinds = {layer.kind for layer in mnemon.Cache(config, "disk").layers}
    assert kinds == {"tiered", "window"}
    kinds = {layer.kind for layer in mnemon.Cache(config, "static(64) + host").layers}
    assert kinds == {"tiered", "window"}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("disk(4096)", "by name"),
        ("disk(memory=12)", "from 1048576"),
        ("disk(memory=half)", "whole number"),
        ("disk(path=here)", "absolute path"),
        ("disk(segment=100)", "multiple of 64"),
        ("disk(size=0)", "from 1"),
        ("disk(colour=red)", "takes memory="),
        ("host(memory=1GiB)", "takes segment="),
        ("host + disk", "2 tiers"),
    ],
)
def test_refused_recipes(recipe: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        mnemon.Cache(tf.LlamaConfig(**_SHAPE), recipe)


def test_recipes_in_canonical_form() -> None:
    from mnemon.recipe import parse

    recipe = parse("int4 + disk(path=/var/tmp, memory=256MiB, size=1TiB)")
    assert str(recipe) == f"int4 + disk(memory={256 << 20}, path=/var/tmp, size={1 << 40})"
    assert parse(str(recipe)) == recipe


def test_a_directory_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(TierError, match="/nowhere/at/all"):
        mnemon.Cache(tf.LlamaConfig(**_SHAPE), "disk(path=/nowhere/at/all)")
