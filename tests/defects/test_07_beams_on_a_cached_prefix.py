"""A prefix cached for one row, then beams or several samples."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import mnemon
from binding_models import counted, llama, num_computed, prompt

SEVERAL: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]


@pytest.mark.parametrize("options", SEVERAL, ids=lambda o: "-".join(o))
def test_transformers_crashes(options: dict[str, Any]) -> None:
    model, ids = llama(), prompt(20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        model.generate(ids, max_new_tokens=8, past_key_values=cache, **options)


@pytest.mark.parametrize("options", SEVERAL, ids=lambda o: "-".join(o))
def test_ours_computes_the_prefix_once(options: dict[str, Any]) -> None:
    model, ids = llama(), prompt(20)
    torch.manual_seed(5)
    with counted(model) as theirs:
        expected = model.generate(ids, max_new_tokens=8, **options)
    assert theirs[0] == (3, 20)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        with counted(model) as ours:
            model(ids[:, :15], past_key_values=cache)
            torch.manual_seed(5)
            got = model.generate(ids, max_new_tokens=8, past_key_values=cache, **options)
    assert torch.equal(got, expected)
    assert num_computed(theirs) - num_computed(ours) == 3 * 20 - (19 + 3)
