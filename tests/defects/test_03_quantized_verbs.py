"""crop, prompt lookup and row selection."""

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import QuantizedCache

import mnemon
from binding_models import llama, mistral, prompt


def test_transformers_quantized_cache_promises_and_raises() -> None:
    model, ids = llama(), prompt(10).repeat(1, 2)
    cache = QuantizedCache("fp8", model.config)
    model(ids, past_key_values=cache)
    assert cache.is_croppable
    with pytest.raises(IndexError):
        cache.crop(-1)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(IndexError):
        model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            prompt_lookup_num_tokens=3,
            past_key_values=QuantizedCache("fp8", model.config),
        )


@pytest.mark.parametrize("recipe", ["", "static(64)"])
@pytest.mark.parametrize("make", [llama, lambda: mistral(64)], ids=["llama", "mistral"])
def test_ours_do_what_they_say(make: Callable[[], PreTrainedModel], recipe: str) -> None:
    model, ids = make(), prompt(20, batch=3)
    cache = mnemon.Cache(model.config, recipe)
    model(ids, past_key_values=cache)
    assert cache.is_croppable
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    logits = model(ids[[2, 0], 15:], past_key_values=cache).logits
    expected = model(ids[[2, 0]], use_cache=False).logits[:, 15:]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("recipe", ["", "static(64)"])
def test_ours_draft(recipe: str) -> None:
    model, ids = llama(), prompt(10).repeat(1, 2)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    got = model.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        prompt_lookup_num_tokens=3,
        past_key_values=mnemon.Cache(model.config, recipe),
    )
    assert torch.equal(got, expected)
    assert not isinstance(mnemon.Cache(model.config), DynamicCache)
