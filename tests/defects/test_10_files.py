"""A cache that outlives its process."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import mnemon
from binding_models import llama, prompt


def test_transformers_has_no_way_to_save() -> None:
    assert not any(hasattr(DynamicCache, name) for name in ("save", "load", "save_pretrained"))


def test_torch_refuses_to_load_what_it_saved(tmp_path: Path) -> None:
    model, ids = llama(), prompt(8)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    torch.save(cache, tmp_path / "cache.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "cache.pt")


def test_ours_comes_back_with_its_tokens(tmp_path: Path) -> None:
    model, ids = llama(), prompt(24)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        mnemon.prefill(model, ids[:, :20], cache)
        cache.save(tmp_path / "prompt.safetensors")
        loaded = mnemon.load_cache(tmp_path / "prompt.safetensors", model)
        got = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=loaded)
        assert attachment.stats.tokens_reused == 20
    assert torch.equal(got, expected)
