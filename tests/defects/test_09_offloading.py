"""Keys and values that do not stay on the device."""

import pytest
import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt
from mnemon.errors import RecipeError


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_transformers_offloads_on_cuda_only() -> None:
    model, ids = llama(), prompt(8)
    with pytest.raises((RuntimeError, AssertionError, ValueError, NotImplementedError)):
        model(ids, past_key_values=DynamicCache(config=model.config, offloading=True))


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_ours_says_that_it_is_not_there_yet(tier: str) -> None:
    with pytest.raises(RecipeError, match=tier) as caught:
        mnemon.Cache(llama().config, tier)
    assert "static" in str(caught.value)  # and names what is
