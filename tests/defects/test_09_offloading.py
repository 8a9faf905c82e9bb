"""Keys and values that do not stay on the device."""

import pytest
import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_transformers_offloads_on_cuda_only() -> None:
    model, ids = llama(), prompt(8)
    with pytest.raises((RuntimeError, AssertionError, ValueError, NotImplementedError)):
        model(ids, past_key_values=DynamicCache(config=model.config, offloading=True))


@pytest.mark.parametrize("tier", ["host", "disk(memory=1MiB, segment=64)"])
@pytest.mark.parametrize("format_", ["", "int8 + "])
def test_ours_offloads_wherever_the_model_is(tier: str, format_: str) -> None:
    model, ids = llama(), prompt(300)
    plain = mnemon.Cache(model.config, format_.removesuffix(" + "))
    expected = model.generate(ids, past_key_values=plain, max_new_tokens=8, do_sample=False)
    cache = mnemon.Cache(model.config, format_ + tier)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)
