"""A prompt that is already wholly cached."""

import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt


def test_transformers_feeds_it_again_whole() -> None:
    model, ids = llama(), prompt(24)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 24 + 24 + 19  # the prompt twice: 43 tokens are right
    assert not torch.equal(got, expected)  # no error, other tokens


def test_ours_computes_one_token_and_gives_the_same_answer() -> None:
    model, ids = llama(), prompt(24)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        model(ids, past_key_values=cache)
        got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert attachment.stats.tokens_computed == 1
    assert cache.num_tokens == 24 + 19
    assert torch.equal(got, expected)
