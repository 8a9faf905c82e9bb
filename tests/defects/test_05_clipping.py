"""Keys that grow after the first update."""

import torch
from transformers.cache_utils import QuantizedCache

import mnemon
from binding_models import llama, mistral


def _growing() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    small = torch.randn(1, 2, 4, 8)
    return small, small * 50


def test_transformers_fp8_freezes_its_scale_and_clips() -> None:
    small, large = _growing()
    cache = QuantizedCache("fp8", llama().config)
    cache.update(small, small, 0)
    keys, _ = cache.update(large, large, 0)
    returned = keys[:, :, 4:].nan_to_num(0.0)  # beyond its range fp8 clips, or gives NaN
    assert float(returned.abs().max()) < float(large.abs().max()) / 10


def test_ours_returns_every_bit() -> None:
    small, large = _growing()
    for model in (llama(), mistral(16)):
        for recipe in ("", "static(16)"):
            cache = mnemon.Cache(model.config, recipe)
            cache.update(small, small, 0)
            keys, values = cache.update(large, large, 0)
            assert torch.equal(keys[:, :, :8], torch.cat([small, large], dim=2))
            assert torch.equal(values[:, :, :8], torch.cat([small, large], dim=2))
