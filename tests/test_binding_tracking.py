"""The token log follows every forward, and a broken forward leaves the cache as it was."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mnemon
from binding_models import bart, jamba, llama, mamba, mistral, prompt
from mnemon.binding.tracking import run_forward
from mnemon.hf import generate as hf
from releases import RELEASE


def _break_in_layer(model: PreTrainedModel, error: BaseException, after: int = 0) -> Any:
    """The last layer of the decoder raises once, in forward number `after` from now."""
    stack = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    calls = [0]

    def fail(module: object, args: object) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            raise error

    return stack.layers[-1].register_forward_pre_hook(fail)


ERRORS = [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), ValueError("other")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("num_cached", [0, 12])
@pytest.mark.parametrize("recipe", ["", "static(64)"])
def test_a_broken_forward_is_taken_back(error: BaseException, num_cached: int, recipe: str) -> None:
    model, ids = llama(), prompt(20)
    expected = model(ids, use_cache=False).logits[:, -1]
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config, recipe)
        if num_cached:
            model(ids[:, :num_cached], past_key_values=cache)
        handle = _break_in_layer(model, error)
        with pytest.raises(type(error)):
            model(ids[:, num_cached:], past_key_values=cache)
        handle.remove()
        assert {layer.num_tokens for layer in cache.layers} == {num_cached}
        assert torch.equal(cache.tokens, ids[:, :num_cached])
        logits = model(ids[:, num_cached:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("make", [lambda: mistral(8), mamba, jamba], ids=["win", "mamba", "jamba"])
def test_what_cannot_be_taken_back_is_emptied_and_said(make: Any) -> None:
    model, ids = make(), prompt(20)
    if RELEASE < (5, 14) and "Mistral" in type(model).__name__:
        pytest.skip("there windows keep what taking back the last append needs")
    name = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    stack = model.backbone if "Mamba" in type(model).__name__ else model.model
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        model(ids[:, :12], **{name: cache})
        handle = stack.layers[-1].register_forward_pre_hook(_raise)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt) as caught:
            model(ids[:, 12:13], **{name: cache})  # Mamba in 5.14 takes one at a time
        handle.remove()
        assert "The cache is now empty: pass the whole prompt again" in caught.value.__notes__[0]
        assert cache.num_tokens == 0
        assert cache.tokens.shape[1] == 0
        got = model.generate(ids, max_new_tokens=6, do_sample=False, **{name: cache})
    assert torch.equal(got, expected)


def _raise(module: object, args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 3])
def test_interrupting_generate(after: int) -> None:
    model, ids = llama(), prompt(20)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        handle = _break_in_layer(model, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
        handle.remove()
        held = 19 + after if after else 0
        assert {layer.num_tokens for layer in cache.layers} == {held}
        assert torch.equal(cache.tokens, expected[:, :held])
        got = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(got, expected)


def test_interrupting_an_encoder_decoder() -> None:
    model, ids = bart(), prompt(12)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for after in (0, 3):
        with mnemon.attach(model):
            cache = mnemon.Cache(model.config)
            handle = _break_in_layer(model, KeyboardInterrupt(), after)
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
            handle.remove()
            assert {layer.num_tokens for layer in cache.layers} == {after}
            got = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
        assert torch.equal(got, expected)


def test_interrupting_prefill_without_attach() -> None:
    model, ids = llama(), prompt(50)
    expected = mnemon.prefill(model, ids, mnemon.Cache(model.config), 16).logits
    cache = mnemon.Cache(model.config)
    handle = _break_in_layer(model, KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt):
        mnemon.prefill(model, ids, cache, 16)
    handle.remove()
    assert {layer.num_tokens for layer in cache.layers} == {32}
    done: list[int] = []
    logits = mnemon.prefill(model, ids, cache, 16, progress=lambda n, _: done.append(n)).logits
    assert done == [48, 50]  # it goes on where it was interrupted
    assert torch.equal(logits, expected)


def test_the_log_follows_forwards_however_they_are_called() -> None:
    model, ids = llama(), prompt(20)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        model(ids[:, :5], None, None, cache)  # by position
        model(input_ids=ids[:, 5:9], past_key_values=cache)
        model.forward(ids[:, 9:12], past_key_values=cache)  # not by __call__
        embeds = model.get_input_embeddings()(ids[:, 12:15])
        model(inputs_embeds=embeds, past_key_values=cache)
        model(ids[:, 15:], past_key_values=cache)
    expected = ids.clone()
    expected[:, 12:15] = -1
    assert torch.equal(cache.tokens, expected)
    assert cache.num_known_tokens == 17


def test_the_log_is_a_copy() -> None:
    model, ids = llama(), prompt(8)
    with mnemon.attach(model):
        cache, mutable = mnemon.Cache(model.config), ids.clone()
        model(mutable, past_key_values=cache)
        mutable.zero_()
    assert torch.equal(cache.tokens, ids)


@pytest.mark.parametrize("recipe", ["", "static(64)"])
def test_padding_is_logged_in_prompt_and_answer(recipe: str) -> None:
    # static caches are fed 4-D masks, from which padding cannot be read
    model, ids = llama(), prompt(10, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with mnemon.attach(model):
        for options in ({}, {"num_beams": 2}):
            cache = mnemon.Cache(model.config, recipe)
            result = model.generate(
                ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache,
                **options,
            )  # fmt: skip
            rows = cache.batch_size // 2
            padded = mask.repeat_interleave(rows, dim=0)
            assert torch.equal(cache.attention_mask()[:, :10], padded)
            assert bool((cache.tokens[:, 10:] >= 0).all())
            assert result.shape == (2, 15)


def test_a_forward_without_a_mnemon_cache_is_not_tracked() -> None:
    model, ids = llama(), prompt(8)
    with mnemon.attach(model):
        outputs = model(ids)
        assert outputs.past_key_values.get_seq_length() == 8
        assert type(outputs.past_key_values).__module__.startswith("transformers")


def test_tokens_that_a_compiled_forward_did_not_log_are_named_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = llama(), prompt(12)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        # inside a compiled graph nothing is written down
        monkeypatch.setattr(
            "mnemon.binding.attachment.is_compiling", lambda: cache.num_tokens >= 12
        )
        result = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(cache.tokens, result[:, :17])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_tracking_never_waits_for_the_device() -> None:
    model = llama().to("cuda")
    ids = prompt(20).to("cuda")
    mask = torch.ones_like(ids)
    with mnemon.attach(model), torch.no_grad():
        cache = mnemon.Cache(model.config)
        model(ids, past_key_values=cache)
        names = hf.stream(model)
        torch.cuda.set_sync_debug_mode("error")
        try:
            arguments = {"input_ids": ids[:, :5], "attention_mask": mask}
            run_forward(model, names, lambda **kwargs: None, arguments, cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
