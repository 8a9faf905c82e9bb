"""Switching mnemon's attention on and off: one model at a time, and without a trace."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny import MODELS, SERVED, build, inputs, logits_of
from torch import nn

from mnemon.errors import CacheError
from mnemon.hf.attention import enable
from mnemon.hf.eager import disagreement, eager_function
from mnemon.hf.enabling import _asks_by_name
from releases import since


def traces(model: nn.Module) -> dict[str, tuple[int, dict]]:
    """Everything about a model's modules that enabling could have changed."""
    return {
        name: (id(module.__dict__.get("config")), dict(module.__dict__))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", SERVED)
def test_restoring_leaves_no_trace(name: str) -> None:
    model = build(name)
    before, config_before = traces(model), copy.deepcopy(model.config)
    restore = enable(model)
    assert traces(model) != before
    assert model.config.to_dict() == config_before.to_dict()
    restore.restore()
    assert traces(model) == before
    assert model.config._attn_implementation == config_before._attn_implementation
    restore.restore()  # again: nothing left to do


def test_an_exception_inside_the_block_restores_too() -> None:
    model = build("llama")
    before = traces(model)
    with pytest.raises(RuntimeError, match="in the middle"), enable(model):
        raise RuntimeError("in the middle")
    assert traces(model) == before


def test_enabling_twice_is_an_error_and_changes_nothing() -> None:
    model = build("llama")
    with enable(model):
        enabled = traces(model)
        with pytest.raises(CacheError, match="already uses mnemon's attention"):
            enable(model)
        assert traces(model) == enabled
    with enable(model) as again:
        assert len(again.served) == 2


def test_two_models_of_one_config_object_are_independent() -> None:
    config = MODELS["llama"]()
    first, second = tf.LlamaForCausalLM(config).eval(), tf.LlamaForCausalLM(config).eval()
    before = traces(second)
    restore_first = enable(first)
    assert traces(second) == before
    restore_second = enable(second)
    restore_first.restore()
    assert traces(second) != before
    assert first.model.layers[0].self_attn.config is config
    restore_second.restore()
    assert traces(second) == before


def test_a_copy_of_an_enabled_model_works_and_saves_like_the_original(tmp_path) -> None:
    model = build("llama")
    prompt = inputs()
    expected = logits_of(model, prompt)
    with enable(model):
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(twin, prompt), expected, rtol=1e-4, atol=1e-4)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_nested_configs_are_reached() -> None:
    text = {
        key: value for key, value in MODELS["llama"]().to_dict().items() if key != "torch_dtype"
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 32,
    }
    config = tf.LlavaConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={**vision, "model_type": "clip_vision_model"},
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    before = traces(model)
    with enable(model) as restore:
        assert sum("language_model" in name for name in restore.served) == 2
        assert sum("vision_tower" in name for name in restore.served) == 2
        assert config.text_config._attn_implementation == "sdpa"
    assert traces(model) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128),
            "an attention of its own",
        ),
        (
            tf.FalconConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
            ),
            "an attention of its own",
        ),
    ],
    ids=["bloom", "falcon"],
)
def test_models_without_the_interface_are_left_alone_and_reported(config, reason: str) -> None:
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    before = traces(model)
    with enable(model) as restore:
        assert restore.served == ()
        assert len(restore.left_alone) == 2
        assert all(reason in why for why in restore.left_alone.values())
        assert traces(model) == before


def test_other_implementations_are_left_alone() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config._attn_implementation_internal = "flash_attention_2"
    with enable(model) as restore:
        assert restore.served == ()
        assert all("flash_attention_2" in why for why in restore.left_alone.values())


@since(5, 14)
def test_code_that_asks_for_an_implementation_by_name_is_left_alone() -> None:
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert _asks_by_name(DeepseekV32Attention, "sdpa")
    assert _asks_by_name(GPT2Attention, "eager")
    assert not _asks_by_name(GPT2Attention, "sdpa")
    assert not _asks_by_name(LlamaAttention, "sdpa")


@since(5, 14)
def test_an_eager_function_that_does_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("gpt_oss")
    module = model.model.layers[0].self_attn
    assert disagreement(module) is None
    own = eager_function(module)
    assert own is not None

    def hotter(module, query, key, value, mask, scaling, **kwargs):
        return own(module, query, key, value, mask, scaling=scaling * 1.1, **kwargs)

    monkeypatch.setitem(type(module).forward.__globals__, own.__name__, hotter)
    assert "does something that mnemon's does not" in str(disagreement(module))
    with enable(model) as restore:
        assert restore.served == ()

    def without_sinks(module, *args, **kwargs):
        stand_in = SimpleNamespace(
            num_key_value_groups=module.num_key_value_groups,
            training=False,
            sinks=torch.full_like(module.sinks, -1e9),
        )
        return own(stand_in, *args, **kwargs)

    monkeypatch.setitem(type(module).forward.__globals__, own.__name__, without_sinks)
    assert "does something that mnemon's does not" in str(disagreement(module))
