"""Arguments that moved or went."""

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils, modeling_rope_utils
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .test_names import CONFIG, GROWING, Make, as_transformers, filled

pytestmark = pytest.mark.usefixtures("enabled")
OLD = transformers.__version__.startswith("4.")


@pytest.mark.parametrize("make", GROWING)
def test_mask_sizes_by_positions(make: Make) -> None:
    cache = filled(make)
    assert tuple(cache.get_mask_sizes(torch.arange(5, 8), 0)) == (8, 0)
    assert tuple(cache.get_mask_sizes(cache_position=torch.arange(5, 8), layer_idx=0)) == (8, 0)


def test_masks_by_their_old_names() -> None:
    config = transformers.LlamaConfig(**CONFIG.to_dict())
    config._attn_implementation = "eager"
    arguments: dict[str, Any] = {
        "config": config,
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "past_key_values": None,
        "position_ids": None,
    }
    mask = masking_utils.create_causal_mask(
        input_embeds=torch.zeros(2, 3, 8), cache_position=torch.arange(3), **arguments
    )
    seen = torch.ones(3, 3, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
    seen[0, :, 0] = False
    assert mask is not None
    # A row that sees nothing may be let see all: nobody reads it.
    assert torch.equal((mask == 0)[:, 0, 1:], seen[:, 1:])


@pytest.mark.skipif(OLD, reason="the release has an order of its own")
def test_a_static_cache_in_the_old_order() -> None:
    cache = StaticCache(CONFIG, 2, 9, "cpu", torch.float32)
    assert cache.get_max_length() == 9
    assert not cache.offloading
    assert StaticCache(CONFIG, 9).get_max_length() == 9
    assert StaticCache(CONFIG, max_batch_size=2, max_cache_len=9).get_max_length() == 9
    make = as_transformers(lambda cls, config: cls(config, 9, False))
    assert make(StaticCache, CONFIG).get_max_length() == 9


def test_a_dynamic_cache_with_a_number_of_layers() -> None:
    assert DynamicCache(2).get_seq_length() == 0
    assert DynamicCache(num_hidden_layers=2).get_seq_length() == 0
    assert DynamicCache(config=CONFIG).get_seq_length() == 0


def test_a_cache_without_arguments_is_for_classes_of_old_only() -> None:
    class Own(Cache):
        pass

    assert Own().layers == []
    with pytest.raises(ValueError, match="exactly one of"):
        Cache()


def test_rotations_called_default() -> None:
    table = modeling_rope_utils.ROPE_INIT_FUNCTIONS["default"]
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 16})
    inverse, factor = table(config, "cpu")
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert torch.equal(inverse, module.inv_freq)
    assert factor == 1.0
    assert "yarn" in modeling_rope_utils.ROPE_INIT_FUNCTIONS


def test_todays_models_load_as_ever(tmp_path: Any) -> None:
    config = transformers.GlmConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
        pad_token_id=0,
    )
    model, ids = transformers.GlmForCausalLM(config).eval(), torch.tensor([[5, 9, 13, 17]])
    model.save_pretrained(tmp_path)
    loaded = transformers.GlmForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_rope_scaling_depends_on_who_asks() -> None:
    config = transformers.LlamaConfig(**CONFIG.to_dict())
    assert config.rope_scaling is None
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    assert config.rope_scaling["type" if not OLD else "rope_type"] == "linear"
    assert config.rope_scaling["factor"] == 2.0
    ask = as_transformers(lambda config: config.rope_scaling)
    assert "type" not in ask(config)


@pytest.mark.skipif(OLD, reason="the release does it itself")
def test_generate_gives_tuples_when_asked() -> None:
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "eos_token_id": None})
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[5, 9, 13]])
    out = model.generate(
        ids,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        return_legacy_cache=True,
    )
    assert isinstance(out.past_key_values, tuple)
    assert out.past_key_values[0][0].shape == (1, 2, 5, 4)
    assert model.generate(ids, max_new_tokens=3, return_legacy_cache=True).shape == (1, 6)
