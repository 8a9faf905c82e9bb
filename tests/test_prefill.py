"""prefill: reuse changes no bit, wherever the prompt was split before."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import mnemon
from binding_models import (
    VOCAB,
    bart,
    counted,
    jamba,
    lfm2,
    llama,
    mamba,
    mistral,
    num_computed,
    prompt,
)
from mnemon.errors import CacheError, ModelError
from releases import RELEASE

CHUNK = 16
LENGTH = 53
SPLITS = [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 40, 3 * CHUNK, LENGTH - 1, LENGTH]


def _content(cache: mnemon.Cache) -> list[torch.Tensor]:
    state = cache.to_state()
    found = [state.tokens]
    for layer in state.layers:
        for part in (layer, *layer.parts):
            found += [part.tensors[name].clone() for name in sorted(part.tensors)]
    return found


def _same_bits(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    # Compared as bytes: neither -0.0 == 0.0 nor NaN != NaN hides a difference.
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return len(one) == len(two) and all(
        a.shape == b.shape and torch.equal(raw(a), raw(b)) for a, b in zip(one, two, strict=True)
    )


def _check_splits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    splits: list[int],
    mask: torch.Tensor | None = None,
    recipe: str = "",
) -> list[int]:
    """Computed tokens of the second prefill for every split; asserts that no bit differs."""
    whole = mnemon.Cache(model.config, recipe)
    expected = mnemon.prefill(model, ids, whole, CHUNK, attention_mask=mask).logits
    assert expected.shape == (ids.shape[0], 1, VOCAB)
    computed = []
    for split in splits:
        cache = mnemon.Cache(model.config, recipe)
        before = None if mask is None else mask[:, :split]
        mnemon.prefill(model, ids[:, :split], cache, CHUNK, attention_mask=before)
        assert cache.num_tokens == split
        with counted(model) as shapes:
            logits = mnemon.prefill(model, ids, cache, CHUNK, attention_mask=mask).logits
        assert _same_bits([logits], [expected]), split
        assert _same_bits(_content(cache), _content(whole)), split
        computed.append(num_computed(shapes) // ids.shape[0])
    return computed


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_no_bit_depends_on_the_split(dtype: torch.dtype, attached: bool) -> None:
    model = llama(dtype=dtype)
    if attached:
        mnemon.attach(model)
    computed = _check_splits(model, prompt(LENGTH), SPLITS)
    # everything before the chunk in which the split fell is reused
    assert computed == [LENGTH - min(s, LENGTH - 1) // CHUNK * CHUNK for s in SPLITS]


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK, 2 * CHUNK + 1])
def test_lengths_around_a_chunk(length: int) -> None:
    _check_splits(llama(), prompt(length), list(range(1, length + 1)))


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_left_padded_batches(dtype: torch.dtype, attached: bool) -> None:
    model, ids = llama(dtype=dtype), prompt(LENGTH, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, : CHUNK + 3] = 0  # more than a whole chunk
    if attached:
        mnemon.attach(model)
    computed = _check_splits(model, ids, SPLITS[2:], mask)
    assert min(computed) == LENGTH % CHUNK


def test_padding_that_comes_later_changes_no_earlier_bit() -> None:
    ids = prompt(LENGTH, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 45:48] = 0
    assert min(_check_splits(llama(), ids, SPLITS, mask)) == LENGTH % CHUNK


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("window", [8, CHUNK, 24])
def test_windows(window: int, dtype: torch.dtype, attached: bool) -> None:
    model = mistral(window, dtype)
    if attached:
        mnemon.attach(model)
    computed = _check_splits(model, prompt(LENGTH), SPLITS)
    # a window that moved on cannot go back to a chunk's beginning, but can stand on it
    assert computed[SPLITS.index(2 * CHUNK)] == LENGTH - 2 * CHUNK
    # in 4.57 it keeps what taking back the last append needs
    assert computed[SPLITS.index(40)] == (LENGTH if RELEASE >= (5, 14) else LENGTH - 2 * CHUNK)


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
def test_states_that_go_on(attached: bool) -> None:
    model = lfm2()
    if attached:
        mnemon.attach(model)
    computed = _check_splits(model, prompt(LENGTH), SPLITS)
    # a state cannot go back to a chunk's beginning, but can stand on it
    assert computed[SPLITS.index(2 * CHUNK)] == LENGTH - 2 * CHUNK
    assert computed[SPLITS.index(CHUNK + 1)] == LENGTH


@pytest.mark.parametrize("make", [mamba, jamba])
def test_states_that_are_read_one_token_at_a_time_only(make: Any) -> None:
    model, ids = make(), prompt(LENGTH)
    _check_splits(model, ids, SPLITS)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1:]
    logits = mnemon.prefill(model, ids, mnemon.Cache(model.config), CHUNK).logits
    # up to 5.18 Jamba's step and its scan round a little differently
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)


def test_static() -> None:
    computed = _check_splits(llama(), prompt(LENGTH), SPLITS, recipe="static(64)")
    assert computed[-1] == LENGTH % CHUNK


@pytest.mark.parametrize("make", [llama, mistral, mamba, jamba, lfm2])
def test_the_numbers_are_those_of_one_forward(make: Any) -> None:
    model, ids = make(), prompt(LENGTH)
    expected = model(ids, use_cache=False).logits[:, -1:]
    logits = mnemon.prefill(model, ids, mnemon.Cache(model.config), CHUNK).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_left_padding_gives_the_numbers_of_each_row_alone() -> None:
    model, ids = llama(), prompt(LENGTH, batch=2)
    mask = torch.ones_like(ids)
    mask[1, : CHUNK + 3] = 0
    cache = mnemon.Cache(model.config)
    logits = mnemon.prefill(model, ids, cache, CHUNK, attention_mask=mask).logits
    alone = model(ids[1:, CHUNK + 3 :], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits[1:], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.attention_mask(), mask)


def test_another_ending_is_cropped() -> None:
    model, ids = llama(), prompt(LENGTH)
    expected = mnemon.prefill(model, ids, mnemon.Cache(model.config), CHUNK).logits
    cache = mnemon.Cache(model.config)
    mnemon.prefill(model, torch.cat([ids[:, :40], prompt(90, seed=4)], dim=1), cache, CHUNK)
    with counted(model) as shapes:
        logits = mnemon.prefill(model, ids, cache, CHUNK).logits
    assert _same_bits([logits], [expected])
    assert num_computed(shapes) == LENGTH - 2 * CHUNK
    assert torch.equal(cache.tokens, ids)


@pytest.mark.parametrize(
    "spoil", ["decoded", "other chunk", "other batch", "other attention", "crop and decode"]
)
def test_tokens_computed_otherwise_are_not_reused(spoil: str) -> None:
    model, ids = llama(), prompt(LENGTH)
    expected = mnemon.prefill(model, ids, mnemon.Cache(model.config), CHUNK).logits
    cache = mnemon.Cache(model.config)
    reused = 0
    if spoil == "decoded":
        mnemon.prefill(model, ids[:, :20], cache, CHUNK)
        with mnemon.attach(model, attention=False):
            model(ids[:, 20:], past_key_values=cache)
        reused = CHUNK
    elif spoil == "other chunk":
        mnemon.prefill(model, ids, cache, 2 * CHUNK)
    elif spoil == "other batch":
        mnemon.prefill(model, ids.repeat(2, 1), cache, CHUNK)
        cache.select(torch.tensor([0]))
    elif spoil == "other attention":
        with mnemon.attach(model):
            mnemon.prefill(model, ids, cache, CHUNK)
    else:
        mnemon.prefill(model, ids, cache, CHUNK)
        cache.crop(20 - LENGTH)
        model(ids[:, 20:], past_key_values=cache)  # not attached
        cache.record_tokens(ids[:, 20:], None, 20)
        reused = CHUNK
    with counted(model) as shapes:
        logits = mnemon.prefill(model, ids, cache, CHUNK).logits
    assert _same_bits([logits], [expected])
    assert num_computed(shapes) == LENGTH - reused


def test_a_fork_remembers_and_a_new_process_too(tmp_path: Any) -> None:
    model, ids = llama(), prompt(LENGTH)
    cache = mnemon.Cache(model.config)
    expected = mnemon.prefill(model, ids, cache, CHUNK).logits
    state = cache.to_state()
    for copied in (cache.fork(), mnemon.Cache.from_state(model.config, "", state)):
        with counted(model) as shapes:
            logits = mnemon.prefill(model, ids, copied, CHUNK).logits
        assert _same_bits([logits], [expected])
        assert num_computed(shapes) == LENGTH % CHUNK


def test_only_the_last_logits_are_computed() -> None:
    model, ids = llama(), prompt(LENGTH)
    widths: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    mnemon.prefill(model, ids, mnemon.Cache(model.config), CHUNK)
    assert widths == [1, 1, 1, 1]


def test_progress_is_reported_in_chunks() -> None:
    model, ids = llama(), prompt(LENGTH)
    seen: list[tuple[int, int]] = []
    cache = mnemon.Cache(model.config)
    mnemon.prefill(
        model, ids, cache, CHUNK, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(16, 53), (32, 53), (48, 53), (53, 53)]
    mnemon.prefill(model, ids, cache, CHUNK, progress=True)  # no terminal here: nothing is drawn


def test_progress_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = llama()
    mnemon.prefill(model, prompt(LENGTH), mnemon.Cache(model.config), CHUNK, progress=True)
    captured = capsys.readouterr()
    assert "prefill" in captured.err
    assert captured.out == ""


def test_no_gradients_are_kept() -> None:
    model = llama()
    cache = mnemon.Cache(model.config)
    outputs = mnemon.prefill(model, prompt(LENGTH), cache, CHUNK)
    assert not outputs.logits.requires_grad
    assert outputs.past_key_values is cache


@pytest.mark.parametrize("chunk", [0, -16, 3, 100, 16.0])
def test_a_chunk_is_a_power_of_two(chunk: Any) -> None:
    model = llama()
    with pytest.raises(ModelError, match="power of two"):
        mnemon.prefill(model, prompt(5), mnemon.Cache(model.config), chunk)


def test_what_prefill_does_not_take() -> None:
    model = llama()
    cache = mnemon.Cache(model.config)
    with pytest.raises(CacheError, match=r"mnemon\.Cache; got DynamicCache"):
        mnemon.prefill(model, prompt(5), DynamicCache(config=model.config))  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="not empty"):
        mnemon.prefill(model, prompt(0), cache)
    with pytest.raises(CacheError, match="must be alike"):
        mnemon.prefill(model, prompt(5), cache, attention_mask=torch.ones(1, 4))
    pair = bart()
    with pytest.raises(ModelError, match="has an encoder"):
        mnemon.prefill(pair, prompt(5), mnemon.Cache(pair.config))


# -- exact generation ------------------------------------------------------------------------------


def _generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: mnemon.Cache, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    outputs = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **{"do_sample": False} | options,
    )
    return outputs.sequences, [*outputs.scores, *outputs.logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_exact_generation_has_the_same_scores_after_reuse(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model, ids = llama(dtype=dtype), prompt(LENGTH)
    with mnemon.attach(model, exact=True, chunk=CHUNK) as attachment:
        tokens, expected = _generate(model, ids, mnemon.Cache(model.config), **options)
        for split in SPLITS:
            cache = mnemon.Cache(model.config)
            mnemon.prefill(model, ids[:, :split], cache, CHUNK)
            before = attachment.stats.tokens_reused
            got, scores = _generate(model, ids, cache, **options)
            assert torch.equal(got, tokens)
            assert _same_bits(scores, expected), split
            reused = attachment.stats.tokens_reused - before
            assert reused == min(split, LENGTH - 1) // CHUNK * CHUNK
        assert "exact (chunks of 16 tokens)" in attachment.report()


def test_exact_generation_over_turns() -> None:
    model, ids = llama(), prompt(40)
    with mnemon.attach(model, exact=True, chunk=CHUNK) as attachment:
        cache = mnemon.Cache(model.config)
        first, _ = _generate(model, ids, cache)
        longer = torch.cat([first, prompt(9, seed=6)], dim=1)
        _, scores = _generate(model, longer, cache)
        # what was decoded token by token has other bits than a chunk: computed again
        assert attachment.stats.tokens_reused == 2 * CHUNK
        _, expected = _generate(model, longer, mnemon.Cache(model.config))
        assert _same_bits(scores, expected)


@pytest.mark.parametrize("make", [lambda: mistral(8), mamba, jamba], ids=["win", "mamba", "jamba"])
def test_exact_generation_where_nothing_can_be_cropped(make: Any) -> None:
    model, ids = make(), prompt(LENGTH)
    name = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    with mnemon.attach(model, exact=True, chunk=CHUNK):
        runs = []
        for split in (0, 2 * CHUNK, 40):
            cache = mnemon.Cache(model.config)
            if split:
                mnemon.prefill(model, ids[:, :split], cache, CHUNK)
            outputs = model.generate(
                ids, **{name: cache}, max_new_tokens=5, do_sample=False,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            runs.append(list(outputs.scores))
        assert _same_bits(runs[0], runs[1])
        assert _same_bits(runs[0], runs[2])


@pytest.mark.parametrize("change", ["model", "dtype"])
def test_what_another_model_computed_is_not_reused(change: str) -> None:
    model, ids = llama(seed=0), prompt(LENGTH)
    cache = mnemon.Cache(model.config)
    mnemon.prefill(model, ids, cache, CHUNK)
    other = llama(seed=1) if change == "model" else model.to(torch.bfloat16)
    fresh = mnemon.Cache(other.config)
    expected = mnemon.prefill(other, ids, fresh, CHUNK)
    got = mnemon.prefill(other, ids, cache, CHUNK)
    assert torch.equal(got.logits, expected.logits)
    assert _same_bits(_content(cache), _content(fresh))
