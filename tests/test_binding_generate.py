"""generate with a filled cache: verified reuse, and always the tokens of an uncached run."""

import gc
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

import mnemon
from binding_models import (
    bart,
    counted,
    jamba,
    llama,
    llava,
    mamba,
    mistral,
    num_computed,
    prompt,
)
from mnemon.errors import PrefixMismatch
from releases import NEVER_SAID, RELEASE

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def _fresh(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What transformers gives with its own cache, on the model as it is loaded."""
    torch.manual_seed(7)
    result: torch.Tensor = model.generate(ids, **GREEDY | options)
    return result


def _run(
    model: PreTrainedModel, ids: torch.Tensor, cache: mnemon.Cache, **options: Any
) -> torch.Tensor:
    torch.manual_seed(7)
    result: torch.Tensor = model.generate(ids, past_key_values=cache, **GREEDY | options)
    return result


def _filled(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> mnemon.Cache:
    cache = mnemon.Cache(model.config)
    model(ids, past_key_values=cache, **options)
    return cache


# -- the prefix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cached", [1, 11, 19, 20])
def test_a_cached_beginning_is_not_computed_again(num_cached: int) -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, ids[:, :num_cached])
        with counted(model) as shapes:
            assert torch.equal(_run(model, ids, cache), expected)
        reused = min(num_cached, 19)  # one token always runs: its logits choose the next
        assert shapes[0] == (1, 20 - reused)
        assert attachment.stats.tokens_reused == reused
        assert attachment.stats.tokens_computed == 20 - reused
        assert attachment.stats.tokens_recomputed == num_cached - reused
        assert attachment.stats.tokens_cropped == 0
    assert cache.num_tokens == 27
    assert torch.equal(cache.tokens, expected[:, :27])


def test_a_foreign_ending_is_cropped_to_the_common_prefix() -> None:
    model, ids = llama(), prompt(20)
    foreign = torch.cat([ids[:, :12], prompt(30, seed=2)], dim=1)
    expected = _fresh(model, ids)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, foreign)
        with counted(model) as shapes:
            assert torch.equal(_run(model, ids, cache), expected)
        assert shapes[0] == (1, 8)
        assert attachment.stats.tokens_cropped == 30
    assert torch.equal(cache.tokens, expected[:, :27])


def test_a_wholly_foreign_cache_is_emptied() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, prompt(9, seed=3) + 1)
        assert torch.equal(_run(model, ids, cache), expected)
        assert attachment.stats.tokens_reused == 0
        assert attachment.stats.tokens_cropped == 9


def test_a_cache_longer_than_the_prompt() -> None:
    model, ids = llama(), prompt(40)
    expected = _fresh(model, ids[:, :20])
    with mnemon.attach(model):
        cache = _filled(model, ids)
        assert torch.equal(_run(model, ids[:, :20], cache), expected)


@pytest.mark.parametrize(
    ("cached", "message"),
    [
        (torch.cat([prompt(12), prompt(8, seed=2)], dim=1), "position 12 it holds token"),
        (prompt(40), "the prompt ends at position 20 where the cache goes on"),
    ],
)
def test_error_mode_says_what_differs_and_changes_nothing(
    cached: torch.Tensor, message: str
) -> None:
    model, ids = llama(), prompt(20)
    with mnemon.attach(model, on_mismatch="error"):
        cache = _filled(model, cached)
        with pytest.raises(PrefixMismatch, match=message):
            _run(model, ids, cache)
        assert torch.equal(cache.tokens, cached)


@pytest.mark.parametrize("num_cached", [1, 12, 20])
def test_error_mode_accepts_what_continues(num_cached: int) -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    with mnemon.attach(model, on_mismatch="error"):
        assert torch.equal(_run(model, ids, _filled(model, ids[:, :num_cached])), expected)


def test_many_turns() -> None:
    model, history = llama(), prompt(10)
    cache = mnemon.Cache(model.config)
    for turn in range(4):
        expected = _fresh(model, history)
        with mnemon.attach(model) as attachment:
            answer = _run(model, history, cache)
            assert torch.equal(answer, expected)
            # the answer's last token was chosen, never fed
            assert attachment.stats.tokens_reused == (history.shape[1] - 7 if turn else 0)
        history = torch.cat([answer, prompt(6, seed=10 + turn)], dim=1)


@pytest.mark.parametrize("make", [mamba, jamba, lambda: mistral(8)], ids=["mamba", "jamba", "win"])
@pytest.mark.parametrize("case", ["continue", "same", "foreign"])
def test_what_cannot_be_cropped_is_computed_again(make: Any, case: str) -> None:
    model, ids = make(), prompt(30)
    name = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    expected = _fresh(model, ids)
    if RELEASE < (5, 14) and case == "same" and "Mistral" in type(model).__name__:
        pytest.skip("there windows keep what taking back the last append needs")
    with mnemon.attach(model) as attachment:
        cached = {"continue": ids[:, :29], "same": ids, "foreign": prompt(29, seed=4)}[case]
        cache = mnemon.Cache(model.config)
        model(cached, **{name: cache})
        torch.manual_seed(7)
        got = model.generate(ids, **{name: cache}, **GREEDY)
        assert torch.equal(got, expected)
        stats = attachment.stats
        assert stats.tokens_reused == (29 if case == "continue" else 0)
        assert stats.resets == (case == "same")
        assert stats.tokens_cropped == (29 if case == "foreign" else 0)
    assert cache.num_tokens == 37


@pytest.mark.parametrize("make", [mamba, jamba])
def test_states_that_are_read_one_token_at_a_time_only(make: Any) -> None:
    # transformers feeds all new tokens at once, and these models then forget their state
    model, ids = make(), prompt(30)
    name = "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    expected = model.generate(ids, **options)
    with mnemon.attach(model) as attachment:
        for passed in (ids, ids[:, 12:]):
            cache = mnemon.Cache(model.config)
            model(ids[:, :12], **{name: cache})
            got = model.generate(
                passed,
                attention_mask=torch.ones(1, 30, dtype=torch.long),
                **{name: cache},
                **options,
            )
            # up to 5.18 Jamba's step and its scan round a little differently
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=2e-4)
        # up to 5.18 Jamba does read its state then
        goes_on = make is jamba and RELEASE < (5, 19)
        # the whole prompt came: computed again
        assert attachment.stats.resets == (0 if goes_on else 1)
        # only new tokens came: fed one by one
        assert attachment.stats.tokens_reused == (24 if goes_on else 12)


# -- padding and batches ---------------------------------------------------------------------------


def _padded(ids: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids)
    for row, width in enumerate(widths):
        mask[row, :width] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("pass_mask", [True, False])
def test_left_padded_batches(pass_mask: bool) -> None:
    model = llama()
    ids, mask = _padded(prompt(20, batch=3), [0, 5, 2])
    options = {"attention_mask": mask} if pass_mask else {}
    expected = _fresh(model, ids, **options)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        for _ in range(2):
            assert torch.equal(_run(model, ids, cache, **options), expected)
        assert attachment.stats.tokens_reused == 19 * 3
    assert torch.equal(cache.attention_mask()[:, :20], mask)


def test_the_same_ids_padded_otherwise_are_another_prompt() -> None:
    model, ids = llama(), prompt(20)
    _, mask = _padded(ids, [4])
    expected = _fresh(model, ids, attention_mask=mask)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, ids)
        assert torch.equal(_run(model, ids, cache, attention_mask=mask), expected)
        assert attachment.stats.tokens_reused == 0


def test_one_cached_row_serves_prompts_that_share_it() -> None:
    model, ids = llama(), prompt(20, batch=3)
    ids[:, :12] = ids[:1, :12]
    expected = _fresh(model, ids)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, ids[:1, :12])
        with counted(model) as shapes:
            assert torch.equal(_run(model, ids, cache), expected)
        assert shapes[0] == (3, 8)
        assert attachment.stats.tokens_reused == 36


def test_the_cached_row_that_fits_is_chosen() -> None:
    model, ids = llama(), prompt(20, batch=4)
    with mnemon.attach(model):
        cache = _filled(model, ids)
        with counted(model) as shapes:
            got = _run(model, ids[[2]], cache)
        assert shapes[0] == (1, 1)
        assert cache.batch_size == 1
    assert torch.equal(got, _fresh(model, ids[[2]]))


# -- beams and samples -----------------------------------------------------------------------------

SEVERAL: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.mark.parametrize("options", SEVERAL, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_cached", [0, 12, 20])
def test_the_prefix_is_computed_once(options: dict[str, Any], batch: int, num_cached: int) -> None:
    model, ids = llama(), prompt(20, batch=batch)
    with counted(model) as shapes:
        expected = _fresh(model, ids, **options)
    copies = shapes[0][0] // batch
    assert shapes[0] == (batch * copies, 20)  # transformers: the prompt once per beam
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        if num_cached:
            model(ids[:, :num_cached], past_key_values=cache)
        with counted(model) as ours:
            assert torch.equal(_run(model, ids, cache, **options), expected)
    assert num_computed(ours) == num_computed(shapes) - batch * (20 * copies) + batch * (
        max(19 - num_cached, 0) + copies
    )


def test_left_padded_beams() -> None:
    model = llama()
    ids, mask = _padded(prompt(20, batch=2), [0, 7])
    expected = _fresh(model, ids, attention_mask=mask, num_beams=3)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        for _ in range(2):
            got = _run(model, ids, cache, attention_mask=mask, num_beams=3)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("options", SEVERAL, ids=lambda o: "-".join(o))
def test_after_beams_a_turn_goes_on_from_the_best_row(options: dict[str, Any]) -> None:
    model, ids = llama(), prompt(20)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        first = _run(model, ids, cache, **options)[:1]
        longer = torch.cat([first, prompt(5, seed=5)], dim=1)
        got = _run(model, longer, cache)
        assert attachment.stats.tokens_reused >= 20
    assert torch.equal(got, _fresh(model, longer))


def test_beams_with_windows_and_states() -> None:
    for model in (mistral(8), jamba()):
        ids = prompt(30)
        expected = _fresh(model, ids, num_beams=3)
        with mnemon.attach(model):
            cache = mnemon.Cache(model.config)
            for _ in range(2):
                assert torch.equal(_run(model, ids, cache, num_beams=3), expected)


def test_outputs_of_the_whole_prompt_are_still_there_when_asked_for() -> None:
    model, ids = llama(), prompt(12)
    with mnemon.attach(model):
        outputs = model.generate(
            ids,
            past_key_values=mnemon.Cache(model.config),
            num_beams=2,
            output_hidden_states=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    assert outputs.hidden_states[0][0].shape[1] == 12


# -- only new tokens -------------------------------------------------------------------------------


def test_only_new_tokens_with_a_mask_of_everything() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, ids[:, :12])
        got = _run(model, ids[:, 12:], cache, attention_mask=torch.ones(1, 20))
        assert torch.equal(got[:, 8:], expected[:, 20:])
        assert attachment.stats.tokens_unverified == 12
        assert attachment.stats.tokens_cropped == 0
    assert torch.equal(cache.tokens, expected[:, :27])


def test_only_new_tokens_with_beams_and_padding() -> None:
    model = llama()
    ids, mask = _padded(prompt(20, batch=2), [0, 5])
    expected = _fresh(model, ids, attention_mask=mask, num_beams=2)
    with mnemon.attach(model):
        cache = _filled(model, ids[:, :12], attention_mask=mask[:, :12],
                        position_ids=(mask.cumsum(-1) - 1).clamp(0)[:, :12])  # fmt: skip
        got = _run(model, ids[:, 12:], cache, attention_mask=mask, num_beams=2)
    assert torch.equal(got[:, 8:], expected[:, 20:])


@pytest.mark.parametrize("num_cached", [0, 11, 13])
def test_only_new_tokens_for_another_length_is_an_error(num_cached: int) -> None:
    model, ids = llama(), prompt(20)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        if num_cached:
            model(ids[:, :num_cached], past_key_values=cache)
        message = f"12 should be cached; the cache holds {num_cached}"
        with pytest.raises(PrefixMismatch, match=message):
            _run(model, ids[:, 12:], cache, attention_mask=torch.ones(1, 20))
        assert cache.num_tokens == num_cached


def test_only_new_tokens_with_a_mask_that_disagrees_is_an_error() -> None:
    model, ids = llama(), prompt(20)
    _, mask = _padded(ids, [3])
    with mnemon.attach(model):
        cache = _filled(model, ids[:, :12])
        with pytest.raises(PrefixMismatch, match="at position 0 the mask and the cache disagree"):
            _run(model, ids[:, 12:], cache, attention_mask=mask)


# -- drafts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, lambda: mistral(8)], ids=["dense", "window"])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
@pytest.mark.parametrize("num_cached", [0, 12, 20])
def test_drafting_from_a_filled_cache(make: Any, how: str, num_cached: int) -> None:
    model = make()
    ids = prompt(10).repeat(1, 2)  # repeats itself: something to look up
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 3, "eos_token_id": NEVER_SAID}
        if how == "lookup"
        else {"assistant_model": llama(3)}
    )
    expected = _fresh(model, ids, max_new_tokens=12)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        if num_cached:
            model(ids[:, :num_cached], past_key_values=cache)
        got = _run(model, ids, cache, max_new_tokens=12, **options)
        assert torch.equal(got, expected)
        assert not any(cache.is_recording_past(index) for index in range(2))
        assert cache.num_stored <= (7 if make is not llama else cache.num_tokens)
        assert torch.equal(cache.tokens, expected[:, : cache.num_tokens])


def test_windows_are_bounded_again_when_drafting_breaks() -> None:
    model, ids = mistral(8), prompt(10).repeat(1, 2)
    cache = mnemon.Cache(model.config)

    def stop(*args: Any) -> bool:
        raise KeyboardInterrupt

    with mnemon.attach(model), pytest.raises(KeyboardInterrupt):
        _run(
            model,
            ids,
            cache,
            prompt_lookup_num_tokens=3,
            eos_token_id=NEVER_SAID,
            stopping_criteria=[stop],
        )
    assert not cache.is_recording_past(0)
    assert cache.num_stored <= 7


# -- ways to call ----------------------------------------------------------------------------------


def test_every_way_to_pass_the_prompt() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids,), {"max_new_tokens": 8}),
        ((ids, config), {}),
        ((), {"inputs": ids, "generation_config": config}),
        ((), {"input_ids": ids, "max_new_tokens": 8}),
    ]
    with mnemon.attach(model) as attachment:
        for number, (args, kwargs) in enumerate(ways):
            cache = _filled(model, ids[:, :15])
            assert torch.equal(model.generate(*args, past_key_values=cache, **kwargs), expected)
            assert attachment.stats.tokens_reused == 15 * (number + 1)


def test_beams_set_by_a_config_object_or_the_model() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids, num_beams=2)
    with mnemon.attach(model):
        for source in ("call", "model"):
            cache = _filled(model, ids[:, :15])
            config = GenerationConfig(max_new_tokens=8, do_sample=False, num_beams=2)
            if source == "call":
                got = model.generate(ids, generation_config=config, past_key_values=cache)
            else:
                model.generation_config = config
                got = model.generate(ids, past_key_values=cache)
            assert torch.equal(got, expected)


def test_streamer_sees_every_token() -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None: ...

    model, ids = llama(), prompt(20)
    recorder = Recorder()
    with mnemon.attach(model):
        got = _run(model, ids, _filled(model, ids), streamer=recorder)
    assert recorder.seen == got[0].tolist()


def test_prefill_chunk_size_of_generate() -> None:
    model, ids = llama(), prompt(20)
    for options in ({}, {"num_beams": 2}):
        expected = _fresh(model, ids, **options)
        with mnemon.attach(model):
            for num_cached in (0, 9):
                cache = mnemon.Cache(model.config)
                if num_cached:
                    model(ids[:, :num_cached], past_key_values=cache)
                with counted(model) as shapes:
                    got = _run(model, ids, cache, prefill_chunk_size=4, **options)
                assert torch.equal(got, expected)
                assert max(tokens for _, tokens in shapes) == 4
                assert cache.num_tokens == 27  # nothing twice


def test_static_caches() -> None:
    model, ids = llama(), prompt(20)
    for options in ({}, {"num_beams": 2}):
        expected = _fresh(model, ids, **options)
        with mnemon.attach(model) as attachment:
            cache = mnemon.Cache(model.config, "static(64)")
            for _ in range(2):
                assert torch.equal(_run(model, ids, cache, **options), expected)
            assert attachment.stats.tokens_reused == 19


def test_use_cache_false_goes_through() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids, use_cache=False)
    with mnemon.attach(model):
        assert torch.equal(_fresh(model, ids, use_cache=False), expected)


def test_embeddings_are_unknown_and_said_to_be() -> None:
    model, ids = llama(), prompt(20)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(inputs_embeds=embeds, **GREEDY)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        for _ in range(2):
            got = model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)
            assert torch.equal(got, expected)
        assert attachment.stats.tokens_unverified == 19
        assert "19 reused tokens could not be verified" in attachment.report()
        assert cache.num_known_tokens == cache.num_tokens - 20


def test_a_cache_filled_by_hand_is_reused_and_said_to_be_unknown() -> None:
    model, ids = llama(), prompt(20)
    expected = _fresh(model, ids)
    cache = mnemon.Cache(model.config)
    model(ids[:, :12], past_key_values=cache)  # not attached: nobody names the tokens
    assert cache.num_known_tokens == 0
    with mnemon.attach(model) as attachment:
        assert torch.equal(_run(model, ids, cache), expected)
        assert attachment.stats.tokens_unverified == 12


def test_a_model_with_a_generate_of_its_own_is_not_guessed_at() -> None:
    base = type(llama())

    class Own(base):  # type: ignore[misc, valid-type]
        def generate(self, ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().generate(ids + 1, **kwargs)

    torch.manual_seed(0)
    model, ids = Own(llama().config).eval(), prompt(20)
    expected = model.generate(ids, **GREEDY)
    with mnemon.attach(model) as attachment:
        cache = _filled(model, ids)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        assert attachment.stats.resets == 1
        assert attachment.stats.tokens_reused == 0


# -- encoders and images ---------------------------------------------------------------------------


def test_another_encoder_input_empties_the_cache() -> None:
    model = bart()
    one, two = prompt(12), prompt(12, seed=2)
    expected = [_fresh(model, ids) for ids in (one, two)]
    assert not torch.equal(*expected)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        for number in (0, 1, 1, 0):
            assert torch.equal(_run(model, (one, two)[number], cache), expected[number])
        assert attachment.stats.resets == 2
    with mnemon.attach(model, on_mismatch="error"):
        with pytest.raises(PrefixMismatch, match="another encoder input"):
            _run(model, two, cache)
        assert torch.equal(_run(model, one, mnemon.Cache(model.config)), expected[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_decoder_prompt_is_reused_with_the_same_encoder_input(options: dict[str, Any]) -> None:
    model, source = bart(), prompt(12, batch=2)
    start = torch.full((2, 1), 1)
    opening = torch.cat([start, prompt(6, batch=2, seed=3)], dim=1)
    expected = _fresh(model, source, decoder_input_ids=opening, **options)
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        for ids in (opening, opening[:, 1:], opening):  # generate puts the start token before
            got = _run(model, source, cache, decoder_input_ids=ids, **options)
            assert torch.equal(got, expected)
        assert attachment.stats.tokens_reused == 2 * 6 * 2
        assert attachment.stats.resets == 0


def test_rows_of_another_encoder_batch_are_not_mixed_up() -> None:
    model, source = bart(), prompt(12, batch=3)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        _run(model, source, cache)
        got = _run(model, source[:2], cache)
    assert torch.equal(got, _fresh(model, source[:2]))


def _with_image(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(num_tokens)
    ids[:, 3:7] = 90
    torch.manual_seed(seed)
    return ids, torch.randn(1, 3, 8, 8)


def test_another_image_under_the_same_tokens_is_not_reused() -> None:
    model = llava()
    ids, one = _with_image(16, 1)
    _, two = _with_image(16, 2)
    expected = [_fresh(model, ids, pixel_values=pixels) for pixels in (one, two)]
    with mnemon.attach(model) as attachment:
        cache = mnemon.Cache(model.config)
        assert torch.equal(_run(model, ids, cache, pixel_values=one), expected[0])
        assert torch.equal(_run(model, ids, cache, pixel_values=two), expected[1])
        assert (attachment.stats.resets, attachment.stats.tokens_reused) == (1, 0)
        with counted(model) as shapes:
            assert torch.equal(_run(model, ids, cache, pixel_values=two), expected[1])
        assert attachment.stats.tokens_reused == 15
        assert shapes[0][1] == 1
        assert torch.equal(_run(model, ids, cache), expected[1])  # the image is in the cache
    with mnemon.attach(model, on_mismatch="error"), pytest.raises(PrefixMismatch, match="image"):
        _run(model, ids, cache, pixel_values=one)


def test_a_prefix_that_cuts_an_image_is_not_reused() -> None:
    model = llava()
    ids, pixels = _with_image(16, 1)
    other = ids.clone()
    other[:, 1] += 1
    expected = _fresh(model, other, pixel_values=pixels)
    with mnemon.attach(model):
        cache = mnemon.Cache(model.config)
        _run(model, ids, cache, pixel_values=pixels)
        assert torch.equal(_run(model, other, cache, pixel_values=pixels), expected)


# -- models ----------------------------------------------------------------------------------------


def test_a_cache_of_another_model_is_not_reused() -> None:
    one, two, ids = llama(0), llama(1), prompt(20)
    expected = _fresh(two, ids)
    with mnemon.attach(one), mnemon.attach(two) as attachment:
        cache = mnemon.Cache(one.config)
        _run(one, ids, cache)
        assert torch.equal(_run(two, ids, cache), expected)
        assert (attachment.stats.resets, attachment.stats.tokens_reused) == (1, 0)
    with mnemon.attach(one, on_mismatch="error"), pytest.raises(PrefixMismatch, match="model"):
        _run(one, ids, cache)


def test_a_cache_of_a_model_that_is_gone_is_not_reused() -> None:
    one, two, ids = llama(0), llama(1), prompt(20)
    expected = _fresh(two, ids)
    cache = mnemon.Cache(one.config)
    with mnemon.attach(one):
        _run(one, ids, cache)
    del one
    gc.collect()
    with mnemon.attach(two):
        assert torch.equal(_run(two, ids, cache), expected)


def test_what_was_added_to_named_tokens_unseen_is_not_reused() -> None:
    model, ids, other = llama(), prompt(20), prompt(20)
    other[:, 14:] = prompt(6, seed=9)
    cache = mnemon.Cache(model.config)
    forward = model.forward
    with torch.no_grad(), mnemon.attach(model) as attachment:
        model(ids[:, :12], past_key_values=cache)
        forward(ids[:, 12:], past_key_values=cache)  # as a compiled forward: not tracked
        assert torch.equal(_run(model, other, cache), _fresh(model, other))
        assert attachment.stats.tokens_reused == 12


def test_a_cache_of_a_copy_of_the_model_is_reused() -> None:
    one, two, ids = llama(0), llama(0), prompt(20)
    with mnemon.attach(one), mnemon.attach(two) as attachment:
        cache = mnemon.Cache(one.config)
        expected = _run(one, ids, cache)
        assert torch.equal(_run(two, ids, cache), expected)
        assert attachment.stats.tokens_reused == 19


def test_a_cache_of_weights_that_were_changed_since_is_not_reused() -> None:
    model, ids = llama(), prompt(20)
    cache = mnemon.Cache(model.config)
    with mnemon.attach(model) as attachment:
        _run(model, ids, cache)
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(torch.randn_like(weights) * 0.05)  # what an optimiser's step does
        assert torch.equal(_run(model, ids, cache), _fresh(model, ids))
        assert attachment.stats.tokens_reused == 0


def test_a_cache_that_two_models_filled_is_nobodys() -> None:
    one, two, ids = llama(0), llama(1), prompt(20)
    cache = mnemon.Cache(one.config)
    with mnemon.attach(one), mnemon.attach(two) as attachment, torch.no_grad():
        _run(one, ids, cache)
        two(prompt(1), past_key_values=cache)
        ids = torch.cat([cache.tokens, prompt(1)], dim=1)
        assert torch.equal(_run(two, ids, cache), _fresh(two, ids))
        assert attachment.stats.tokens_reused == 0
