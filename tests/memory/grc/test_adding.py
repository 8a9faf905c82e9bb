"""`add_grc` on transformers' models: where it goes, that it is whole, and that it is undone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging

from mnemon.errors import LearnedMemoryError
from mnemon.hf import grc_sites
from mnemon.memory.grc import GRC, GRCAttention, SelfAttention, add_grc, remove_grc

SMALL: dict[str, Any] = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def bert(implementation: str = "sdpa", **more: Any) -> nn.Module:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=50,
        attn_implementation=implementation,
        **{**SMALL, **more},
    )
    return BertModel(config)


def bart(implementation: str = "sdpa") -> nn.Module:
    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=50,
        dropout=0.0,
        attn_implementation=implementation,
    )
    return BartModel(config)


def vit(implementation: str = "sdpa") -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        attn_implementation=implementation,
        **SMALL,
    )
    return ViTModel(config)


MODELS: dict[str, Callable[..., nn.Module]] = {"bert": bert, "bart": bart, "vit": vit}
each_model = pytest.mark.parametrize("name", list(MODELS))
each_variant = pytest.mark.parametrize("variant", ["paper", "repo"])


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator).to(dtype)}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {
        "input_ids": torch.randint(3, 50, (2, 9), generator=generator),
        "attention_mask": mask,
    }


def made(name: str, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](implementation).eval()


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    found: Tensor = model(**inputs(name, dtype)).last_hidden_state
    return found


def trained(model: nn.Module, name: str) -> None:
    """One step of training, so that the buffers are not zero; weights stay."""
    model.train()
    with torch.no_grad():
        run(model, name)
    model.eval()


@each_model
@each_variant
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_in_and_out(name: str, variant: str, implementation: str) -> None:
    model = made(name, implementation)
    classes = [type(module) for module in model.modules()]
    keys, plain = list(model.state_dict()), run(model, name)
    options: dict[str, Any] = {"variant": variant, "memory_length": 7}
    grc = add_grc(model, **options, initial_lambda=-math.inf)
    assert len(grc.report.places) == 2
    trained(model, name)
    assert torch.equal(run(model, name), plain)
    for branch in grc.branches.values():
        assert branch.cache.cache.abs().sum() > 0
        branch.lambdas.data.zero_()
    assert not torch.equal(run(model, name), plain)
    grc.remove()
    grc.remove()
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, name), plain)


@each_model
def test_implementations_agree(name: str) -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        model = made(name, implementation)
        torch.manual_seed(1)
        grc = add_grc(model, memory_length=6, variant="repo")
        trained(model, name)
        found.append((run(model, name), next(iter(grc.branches.values())).cache.cache))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "bart"])
def test_padding_reaches_neither_memory_nor_output(name: str, implementation: str) -> None:
    """A batch with padding, against the same texts one by one without it."""
    model = made(name, implementation).double()
    torch.manual_seed(1)
    grc = add_grc(model, memory_length=6, variant="repo")
    trained(model, name)
    text = inputs(name)
    encoder = model.encoder if name == "bart" else model
    padded = encoder(**text).last_hidden_state
    alone = encoder(input_ids=text["input_ids"][1:, :6]).last_hidden_state
    torch.testing.assert_close(padded[1, :6], alone[0])
    buffers = [branch.cache.cache.clone() for branch in grc.branches.values()]
    grc.reset()
    steps = []
    for row, length in ((0, 9), (1, 6)):
        with torch.no_grad():
            encoder.train()(input_ids=text["input_ids"][row : row + 1, :length])
        steps.append([branch.cache.cache.clone() for branch in grc.branches.values()])
        grc.reset()
    for buffer, one, two in zip(buffers, *steps, strict=True):
        torch.testing.assert_close(buffer, (one + two) / 2)


@each_model
def test_copies_pickles_and_saved_weights(name: str, tmp_path: Path) -> None:
    model = made(name)
    plain = run(model, name)
    grc = add_grc(model, memory_length=6)
    trained(model, name)
    wanted = run(model, name)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert torch.equal(run(other, name), wanted)
        remove_grc(other)
        assert torch.equal(run(other, name), plain)
    assert torch.equal(run(model, name), wanted)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    grc.save(tmp_path / "memories.safetensors")
    torch.manual_seed(9)
    for whole in (True, False):
        if whole:
            fresh = MODELS[name]().eval()
            again = add_grc(fresh, memory_length=6)
            fresh.load_state_dict(model.state_dict())
        else:
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()  # it lists the memories as unexpected
            fresh = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
            logging.set_verbosity(verbosity)
            again = add_grc(fresh, memory_length=6)
            assert not torch.equal(run(fresh, name), wanted)
            again.load(tmp_path / "memories.safetensors")
        assert torch.equal(run(fresh, name), wanted)
    again.remove()
    other = add_grc(fresh, memory_length=5)
    with pytest.raises(LearnedMemoryError, match=r"cache.cache, this model \(5, 16\)"):
        other.load(tmp_path / "memories.safetensors")
    with pytest.raises(LearnedMemoryError, match="cannot be read"):
        other.load(tmp_path / "config.json")
    other.remove()
    with pytest.raises(LearnedMemoryError, match="save before remove"):
        other.save(tmp_path / "x")


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_what_save_pretrained_writes_is_a_state_dict(name: str, tmp_path: Path) -> None:
    model = made(name)
    add_grc(model, memory_length=6)
    trained(model, name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    torch.manual_seed(9)
    fresh = MODELS[name]().eval()
    add_grc(fresh, memory_length=6)
    missing = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert all("embed_tokens" in key for key in missing.missing_keys)  # BART ties them
    assert torch.equal(run(fresh, name), run(model, name))


@each_model
def test_half_precision_and_training(name: str) -> None:
    model = made(name)
    add_grc(model, memory_length=6, variant="repo")
    model.to(torch.bfloat16).train()
    out = run(model, name, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "grc" in n)


@each_model
def test_gradient_checkpointing(name: str) -> None:
    """Same gradients and buffers as without."""
    found = []
    for checkpointing in (False, True):
        model = made(name)
        torch.manual_seed(1)
        grc = add_grc(model, memory_length=6)
        if checkpointing:
            on = getattr(model, "activation_checkpointing_enable", None)
            (on or model.gradient_checkpointing_enable)()  # type: ignore[operator]
        model.train()
        for _ in range(2):
            model.zero_grad()
            run(model, name).square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((gradients, [b.cache.cache for b in grc.branches.values()]))
    torch.testing.assert_close(found[1], found[0])


def test_compiled() -> None:
    torch.compiler.reset()
    model = made("bert")
    torch.manual_seed(1)
    grc = add_grc(model, memory_length=6)
    other = copy.deepcopy(model)
    compiled = torch.compile(model.train(), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(run(compiled, "bert"), run(other.train(), "bert"))
    for branch in grc.branches.values():
        assert branch.cache.cache.abs().sum() > 0
    torch.testing.assert_close(run(model.eval(), "bert"), run(other.eval(), "bert"))


@pytest.mark.parametrize("size", [(12, 12), (16, 16), (8, 16)])
def test_images_of_another_size(size: tuple[int, int]) -> None:
    model = made("vit")
    add_grc(model, memory_length=6, variant="repo")
    found = model(torch.randn(1, 3, *size), interpolate_pos_encoding=True)
    assert found.last_hidden_state.shape == (1, size[0] * size[1] // 16 + 1, 32)


def test_recorded_attentions_stay() -> None:
    model = made("bert", "eager")
    plain = model(**inputs("bert"), output_attentions=True).attentions
    add_grc(model, initial_lambda=-math.inf)
    found = model(**inputs("bert"), output_attentions=True).attentions
    assert len(found) == len(plain) == 2
    assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))


def test_the_report() -> None:
    model = made("bart")
    before = sum(p.numel() for p in model.parameters())
    grc = add_grc(model, ratio=0.3, memory_length=6, layers=[-1])
    assert isinstance(grc, GRC)
    (place,) = grc.report.places
    assert (place.name, place.kind) == ("encoder.layers.1.self_attn", "BartAttention")
    assert (place.num_heads, place.kept, place.memory_length) == (4, 8, 6)
    assert place.ratio == 0.25
    assert place.buffer_bytes == 6 * 8 * 4
    after = sum(p.numel() for p in model.parameters())
    assert grc.report.num_parameters == place.num_parameters == after - before
    assert grc.report.as_dict()["places"][0]["kept"] == 8
    for text in ("encoder.layers.1.self_attn", "6 x 8", f"{place.num_parameters:,}"):
        assert text in str(grc)
    assert not any("grc" in n for n, _ in model.decoder.named_modules())  # type: ignore[union-attr]


def test_refusals_leave_the_model_alone() -> None:
    gpt = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    decoder = bert(is_decoder=True)
    for model in (gpt, decoder, nn.Linear(3, 3)):
        with pytest.raises(LearnedMemoryError, match="BERT"):
            add_grc(model)
    model = made("bert")
    plain = run(model, "bert")
    for layers in ([2], [], [-3]):
        with pytest.raises(LearnedMemoryError, match="some of 0 to 1"):
            add_grc(model, layers=layers)
    add_grc(model, initial_lambda=-math.inf)
    with pytest.raises(LearnedMemoryError, match="remove_grc"):
        add_grc(model)
    assert not grc_sites.find_sites(model)
    remove_grc(model)
    remove_grc(model)
    assert torch.equal(run(model, "bert"), plain)


def test_an_attention_born_with_a_memory_keeps_it() -> None:
    both = nn.Sequential(GRCAttention(8, 2), SelfAttention(8, 2))
    grc = add_grc(both)
    assert list(grc.branches) == ["1"]
    grc.remove()
    assert both[0].memory is not None
    assert both[1].memory is None


def test_every_kind_of_mask_tells_the_same() -> None:
    """What sdpa, eager, flash and flex attention are given for one padded batch."""
    from torch.nn.attention.flex_attention import create_block_mask

    hidden = torch.zeros(2, 9, 4)
    two = inputs("bert")["attention_mask"]
    wanted = two.bool()
    four = wanted[:, None, None, :].expand(2, 1, 9, 9)
    added = torch.zeros(2, 1, 9, 9).masked_fill(~four, torch.finfo(torch.float32).min)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return wanted[row, key]

    block = create_block_mask(visible, 2, None, 9, 9, device="cpu")
    for mask in (two, wanted, four, added, added.masked_fill(~four, -math.inf), block):
        assert torch.equal(grc_sites._real(mask, hidden), wanted)
    assert grc_sites._real(None, hidden) is None
