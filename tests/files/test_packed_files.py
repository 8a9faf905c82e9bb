"""Packed caches in files: bit for bit, and refused when damaged."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import mnemon
from mnemon.cache import Cache
from mnemon.errors import DamagedFile, FileError
from mnemon.files import load_cache, read_summary
from mnemon.layers import LayerState

_SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**_SMALL)).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=100)).eval()
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@torch.no_grad()
def filled(model: PreTrainedModel, recipe: str) -> Cache:
    cache = Cache(model.config, recipe)
    ids = torch.arange(2 * 150).view(2, 150) % 60 + 3
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given = {"input_ids": ids[:, :7], "decoder_input_ids": ids}
    with mnemon.attach(model):
        model(**given, past_key_values=cache)
    return cache


def tensors(state: LayerState) -> dict[str, torch.Tensor]:
    return dict(state.tensors)


@pytest.mark.parametrize("recipe", ["int4", "int8/int2(residual=3)", "fp8(rotate=yes)"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bart"])
def test_a_packed_cache_comes_back_bit_for_bit(name: str, recipe: str, tmp_path: Path) -> None:
    model, path = build(name), tmp_path / "packed.cache"
    cache = filled(model, recipe)
    cache.save(path)
    assert path.stat().st_size < cache.nbytes + 16384
    for verify in ("eager", "lazy"):
        back = load_cache(path, model, verify=verify)
        assert back.recipe == cache.recipe
        assert back.nbytes == cache.nbytes
        assert torch.equal(back.tokens, cache.tokens)
        for group, saved in zip(back._groups(), cache._groups(), strict=True):
            for one, other in zip(group, saved, strict=True):
                assert one.kind == other.kind
                held, expected = tensors(one.state()), tensors(other.state())
                assert held.keys() == expected.keys()
                assert all(torch.equal(held[key], expected[key]) for key in held)
    ids = torch.full((2, 1), 9)
    with torch.no_grad():
        if name == "bart":
            step = {"input_ids": ids, "decoder_input_ids": ids}
        else:
            step = {"input_ids": ids}
        got = model(**step, past_key_values=back).logits
        assert torch.equal(got, model(**step, past_key_values=cache).logits)


def test_what_a_summary_says(tmp_path: Path) -> None:
    path = tmp_path / "packed.cache"
    cache = filled(build("mistral"), "int4/int2")
    cache.save(path)
    found = read_summary(path, verify=True)
    assert found.recipe == "int4/int2"
    assert found.dtype == "float32"
    assert [(layer.kind, layer.count) for layer in found.layers] == [("packed_window", 2)]
    assert found.layers[0].nbytes == cache.nbytes


def test_an_empty_packed_cache_is_saved_too(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "empty.cache"
    Cache(model.config, "int4").save(path, model=model)
    assert load_cache(path, model).num_tokens == 0


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "packed.cache"
    filled(model, "int4(residual=0)").save(path)
    data = path.read_bytes()
    for place in range(len(data) - 1, len(data) // 8, -len(data) // 23):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(DamagedFile):
            load_cache(path, model)
    for count in (0, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:count])
        with pytest.raises(FileError):
            load_cache(path, model)


def test_another_scheme_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a version whose default was another one is not read as something else."""
    from mnemon import schemes

    model, path = build("llama"), tmp_path / "packed.cache"
    filled(model, "int4").save(path)
    other = {**schemes._DEFAULT_KEYS, "int4": schemes.SideFormat(code="int4", rotated=True)}
    monkeypatch.setattr(schemes, "_DEFAULT_KEYS", other)
    with pytest.raises(DamagedFile, match="another version's default"):
        load_cache(path, model)
