"""A retrofitted model on disk, attaching and undoing."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from deciding import control, deciding_model, some_ids
from safetensors.torch import load_file
from small import small_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import mnemon
from mnemon.compression import Compression, compression_of
from mnemon.errors import LearnedMemoryError
from mnemon.memory import (
    attach_compression,
    detach_compression,
    load_retrofitted,
    save_retrofitted,
)
from mnemon.memory.retrofitting.adapter import ADAPTER_NAME, read_adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CASES = (("dms", 4, "projection"), ("dms", 4, "neuron"), ("dmc", 12, "neuron"))
cases = pytest.mark.parametrize(("method", "window", "source"), CASES)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_decided_is_the_plain_model_bit_for_bit(family: str, implementation: str) -> None:
    ids = some_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for method in ("dms", "dmc"):
        model = small_model(family)
        model.set_attn_implementation(implementation)
        if method == "dmc":
            # Its neuron, and the one that positions mix it with, say nothing: nothing is lost.
            for layer in model.model.layers:
                weights = layer.self_attn.k_proj
                weights.weight.data.view(2, 8, -1)[:, [3, 7]] = 0
                if weights.bias is not None:
                    weights.bias.data.view(2, 8)[:, [3, 7]] = 0
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits, model(ids).logits
        attach_compression(model, Compression.named(method))
        with torch.no_grad():
            got = model(ids, attention_mask=mask).logits, model(ids).logits
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        detach_compression(model)


@cases
def test_detach_leaves_nothing(method: str, window: int, source: str) -> None:
    model, ids = small_model(), some_ids(1, 30)
    expected, names = logits(model, ids), list(model.state_dict())
    config, attributes = model.config.to_dict(), sorted(vars(model))
    modules = [type(module) for module in model.modules()]
    attach_compression(model, Compression.named(method, window=window, source=source, offset=1.0))
    assert not torch.equal(logits(model, ids), expected)
    with pytest.raises(LearnedMemoryError, match="already"):
        attach_compression(model, Compression.named("dms"))
    detach_compression(model)
    assert torch.equal(logits(model, ids), expected)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert sorted(vars(model)) == attributes
    assert [type(module) for module in model.modules()] == modules
    assert all("forward" not in vars(module) for module in model.modules())
    detach_compression(model)


@cases
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family: str, method: str, window: int, source: str, tmp_path: Path) -> None:
    model = deciding_model(family, method, window, source=source, dtype=torch.float32)
    ids = some_ids(2, 40)
    expected = logits(model, ids)
    save_retrofitted(model, tmp_path / "out", facts={"steps": 3})
    loaded = load_retrofitted(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), expected)
    assert control(loaded).compression == control(model).compression
    assert read_adapter(tmp_path / "out")[2] == {"steps": 3}
    # A normal model folder: no name in it that a plain model does not have.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) <= set(plain.state_dict())
    assert compression_of(plain.config) == control(model).compression
    again = load_retrofitted(tmp_path / "out", plain)
    assert again is plain
    assert torch.equal(logits(again, ids), expected)
    half = load_retrofitted(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        half(ids, past_key_values=mnemon.Cache(half.config))


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    model = deciding_model(dtype=torch.float32)
    with pytest.raises(LearnedMemoryError, match="does not compress"):
        save_retrofitted(small_model(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(LearnedMemoryError, match="not there"):
        load_retrofitted(tmp_path)
    folder = save_retrofitted(model, tmp_path / "out")
    adapter = folder / ADAPTER_NAME
    good = adapter.read_bytes()

    for bad in (b"", good[: len(good) // 2], b"PK\x03\x04" + good, good[:8] + b"!" + good[9:]):
        adapter.write_bytes(bad)
        with pytest.raises(LearnedMemoryError, match="cannot be read"):
            load_retrofitted(folder)
    adapter.write_bytes(good.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(LearnedMemoryError, match="version 9"):
        load_retrofitted(folder)
    adapter.write_bytes(good)

    wider = deciding_model(dtype=torch.float32, hidden_size=64)
    detach_compression(wider)
    with pytest.raises(LearnedMemoryError, match="another model"):
        load_retrofitted(folder, wider)
    config = json.loads((folder / "config.json").read_text())
    config["mnemon_memory"]["window"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LearnedMemoryError, match="different runs"):
        load_retrofitted(folder)


def test_other_models_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(LearnedMemoryError, match="GPT2Attention"):
        attach_compression(model, Compression.named("dms"))


@pytest.mark.parametrize(
    "entries",
    [
        {"method": "h2o"}, {"method": "dmc", "source": "projection"}, {"window": -1},
        {"method": "dmc", "window": 0}, {"window": 1.5}, {"ratio": 0.5}, {"offset": float("nan")},
        {"factor": "much"}, {"other": 1},
    ],
)  # fmt: skip
def test_settings_are_checked(entries: dict[str, object]) -> None:
    with pytest.raises(LearnedMemoryError) as caught:
        Compression.of({"method": "dms", "window": 4, "source": "neuron", **entries})
    assert len(str(caught.value)) > 30
    with pytest.raises(LearnedMemoryError):
        Compression.of({"method": "dms"})


@cases
def test_copies_and_pickles_refer_to_themselves(method: str, window: int, source: str) -> None:
    model = deciding_model(method=method, window=window, source=source, dtype=torch.float32)
    ids = some_ids(1, 30)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        control(twin).recording = True
        logits(twin, ids)
        assert control(twin).records
        assert not control(model).records
        for weight in twin.parameters():
            weight.data.zero_()
    assert torch.equal(logits(model, ids), expected)


def test_state_dicts_round_trip_before_the_first_forward() -> None:
    model, other = deciding_model(seed=1), deciding_model(seed=2)
    other.load_state_dict(model.state_dict())
    ids = some_ids(2, 20)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    model, ids = deciding_model(), some_ids(3, 40)
    together = logits(model, ids)
    for row in range(3):
        alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
