"""A forward pass that stops halfway, without mnemon.attach to put the cache back."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mnemon
from mnemon.errors import CacheError


class Stop(Exception):
    pass


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def interrupt(model: PreTrainedModel, ids: torch.Tensor, cache: mnemon.Cache, layer: int) -> None:
    def stop(*args: object) -> None:
        raise Stop

    handle = model.model.layers[layer].register_forward_pre_hook(stop)
    try:
        with pytest.raises(Stop):
            model(ids, past_key_values=cache)
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["", "int4", "host"])
@pytest.mark.parametrize("layer", [1, 2])
def test_going_on_is_refused_until_reset(model: PreTrainedModel, recipe: str, layer: int) -> None:
    cache = mnemon.Cache(model.config, recipe)
    ids = torch.arange(12)[None]
    model(ids[:, :8], past_key_values=cache)
    interrupt(model, ids[:, 8:9], cache, layer)
    for _ in range(2):
        with pytest.raises(CacheError, match=f"layer 0: 9, layer {layer}: 8"):
            model(ids[:, 9:10], past_key_values=cache)
    cache.reset()
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids, use_cache=False).logits, rtol=0, atol=0.05)


@torch.no_grad()
def test_an_interrupted_prefill_is_noticed_by_the_next_but_one(model: PreTrainedModel) -> None:
    cache = mnemon.Cache(model.config)
    ids = torch.arange(12)[None]
    interrupt(model, ids[:, :8], cache, 1)
    # An empty layer may be one that the model never uses.
    model(ids[:, 8:9], past_key_values=cache)
    with pytest.raises(CacheError, match="interrupted"):
        model(ids[:, 9:10], past_key_values=cache)


@torch.no_grad()
def test_attached_it_goes_on(model: PreTrainedModel) -> None:
    mnemon.attach(model)
    cache = mnemon.Cache(model.config)
    ids = torch.arange(12)[None]
    model(ids[:, :8], past_key_values=cache)
    interrupt(model, ids[:, 8:9], cache, 1)
    rest = model(ids[:, 8:], past_key_values=cache).logits
    whole = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)
