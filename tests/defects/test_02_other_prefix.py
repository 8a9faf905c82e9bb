"""A cache that holds other tokens than the prompt's, or more of them."""

import pytest
import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt
from mnemon.errors import PrefixMismatch

CACHED = {"foreign": prompt(12, seed=2), "longer": prompt(30)}


@pytest.mark.parametrize("case", CACHED)
def test_transformers_uses_it_silently(case: str) -> None:
    model, ids = llama(), prompt(20)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(CACHED[case], past_key_values=cache)
    got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("case", CACHED)
def test_ours_keeps_what_is_common_or_refuses(case: str) -> None:
    model, ids = llama(), prompt(20)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        model(CACHED[case], past_key_values=cache)
        refused = cache.fork()
        got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(got, expected)
    with mnemon.attach(model, on_mismatch="error"), pytest.raises(PrefixMismatch):
        model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=refused)
