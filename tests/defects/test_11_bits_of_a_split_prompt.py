"""The same prompt in one part and in two."""

import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt

LENGTH = 60


def test_transformers_gives_other_bits() -> None:
    model, ids = llama(), prompt(LENGTH)
    with torch.no_grad():
        whole = model(ids, past_key_values=DynamicCache(config=model.config)).logits[:, -1]
        differing = 0
        for split in range(1, LENGTH, 7):
            cache = DynamicCache(config=model.config)
            model(ids[:, :split], past_key_values=cache)
            logits = model(ids[:, split:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, whole)  # the same but for rounding
            differing += not torch.equal(logits, whole)
    assert differing > 0


def test_ours_does_not() -> None:
    model, ids = llama(), prompt(LENGTH)
    whole = mnemon.prefill(model, ids, mnemon.Cache(model.config), 16).logits
    for split in range(1, LENGTH, 7):
        cache = mnemon.Cache(model.config)
        mnemon.prefill(model, ids[:, :split], cache, 16)
        assert torch.equal(mnemon.prefill(model, ids, cache, 16).logits, whole)
