"""Prompts at a distance, and the shipped model's curve."""

import json
from typing import Any

import pytest
import torch

from mnemon.errors import ZooError
from mnemon.zoo import BUNDLED_MODELS, bundled_model_path
from mnemon.zoo.prompts import TASKS, PromptMaker
from mnemon.zoo.recall import bits_per_byte, greedy_answers, recall_by_distance, wilson_interval


@pytest.fixture(scope="module")
def maker(tokenizer: Any, filler: str) -> PromptMaker:
    return PromptMaker.build(tokenizer, filler)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32).eval()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [32, 256, 2048, 3584])
def test_a_prompt_is_text_and_its_distance_is_true(
    maker: PromptMaker, tokenizer: Any, task: str, distance: int
) -> None:
    for seed in range(5):
        prompt = maker.make(task, distance=distance, seed=seed)
        ids = prompt.input_ids
        assert ids[len(ids) - distance :][:2] == prompt.answer_ids
        assert tokenizer(tokenizer.decode(ids[1:]))["input_ids"] == ids[1:]
        assert prompt == maker.make(task, distance=distance, seed=seed)
        assert len(ids) <= 4096


@pytest.mark.parametrize("task", TASKS)
def test_a_key_is_asked_once(maker: PromptMaker, task: str) -> None:
    """The query's two words follow each other once before the query: the answer is unique."""
    for seed in range(10):
        ids = maker.make(task, distance=1024, seed=seed).input_ids
        key = ids[-2:]
        places = [i for i in range(len(ids) - 2) if ids[i : i + 2] == key]
        aligned = places if task == "needle" else [i for i in places if i % 4 == 1]
        assert len(aligned) == 1


def test_impossible_prompts_are_refused(maker: PromptMaker) -> None:
    with pytest.raises(ZooError, match="24 tokens or more"):
        maker.make("needle", distance=8, seed=0)
    with pytest.raises(ZooError, match="multiple of 4"):
        maker.make("pairs", distance=33, seed=0)
    with pytest.raises(ZooError, match="there are: needle, pairs"):
        maker.make("haystack", distance=32, seed=0)
    with pytest.raises(ZooError, match="no piece"):
        maker.make("needle", distance=10_000_000, seed=0)


def test_an_unknown_model_is_refused() -> None:
    assert BUNDLED_MODELS == ("tiny-stdlib",)
    with pytest.raises(ZooError, match="shipped here: tiny-stdlib"):
        bundled_model_path("huge-stdlib")


def test_wilson_interval_matches_a_textbook_value() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_the_shipped_weights_are_small_enough() -> None:
    assert (bundled_model_path() / "model.safetensors").stat().st_size <= 25_000_000


def test_the_shipped_model_is_the_one_the_card_measures(model: Any) -> None:
    import hashlib

    measured = json.loads((bundled_model_path() / "eval.json").read_text())
    weights = (bundled_model_path() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == measured["weights_sha256"]
    assert model.num_parameters() == measured["num_parameters"]
    assert 5_000_000 <= model.num_parameters() <= 10_000_000


@pytest.mark.parametrize("distance", [256, 1024])
def test_the_shipped_model_recalls_as_the_card_says(
    model: Any, tokenizer: Any, filler: str, distance: int
) -> None:
    measured = json.loads((bundled_model_path() / "eval.json").read_text())
    carded = {point["distance"]: point["accuracy"] for point in measured["recall"]["needle"]}
    (point,) = recall_by_distance(
        model, tokenizer, distances=[distance], samples=12, filler=filler, seed=50_000
    )
    assert point.high >= carded[distance] - 0.02
    assert point.accuracy >= carded[distance] - 0.25


def test_a_cache_that_forgets_shows(model: Any, tokenizer: Any, filler: str) -> None:
    from transformers import DynamicCache

    class OnlyLast(DynamicCache):
        """Keeps what every attention call sees of the past to the last 64 tokens."""

        def update(self, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(*args, **kwargs)
            for layer in self.layers:
                if layer.is_initialized and layer.keys.shape[-2] > 64:
                    layer.keys, layer.values = layer.keys[:, :, -64:], layer.values[:, :, -64:]
            return keys, values

    (kept,) = recall_by_distance(
        model,
        tokenizer,
        distances=[256],
        samples=10,
        filler=filler,
        make_cache=lambda config: DynamicCache(config=config),
    )
    (forgot,) = recall_by_distance(
        model,
        tokenizer,
        distances=[256],
        samples=10,
        filler=filler,
        make_cache=lambda config: OnlyLast(config=config),
    )
    # The first answer token is read during the prefill; the second needs what was dropped.
    assert forgot.correct < kept.correct


def test_bits_per_byte_is_the_same_through_a_cache(model: Any, tokenizer: Any, filler: str) -> None:
    from transformers import DynamicCache

    text = filler[:4000]
    plain = bits_per_byte(model, tokenizer, text, context=512)
    cached = bits_per_byte(
        model,
        tokenizer,
        text,
        context=512,
        make_cache=lambda config: DynamicCache(config=config),
        chunk_tokens=100,
    )
    assert cached.bits_per_byte == pytest.approx(plain.bits_per_byte, abs=1e-4)
    assert plain.num_bytes == len(text.encode())
    assert 0.5 < plain.bits_per_byte < 4


def test_measures_refuse_nonsense(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ZooError, match="1 or more"):
        recall_by_distance(model, tokenizer, samples=0)
    with pytest.raises(ZooError, match="some text"):
        bits_per_byte(model, tokenizer, [])
    with pytest.raises(ZooError, match="context is 2 or more"):
        bits_per_byte(model, tokenizer, "x", context=1)


def test_greedy_answers_have_the_asked_length(model: Any) -> None:
    decoded = greedy_answers(model, [[0, 300, 301], [0, 302, 303]], num_tokens=3)
    assert [len(row) for row in decoded] == [3, 3]
