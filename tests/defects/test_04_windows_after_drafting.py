"""A sliding window after prompt lookup or assisted decoding."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import mnemon
from binding_models import mistral, prompt

WINDOW = 8


def _draft_then_decode(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    ids = prompt(10).repeat(1, 2)
    options = {"do_sample": False, "past_key_values": cache}
    drafted = model.generate(ids, max_new_tokens=6, prompt_lookup_num_tokens=3, **options)
    result: torch.Tensor = model.generate(drafted, max_new_tokens=40, **options)
    return result


def test_transformers_window_grows_without_limit() -> None:
    model = mistral(WINDOW)
    cache = DynamicCache(config=model.config)
    _draft_then_decode(model, cache)
    assert cache.layers[0].record_past
    assert cache.layers[0].keys.shape[-2] > 5 * WINDOW


def test_ours_is_bounded_again() -> None:
    model = mistral(WINDOW)
    expected = _draft_then_decode(model, DynamicCache(config=model.config))
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        assert torch.equal(_draft_then_decode(model, cache), expected)
    assert not cache.is_recording_past(0)
    assert cache.num_stored == WINDOW - 1
