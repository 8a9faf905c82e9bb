"""Models of today's transformers take the past as a tuple, in the three layouts of old."""

from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from mnemon.errors import CacheError
from mnemon.legacy.tuples import cache_for, is_tuple

from .conftest import pairs

pytestmark = [
    pytest.mark.usefixtures("enabled"),
    pytest.mark.skipif(
        transformers.__version__.startswith("4."), reason="4.57 converts tuples itself, and copies"
    ),
]
SMALL: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[5, 9, 13, 17, 21, 25], [6, 8, 10, 12, 14, 16]])


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def mistral() -> Any:
    config = transformers.MistralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, **SMALL,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def bloom() -> Any:
    config = transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL)
    return transformers.BloomForCausalLM(config)


def bart() -> Any:
    config = transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=64, decoder_start_token_id=1, forced_eos_token_id=None, **SMALL,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0,
        **{**SMALL, "pad_token_id": 0},
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def made(build: Any) -> Any:
    torch.manual_seed(0)
    model = build().eval().double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


def folded(past: Any) -> Any:
    return tuple(
        (keys.transpose(-1, -2).flatten(0, 1), values.flatten(0, 1)) for keys, values in past
    )


@pytest.mark.parametrize(("build", "layout"), [
    (gpt2, tuple), (mistral, tuple), (bloom, folded), (bloom, tuple),
])  # fmt: skip
@torch.no_grad()
def test_decoders(build: Any, layout: Any) -> None:
    model = made(build)
    whole = model(IDS).logits[:, -1]
    cache = DynamicCache()  # every token, as caches of old held
    past = layout(model(IDS[:, :-1], past_key_values=cache).past_key_values.to_legacy_cache())
    out = model(IDS[:, -1:], past_key_values=past)
    assert torch.allclose(out.logits[:, -1], whole, atol=1e-5)
    assert isinstance(out.past_key_values, Cache)
    assert out.past_key_values.get_seq_length() == 6
    assert past[0][0].shape[-1 if layout is folded else -2] == 5

    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, past_key_values=past, **arguments), expected)
    assert torch.equal(model.generate(IDS, past_key_values=(), **arguments), expected)


@torch.no_grad()
def test_past_among_the_positional_arguments() -> None:
    model = made(gpt2)
    past = model(IDS[:, :-1]).past_key_values.to_legacy_cache()
    out = model(IDS[:, -1:], past)
    assert torch.allclose(out.logits[:, -1], model(IDS).logits[:, -1], atol=1e-5)
    assert model(IDS, (None, (None, None))).past_key_values.get_seq_length() == 6
    out = model.transformer(IDS[:, -1:], list(past))
    assert isinstance(out.past_key_values, DynamicCache)


@pytest.mark.parametrize("build", [bart, t5])
@torch.no_grad()
def test_encoder_decoders(build: Any) -> None:
    model = made(build)
    start = model.config.decoder_start_token_id
    decoded = torch.tensor([[start, 7, 9], [start, 8, 4]])
    whole = model(IDS, decoder_input_ids=decoded).logits[:, -1]
    first = model(IDS, decoder_input_ids=decoded[:, :-1])
    past = first.past_key_values.to_legacy_cache()
    assert {len(entry) for entry in past} == {4}
    encoded = (first.encoder_last_hidden_state,)
    out = model(encoder_outputs=encoded, decoder_input_ids=decoded[:, -1:], past_key_values=past)
    assert torch.allclose(out.logits[:, -1], whole, atol=1e-4)
    assert isinstance(out.past_key_values, EncoderDecoderCache)

    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, decoder_input_ids=decoded, **arguments)
    tokens = model.generate(IDS, decoder_input_ids=decoded, past_key_values=past, **arguments)
    assert torch.equal(tokens, expected)


def test_nothing_is_copied_where_layers_grow() -> None:
    model, past = made(gpt2), pairs(width=8)
    for given in (past, folded(past)):
        for layer, entry in zip(cache_for(model, given).layers, given, strict=True):
            assert layer.keys.data_ptr() == entry[0].data_ptr()
            assert layer.values.data_ptr() == entry[1].data_ptr()
            assert layer.keys.shape == past[0][0].shape


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (pairs(num_layers=3), "made by another model"),
        (tuple((*pair, pair[0]) for pair in pairs()), "has 3 entries"),
        (tuple((keys[0], values) for keys, values in pairs()), "expected \\[batch, heads"),
        (tuple((keys[0], values[0]) for keys, values in pairs()), "as Bloom had them"),
        ((*pairs()[:1], (None, None)), "1 of 2 layers"),
        (tuple((keys, None) for keys, _ in pairs()), "NoneType"),
    ],
)
def test_other_layouts_are_refused(past: Any, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        made(gpt2)(IDS, past_key_values=past)


def test_what_is_a_tuple() -> None:
    assert is_tuple(())
    assert is_tuple([None, None])
    assert is_tuple(pairs())
    assert not is_tuple(DynamicCache())
    assert not is_tuple((torch.ones(1),))
