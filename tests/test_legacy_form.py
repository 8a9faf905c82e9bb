"""Caches from tuples of tuples and back: the layouts, no copies, and what is refused."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import mnemon
from mnemon.errors import CacheError, CapacityError
from mnemon.names import release

Tuples = tuple[tuple[torch.Tensor, ...], ...]


def tuples(batch: int = 2, num_tokens: int = 5, num_layers: int = 2, parts: int = 2) -> Tuples:
    torch.manual_seed(0)
    lengths = [num_tokens, num_tokens, 7, 7][:parts]
    return tuple(tuple(torch.randn(batch, 2, n, 8) for n in lengths) for _ in range(num_layers))


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **changes,
    )  # fmt: skip


def pointers(past: Tuples) -> list[int]:
    return [tensor.data_ptr() for entry in past for tensor in entry]


@pytest.mark.parametrize("config", [None, llama()], ids=["alone", "config"])
def test_there_and_back_without_a_copy(config: LlamaConfig | None) -> None:
    past = tuples()
    cache = mnemon.Cache.from_legacy(past, config)
    assert (cache.num_tokens, cache.batch_size, cache.get_seq_length()) == (5, 2, 5)
    back = cache.to_legacy()
    assert pointers(back) == pointers(past)
    assert torch.equal(back[1][1], past[1][1])


def test_the_tuple_is_never_written() -> None:
    past = tuples()
    before = [tensor.clone() for entry in past for tensor in entry]
    cache = mnemon.Cache.from_legacy(past)
    new = torch.ones(2, 2, 1, 8)
    for index in range(2):
        cache.update(new, new, index)
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(-2)
    for index in range(2):
        cache.update(new, new, index)
    after = [tensor for entry in past for tensor in entry]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.num_tokens == 5


def test_to_legacy_of_a_grown_cache_is_a_view() -> None:
    cache = mnemon.Cache(llama())
    for index in range(2):
        cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), index)
    keys, values = cache.to_legacy()[1]
    assert keys.data_ptr() == cache.layers[1].keys.data_ptr()
    assert values.shape == (1, 2, 3, 8)


def test_an_encoder_decoder_tuple() -> None:
    past = tuples(parts=4)
    cache = mnemon.Cache.from_legacy(past)
    assert cache.num_tokens == 5
    assert cache.cross_attention_cache.layers[0].num_tokens == 7
    assert cache.is_updated == {0: True, 1: True}
    assert pointers(cache.to_legacy()) == pointers(past)


def test_four_entries_are_a_pair_before_anything_is_encoded() -> None:
    past = tuple((keys, values, None, None) for keys, values in tuples())
    cache = mnemon.Cache.from_legacy(past)
    assert cache.is_updated == {0: False, 1: False}
    assert cache.cross_attention_cache.layers[0].num_tokens == 0
    assert len(cache.to_legacy()[0]) == 2


def test_static_copies_and_refuses_what_does_not_fit() -> None:
    past = tuples()
    cache = mnemon.Cache.from_legacy(past, llama(), "static(8)")
    assert cache.get_max_length() == 8
    back = cache.to_legacy()
    assert back[0][0].shape == (2, 2, 5, 8)
    assert torch.equal(back[0][0], past[0][0])
    assert back[0][0].data_ptr() != past[0][0].data_ptr()
    with pytest.raises(CapacityError):
        mnemon.Cache.from_legacy(past, llama(), "static(4)")


def test_what_iterating_over_a_dynamic_cache_gives() -> None:
    dynamic = DynamicCache(config=llama())
    for index in range(2):
        dynamic.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), index)
    cache = mnemon.Cache.from_legacy(dynamic)
    assert pointers(cache.to_legacy()) == [
        t.data_ptr() for layer in dynamic.layers for t in (layer.keys, layer.values)
    ]


def test_an_empty_cache() -> None:
    assert mnemon.Cache(llama()).to_legacy() == ()
    assert mnemon.Cache.from_legacy((), llama()).num_tokens == 0
    assert mnemon.Cache.from_legacy([(None, None)] * 2, llama()).num_tokens == 0
    with pytest.raises(CacheError, match="no layers"):
        mnemon.Cache.from_legacy(())


# -- in models -----------------------------------------------------------------------------------


def continues_alike(model: Any, cache: Any, past: Any, **inputs: torch.Tensor) -> None:
    with torch.no_grad():
        mine = model(**inputs, past_key_values=cache).logits
        theirs = model(**inputs, past_key_values=past).logits
    assert torch.equal(mine, theirs)


def test_gpt2_continues() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    ids = torch.randint(0, 64, (2, 6))
    past = model(ids[:, :5]).past_key_values
    pairs = tuple((layer.keys.clone(), layer.values.clone()) for layer in past.layers)
    for config in (None, model.config):
        fresh = DynamicCache(pairs)
        cache = mnemon.Cache.from_legacy(pairs, config)
        continues_alike(model, cache, fresh, input_ids=ids[:, 5:])


def test_bart_continues() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    source, target = torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (2, 4))
    with torch.no_grad():
        past = model(input_ids=source, decoder_input_ids=target[:, :3]).past_key_values
        encoded = model.get_encoder()(source)
    own, cross = past.self_attention_cache.layers, past.cross_attention_cache.layers
    quads = tuple(
        (a.keys.clone(), a.values.clone(), b.keys.clone(), b.values.clone())
        for a, b in zip(own, cross, strict=True)
    )
    for known in (None, config):
        cache = mnemon.Cache.from_legacy(quads, known)
        with torch.no_grad():
            mine = model(
                encoder_outputs=encoded, decoder_input_ids=target[:, 3:], past_key_values=cache
            ).logits
            whole = model(input_ids=source, decoder_input_ids=target).logits[:, 3:]
        assert torch.allclose(mine, whole, atol=1e-5)
        assert cache.num_tokens == 4
        assert len(cache.to_legacy()[0]) == 4


def test_bloom_continues() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 6))
    with torch.no_grad():
        past = model(ids[:, :5]).past_key_values
        whole = model(ids).logits[:, 5:]
    fused = tuple(
        (layer.keys.flatten(0, 1).transpose(1, 2).contiguous(), layer.values.flatten(0, 1))
        for layer in past.layers
    )
    cache = mnemon.Cache.from_legacy(fused, config)
    assert pointers(cache.to_legacy()) == pointers(fused)
    with torch.no_grad():
        mine = model(ids[:, 5:], past_key_values=cache).logits
    assert torch.allclose(mine, whole, atol=1e-5)
    with pytest.raises(CacheError, match="config"):
        mnemon.Cache.from_legacy(fused)


def test_windows_take_the_whole_or_what_is_left() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 9))
    held = mnemon.Cache(config)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=held)
        model(ids[:, 7:8], past_key_values=held)
        whole = model(ids).logits[:, 8:]
    left = held.to_legacy()
    assert left[0][0].shape[2] in (3, 4)  # one more where the last append may be taken back
    with pytest.raises(CacheError, match="num_tokens"):
        mnemon.Cache.from_legacy(left, config)
    cache = mnemon.Cache.from_legacy(left, config, num_tokens=8)
    assert cache.num_tokens == 8
    with torch.no_grad():
        mine = model(ids[:, 8:], past_key_values=cache).logits
    assert torch.allclose(mine, whole, atol=1e-5)
    every = DynamicCache()
    with torch.no_grad():
        model(ids[:, :8], past_key_values=every)
        cache = mnemon.Cache.from_legacy(
            tuple((layer.keys, layer.values) for layer in every.layers), config
        )
        assert cache.num_tokens == 8
        mine = model(ids[:, 8:], past_key_values=cache).logits
    assert torch.allclose(mine, whole, atol=1e-5)


def test_generate_continues() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    ids = torch.randint(0, 64, (1, 6))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    past = model(ids[:, :5]).past_key_values
    pairs = tuple((layer.keys, layer.values) for layer in past.layers)
    for config in (None, model.config):
        cache = mnemon.Cache.from_legacy(pairs, config)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("past", "match"),
    [
        (torch.zeros(2, 2, 1, 3, 4), "no tuple of layers"),
        (5, "no tuple of layers"),
        (((torch.zeros(1, 2, 3, 4),),), "1 entries"),
        ((torch.zeros(1, 2, 3, 4),), "a Tensor"),
        (((torch.zeros(1, 2, 3, 4), None),), "NoneType"),
        (((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 4)),), "agree in all but"),
        (((torch.zeros(2, 3), torch.zeros(2, 3)),), "agree in all but"),
        ((*tuples(num_layers=1), *tuples(batch=3, num_layers=1)), "batches of"),
        ((*tuples(num_layers=1), *tuples(num_tokens=6, num_layers=1)), "every token hold"),
        ((*tuples(num_layers=1), (None, None)), "is empty and others are not"),
    ],
)
def test_refused(past: Any, match: str) -> None:
    with pytest.raises(CacheError, match=match):
        mnemon.Cache.from_legacy(past)


def test_refused_by_the_config() -> None:
    with pytest.raises(CacheError, match="3 layers and the model"):
        mnemon.Cache.from_legacy(tuples(num_layers=3), llama())
    with pytest.raises(CacheError, match="without an encoder"):
        mnemon.Cache.from_legacy(tuples(parts=4), llama())
    turned = tuple((k.transpose(1, 2), v.transpose(1, 2)) for k, v in tuples())
    with pytest.raises(CacheError, match="Transpose axes 1 and 2"):
        mnemon.Cache.from_legacy(turned, llama())
    with pytest.raises(CacheError, match="num_tokens=9"):
        mnemon.Cache.from_legacy(tuples(), llama(), num_tokens=9)


@pytest.mark.skipif(
    release(version("transformers")) < (5, 5), reason="caches for all models hold no states yet"
)
def test_states_have_no_place_in_tuples() -> None:
    jamba = JambaConfig(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1)
    cache = mnemon.Cache(jamba)
    cache.update_conv_state(torch.zeros(1, 4, 4), 0)
    with pytest.raises(CacheError, match="no place"):
        cache.to_legacy()
    with pytest.raises(CacheError, match="old tuples"):
        mnemon.Cache.from_legacy(tuples(), jamba)
