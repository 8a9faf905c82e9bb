"""A length that was saved for later."""

import torch
from transformers import StaticCache

import mnemon
from binding_models import llama, prompt


def test_transformers_static_length_changes_behind_your_back() -> None:
    model, ids = llama(), prompt(25)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :20], past_key_values=cache)
    saved = cache.get_seq_length()
    model(ids[:, 20:], past_key_values=cache)
    assert isinstance(saved, torch.Tensor)
    assert int(saved) == 25  # it was 20


def test_ours_is_an_int() -> None:
    model, ids = llama(), prompt(25)
    for recipe in ("", "static(64)"):
        cache = mnemon.Cache(model.config, recipe)
        model(ids[:, :20], past_key_values=cache)
        saved = (cache.get_seq_length(), cache.num_tokens, cache.num_stored)
        model(ids[:, 20:], past_key_values=cache)
        assert saved == (20, 20, 20)
        assert all(type(length) is int for length in saved)
