"""Policies under real models: generation in every way, attached and not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as tf

import mnemon
from attention.tiny import SERVED, build
from mnemon.errors import CacheError, RecipeError
from mnemon.hf.names import PreTrainedConfig
from releases import RELEASE

EVERY_POLICY = [
    "window(12, every=1)",
    "sinks(3) + window(9, every=1)",
    "random(keep=12, every=1)",
    "h2o(keep=12, every=1)",
    "tova(keep=12, every=1)",
]
SCORED = [text for text in EVERY_POLICY if text.startswith(("h2o", "tova"))]
FAMILIES = ["llama", "gpt2", "gemma2", "gpt_oss", "qwen2"]


def model_named(name: str, **overrides: object) -> tf.PreTrainedModel:
    if name != "qwen2":
        return build(name, **overrides)
    torch.manual_seed(3)
    config = tf.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


@contextmanager
def attached(model: tf.PreTrainedModel, on: bool) -> Iterator[None]:
    if on:
        with mnemon.attach(model):
            yield
    else:
        yield


def prompt(batch: int = 2, length: int = 30, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: tf.PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    count = options.pop("count", 10)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        **options,
    )  # fmt: skip


def full_layers(cache: mnemon.Cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if not layer.is_sliding]


served = pytest.mark.parametrize("name", [n for n in FAMILIES if n in [*SERVED, "qwen2"]])
every_policy = pytest.mark.parametrize("text", EVERY_POLICY)


# -- what stays ------------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("text", ["h2o(keep=12)", "tova(keep=12)"])
def test_a_prompt_keeps_what_its_attention_weights_say(name: str, text: str) -> None:
    model = model_named(name)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    eager = model_named(name)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        plain = mnemon.Cache(model.config)
        weights = eager(
            ids, attention_mask=mask, past_key_values=plain, output_attentions=True
        ).attentions
        cache = mnemon.Cache(model.config, text)
        with mnemon.attach(model):
            model(ids, attention_mask=mask, past_key_values=cache)
    kept = 12
    for index in full_layers(cache):
        keys = plain.layers[index].keys
        assert keys is not None
        kv_heads = keys.shape[1]
        real = weights[index].double() * mask[:, None, :, None]
        per_head = real.unflatten(1, (kv_heads, -1)).sum(2)
        if text.startswith("h2o"):
            rank = per_head.sum(2)
            rank[..., -kept // 2 :] = torch.inf
        else:
            rank = per_head[:, :, -1].sum(1, keepdim=True).expand(-1, kv_heads, -1)
        rank = rank.masked_fill(mask[:, None] == 0, -1.0)
        best = rank.topk(kept, dim=-1).indices.sort(-1).values
        expected = keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))
        got = cache.layers[index].keys
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# -- nothing to drop -------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("text", ["sinks(4) + window(500)", "h2o(keep=500)"])
def test_below_the_bound_nothing_changes(name: str, on: bool, text: str) -> None:
    model, ids = model_named(name), prompt()
    with attached(model, on):
        dense = mnemon.Cache(model.config)
        plain = generate(model, ids, past_key_values=dense)
        cache = mnemon.Cache(model.config, text)
        assert torch.equal(generate(model, ids, past_key_values=cache), plain)
        for one, other in zip(cache.layers, dense.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


# -- padding, batches, beams -----------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding_changes_nothing(name: str, text: str) -> None:
    """A row behind padding gets the tokens that it gets alone."""
    if name not in SERVED:
        pytest.skip("not served in this release")
    model = model_named(name)
    ids = prompt(2, 30)
    ids[0, :9] = 2
    mask = (torch.arange(30)[None] >= torch.tensor([[9], [0]])).to(torch.int64)
    ways = [True] if model.config._attn_implementation == "eager" else [False, True]
    for on in ways:
        with attached(model, on):
            cache = mnemon.Cache(model.config, text)
            both = generate(model, ids, attention_mask=mask, past_key_values=cache)
            alone = mnemon.Cache(model.config, text)
            one = generate(model, ids[:1, 9:], past_key_values=alone)
            assert torch.equal(both[0, 30:], one[0, 21:])
            full = full_layers(cache)
            assert {cache.layers[i].num_stored for i in full} == {12}


@every_policy
@pytest.mark.parametrize("name", ["mha", "gpt2", "qwen2"])
def test_attached_or_not_the_same_tokens(name: str, text: str) -> None:
    model, ids = model_named(name), prompt()
    results = []
    for on in (False, True):
        with attached(model, on):
            cache = mnemon.Cache(model.config, text)
            results.append(generate(model, ids, past_key_values=cache, count=20))
    assert torch.equal(*results)
    dense = generate(model, ids, past_key_values=mnemon.Cache(model.config), count=20)
    assert not torch.equal(results[0], dense)


@every_policy
@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
def test_beams(text: str, on: bool) -> None:
    model, ids = model_named("llama"), prompt()
    with attached(model, on):
        cache = mnemon.Cache(model.config, text)
        out = generate(model, ids, past_key_values=cache, num_beams=3)
    assert out.shape == (2, 40)
    assert cache.num_stored == 12
    assert cache.batch_size == 6


@every_policy
@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
def test_several_turns_and_chunks(text: str, on: bool) -> None:
    """A conversation in a cache, and a prompt that comes in pieces: bounded after every call."""
    model, ids = model_named("llama"), prompt(1)
    with attached(model, on):
        cache = mnemon.Cache(model.config, text)
        out = generate(model, ids, past_key_values=cache)
        held = cache.num_tokens
        more = torch.cat([out, prompt(1, 9, seed=5)], 1)
        again = generate(model, more, past_key_values=cache)
        assert again.shape[1] == more.shape[1] + 10
        assert cache.num_tokens == again.shape[1] - 1 > held
        assert cache.num_stored == 12
        whole = mnemon.Cache(model.config, text)
        chunked = generate(model, ids, past_key_values=whole, prefill_chunk_size=8)
        assert chunked.shape == out.shape
        assert whole.num_stored == 12
        in_pieces = mnemon.Cache(model.config, text)
        mnemon.prefill(model, ids, in_pieces, chunk=8)
        assert (in_pieces.num_tokens, in_pieces.num_stored) == (30, 12)


@pytest.mark.parametrize("text", EVERY_POLICY)
def test_turns_in_a_padded_batch(text: str) -> None:
    """Padding between the turns of a row: it gets the tokens that it gets alone."""
    model = model_named("llama")
    first, second = prompt(2, 20), prompt(2, 8, seed=9)
    second[1, :3] = 2
    ids = torch.cat([first, second], 1)
    mask = torch.ones_like(ids)
    mask[1, 20:23] = 0
    with mnemon.attach(model), torch.no_grad():
        cache = mnemon.Cache(model.config, text)
        alone = mnemon.Cache(model.config, text)
        model(first, past_key_values=cache, use_cache=True)
        model(first[1:], past_key_values=alone, use_cache=True)
        own = second[1:, 3:]
        positions = (mask.cumsum(-1) - 1)[:, 20:]
        both = model(
            second, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
        one = model(own, past_key_values=alone).logits
        torch.testing.assert_close(both[1, -5:], one[0], rtol=1e-3, atol=1e-3)
        for step in range(6):
            token = prompt(2, 1, seed=20 + step)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            positions = (mask.cumsum(-1) - 1)[:, -1:]
            both = model(
                token, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits
            one = model(token[1:], past_key_values=alone).logits
            torch.testing.assert_close(both[1], one[0], rtol=1e-3, atol=1e-3)


def test_the_bound_holds_after_every_step() -> None:
    """Tokens and bytes, with room for a few tokens between two drops."""
    model, ids = model_named("llama"), prompt(2, 60)
    token = prompt(2, 1)
    heads, width = 2, 16
    for text in ("window(32)", "sinks(4) + window(0.25)", "random(keep=32)", "h2o(keep=32)",
                 "tova(keep=0.3)"):  # fmt: skip
        cache = mnemon.Cache(model.config, text)
        bound = cache.recipe.bound
        assert bound is not None
        held = []
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for _ in range(20):
                model(token, past_key_values=cache)
                most = bound.most(cache.num_tokens)
                held.append(cache.num_stored)
                assert cache.num_stored <= most
                per_token = 2 * width * 4 + bound.score_bytes
                assert cache.nbytes == 2 * 2 * heads * cache.num_stored * per_token
                assert cache.nbytes_reserved >= cache.nbytes
        assert max(held) >= bound.least(cache.num_tokens)


# -- formats and tiers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *(f"h2o(keep=96) + {form}" for form in ("int8", "int4", "int2", "fp8", "int8/int2")),
        "tova(keep=96) + int4",
        "random(keep=96) + int4",
        "sinks(4) + window(92) + int4(keys=token)",
        "sinks(4) + window(92) + host(segment=64)",
        "random(keep=96) + disk(memory=1MiB, segment=64)",
        "window(96) + int4 + host(segment=64)",
    ],
)  # fmt: skip
def test_formats_and_tiers(text: str, tmp_path: Path) -> None:
    model, ids = model_named("llama"), prompt(2, 100)
    results = []
    for on in (False, True):
        with attached(model, on):
            cache = mnemon.Cache(model.config, text)
            results.append(generate(model, ids, past_key_values=cache, count=12))
            assert cache.num_tokens == 111
            assert cache.num_stored <= 96
            assert text.split("(", maxsplit=1)[0] in str(cache.report()) or "window" in text
    assert results[0].shape == results[1].shape == (2, 112)
    with mnemon.attach(model):
        cache.save(tmp_path / "cache")
        loaded = mnemon.load_cache(tmp_path / "cache", model)
        assert loaded.nbytes == cache.nbytes
        more = torch.cat([results[1], prompt(2, 3)], 1)
        assert torch.equal(
            generate(model, more, past_key_values=loaded),
            generate(model, more, past_key_values=cache),
        )


@every_policy
def test_save_and_load(text: str, tmp_path: Path) -> None:
    model, ids = model_named("llama"), prompt()
    mask = torch.ones_like(ids)
    mask[0, :24] = 0  # padding is still stored
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config, text)
        out = generate(model, ids, attention_mask=mask, past_key_values=cache, count=2)
        cache.save(tmp_path / "cache")
        loaded = mnemon.load_cache(tmp_path / "cache", model)
        assert loaded.recipe == cache.recipe
        fork = cache.fork()
        mask = torch.nn.functional.pad(mask, (0, 2), value=1)
        expected = generate(model, out, attention_mask=mask, past_key_values=cache)
        for other in (loaded, fork):
            got = generate(model, out, attention_mask=mask, past_key_values=other)
            assert torch.equal(got, expected)


# -- assisted decoding -----------------------------------------------------------------------------


@pytest.mark.skipif(RELEASE < (5, 14), reason="assisted decoding announces itself from 5.14 on")
@pytest.mark.parametrize("text", EVERY_POLICY[:3])
@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
def test_prompt_lookup(text: str, on: bool) -> None:
    """Nothing is dropped before it is known which tokens stay: as without an assistant."""
    model = model_named("llama")
    ids = prompt(1, 12).repeat(1, 4)
    text = text.replace("12", "200").replace("9,", "190,")
    with attached(model, on):
        plain = mnemon.Cache(model.config, text)
        expected = generate(model, ids, past_key_values=plain, count=20)
        cache = mnemon.Cache(model.config, text)
        got = generate(model, ids, past_key_values=cache, count=20, prompt_lookup_num_tokens=4)
        assert torch.equal(got, expected)
        small = mnemon.Cache(model.config, "sinks(2) + window(20)")
        out = generate(model, ids, past_key_values=small, count=20, prompt_lookup_num_tokens=4)
        assert out.shape == expected.shape
        small.end_past_recording()
        assert small.num_stored <= 22


@pytest.mark.skipif(RELEASE < (5, 14), reason="assisted decoding announces itself from 5.14 on")
@pytest.mark.parametrize("text", SCORED)
def test_assisted_decoding_is_refused_where_queries_choose(text: str) -> None:
    model, ids = model_named("llama"), prompt(1)
    cache = mnemon.Cache(model.config, text)
    with pytest.raises(CacheError, match="Assisted decoding"):
        generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)


# -- what cannot be --------------------------------------------------------------------------------


@every_policy
def test_eager_attention_has_to_be_attached(text: str) -> None:
    model, ids = model_named("llama"), prompt()
    model.set_attn_implementation("eager")
    cache = mnemon.Cache(model.config, text)
    with pytest.raises(CacheError, match=r"mnemon\.attach"):
        generate(model, ids, past_key_values=cache)
    with mnemon.attach(model):
        out = generate(model, ids, past_key_values=mnemon.Cache(model.config, text))
    model.set_attn_implementation("sdpa")
    other = generate(model, ids, past_key_values=mnemon.Cache(model.config, text))
    assert torch.equal(out, other)


@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
def test_position_biases_are_refused(on: bool) -> None:
    model = model_named("t5")
    ids = prompt(2, 8)
    with attached(model, on):
        cache = mnemon.Cache(model.config, "window(6)")
        with pytest.raises(CacheError, match=r"by position|no mask"):
            generate(model, ids, past_key_values=cache)
        enough = mnemon.Cache(model.config, "window(60)")
        dense = mnemon.Cache(model.config)
        assert torch.equal(
            generate(model, ids, past_key_values=enough),
            generate(model, ids, past_key_values=dense),
        )


@pytest.mark.parametrize("on", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("text", ["window(6, every=1)", "h2o(keep=6)"])
def test_an_encoder_decoder_drops_what_the_decoder_said(on: bool, text: str) -> None:
    model, ids = model_named("bart"), prompt(2, 8)
    with attached(model, on):
        cache = mnemon.Cache(model.config, text)
        out = generate(model, ids, past_key_values=cache, count=14)
    assert out.shape == (2, 15)
    assert cache.num_stored <= 6
    assert all(layer.num_stored == 8 for layer in cache.cross_attention_cache.layers)


def test_windows_stay_as_they_are() -> None:
    model, ids = model_named("gemma3"), prompt()
    config: PreTrainedConfig = model.config
    cache = mnemon.Cache(config, "h2o(keep=12, every=1)")
    with mnemon.attach(model):
        generate(model, ids, past_key_values=cache)
    kinds = [layer.kind for layer in cache.layers]
    assert set(kinds) <= {"window", "h2o"}
    assert "window" in kinds
    for layer in cache.layers:
        assert layer.num_stored == (7 if layer.kind == "window" else 12)


def test_models_whose_attention_counts_its_keys_are_refused() -> None:
    config = tf.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], vocab_size=64
    )
    with pytest.raises(RecipeError, match="no token may go"):
        mnemon.Cache(config, "window(8)")
