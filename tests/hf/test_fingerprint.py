"""A fingerprint is the same for the same model and differs for any other."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import mnemon
from mnemon.errors import DamagedFile, ModelError
from mnemon.hf import fingerprint as module
from mnemon.hf.fingerprint import Fingerprint, config_fingerprint, fingerprint
from releases import since

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(seed: int = 0, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | fields)).eval()


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
             {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, **sizes)).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def jamba() -> PreTrainedModel:
    torch.manual_seed(0)
    config = JambaConfig(
        **SMALL, num_experts=2, mamba_d_state=4, mamba_expand=1, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False,
    )  # fmt: skip
    return JambaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, bart, t5, jamba])
def test_survives_saving_and_loading_the_model(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    load = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    other = load.from_pretrained(tmp_path)
    assert fingerprint(model) == fingerprint(other)
    assert fingerprint(model).differences(fingerprint(other)) == []
    assert len({fingerprint(make()) for _ in range(2)}) == 1


def test_is_the_same_in_another_process(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "from mnemon.hf.fingerprint import fingerprint\n"
        "found = fingerprint(AutoModelForCausalLM.from_pretrained(sys.argv[1]))\n"
        "print(found.weights, found.config_hash)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    expected = fingerprint(model)
    assert result.stdout.split() == [expected.weights, expected.config_hash]


def test_attaching_changes_nothing() -> None:
    model = llama()
    before = fingerprint(model)
    with mnemon.attach(model):
        assert fingerprint(model) == before
    assert fingerprint(model) == before


def test_what_does_not_shape_the_cache_does_not_count() -> None:
    model = llama()
    before = fingerprint(model)
    model.config._name_or_path = "somewhere/else"
    model.config.use_cache = False
    model.config.attention_dropout = 0.5
    model.config.eos_token_id = 7
    model.config.temperature = 0.1
    model.config.architectures = ["Other"]
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 3
    model.train().requires_grad_(False)
    assert fingerprint(model) == before


def test_the_base_model_and_its_compiled_form_count_as_the_model() -> None:
    model = llama()
    assert fingerprint(model.model) == fingerprint(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == fingerprint(model)
    base = LlamaModel(model.config)
    base.load_state_dict(model.model.state_dict())
    assert fingerprint(base) == fingerprint(model)


def test_memory_layout_does_not_count() -> None:
    model = llama()
    before = fingerprint(model)
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = nn.Parameter(weight.detach().t().contiguous().t())
        assert not layer.mlp.up_proj.weight.is_contiguous()
    assert fingerprint(model) == before


def test_tying_after_loading_does_not_count() -> None:
    model = t5()
    before = fingerprint(model)
    shared = model.shared.weight
    model.encoder.embed_tokens.weight = nn.Parameter(shared.detach().clone())
    assert fingerprint(model) == before


def test_other_weights_of_any_tensor_count() -> None:
    model = llama()
    before = fingerprint(model)
    for name, parameter in model.model.named_parameters():
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
        found = fingerprint(model)
        assert before.differences(found) == ["the same config and dtype, but other weights"], name
        with torch.no_grad():
            parameter.copy_(original)
    assert fingerprint(model) == before
    assert fingerprint(llama(seed=1)).weights != before.weights


def test_an_adapter_counts() -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.down = nn.Linear(inner.in_features, 2, bias=False)

    model = llama()
    before = fingerprint(model)
    attention = model.model.layers[0].self_attn
    attention.k_proj = Adapted(attention.k_proj)
    assert fingerprint(model).weights != before.weights


def test_a_saved_buffer_counts() -> None:
    model = llama()
    model.model.register_buffer("scale", torch.ones(3))
    before = fingerprint(model)
    model.model.scale.mul_(2)
    assert fingerprint(model).weights != before.weights


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 against 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 against 4"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta 10000.0 against 500000.0",
            marks=since(5, 14),
        ),
        pytest.param({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 against 1e-05"),
        ({"attention_bias": True}, "attention_bias False against True"),
    ],
)  # fmt: skip
def test_another_config_is_described(fields: dict[str, Any], expected: str) -> None:
    assert expected in fingerprint(llama()).differences(fingerprint(llama(**fields)))


def test_another_dtype_is_described_as_that() -> None:
    model = llama()
    before = fingerprint(model)
    assert before.differences(fingerprint(model.bfloat16())) == ["dtype float32 against bfloat16"]


def test_another_architecture_is_described_as_that() -> None:
    assert fingerprint(llama()).differences(fingerprint(bart()))[0] == (
        "model type 'llama' against 'bart'"
    )


def test_a_config_alone_matches_any_weights() -> None:
    model = llama()
    alone = config_fingerprint(model.config, torch.float32)
    assert alone.weights is None
    assert alone.matches(fingerprint(model))
    assert alone.matches(fingerprint(llama(seed=1)))
    assert not alone.matches(fingerprint(llama(num_hidden_layers=3)))
    assert not alone.matches(fingerprint(llama().bfloat16()))
    assert config_fingerprint(model.config, None).matches(fingerprint(llama().bfloat16()))


def test_infinity_in_a_config_is_json() -> None:
    config = LlamaConfig(**SMALL)
    config.time_step_limit = (0.0, float("inf"))
    found = config_fingerprint(config, None)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(ModelError, match=r"embed_tokens.weight' is on the meta device.*load"):
        fingerprint(model)


@pytest.mark.parametrize("thing", [None, nn.Linear(2, 2), {"config": 1}])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(ModelError, match="a transformers PreTrainedModel was expected"):
        fingerprint(thing)


def test_weights_in_wrapper_tensors() -> None:
    """Quantized weights come as tensor subclasses around several plain tensors."""
    from torch.testing._internal.two_tensor import TwoTensor

    def model_with(extra: float) -> PreTrainedModel:
        model = llama()
        weight = model.model.layers[0].mlp.up_proj.weight.detach()
        wrapped = TwoTensor(weight, weight * 2 + extra)
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(wrapped, requires_grad=False)
        return model

    assert fingerprint(model_with(0.0)) == fingerprint(model_with(0.0))
    assert fingerprint(model_with(0.0)).weights != fingerprint(model_with(1.0)).weights


def test_many_tensors_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{i:05}" for i in range(5000)] + ["token_embed"]
    chosen = module._chosen(names)
    assert 5000 in chosen
    assert len(chosen) <= module._MAX_TENSORS + 1
    gaps = sorted(chosen)
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= 5


def test_samples_reach_all_rows_and_columns() -> None:
    """An even stride would meet the same columns of a matrix again and again."""
    marked = torch.arange(4096 * 4096, dtype=torch.int64).view(4096, 4096)
    picked = module._sample(marked).view(torch.int64)
    assert len(picked) == module._SAMPLES
    assert len(set((picked // 4096).tolist())) == module._SAMPLES
    assert len(set((picked % 4096).tolist())) == module._SAMPLES
    assert torch.equal(module._sample(marked.t().contiguous().t()), module._sample(marked))


def test_a_billion_parameters_take_milliseconds() -> None:
    """1.1 billion bfloat16 parameters; the memory is not even touched outside of the samples."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fingerprint(model)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # 7 ms on a quiet machine


def test_round_trips_through_json() -> None:
    found = fingerprint(llama())
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("broken", [None, [], {}, {"model_type": 3}, {"config": "x"}])
def test_an_unreadable_description_is_damage(broken: Any) -> None:
    with pytest.raises(DamagedFile, match="unreadable"):
        Fingerprint.from_dict(broken)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/home/somebody/private/my-model/", "my-model"),
        ("./models/mine", "mine"),
        ("~/models/mine", "mine"),
        ("models/by/me", "me"),
        ("", ""),
    ],
)
def test_names_say_no_private_path(path: str, name: str) -> None:
    model = llama()
    model.config._name_or_path = path
    assert fingerprint(model).name == name
