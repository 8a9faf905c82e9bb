"""The tokenizer: any text survives, words stay words, chats are laid out."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.zoo import bundled_model_path
from mnemon.zoo.tokenizer import train_tokenizer, word_ids


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\t x", "naïve café", "漢字 🜁 \u200b", "def f(x):\n    return x\n", "\x00\x7f"],
)
def test_known_texts_survive_a_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@cache
def bundled_core() -> Any:
    """The tokenizer without its wrapper."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(bundled_model_path() / "tokenizer.json"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=("Cs",)), max_size=60))
def test_any_text_survives_a_round_trip(text: str) -> None:
    core = bundled_core()
    assert core.decode(core.encode(text).ids, skip_special_tokens=False) == text


def test_any_sequence_of_words_keeps_its_tokens(tokenizer: Any) -> None:
    words = word_ids(tokenizer)
    assert len(words) > 500
    sequence = [*words[::7], *words[::-5]]
    assert tokenizer(tokenizer.decode(sequence))["input_ids"] == sequence


def test_a_chat_is_laid_out(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|># user: hello\n# assistant:"


def test_training_is_deterministic(tmp_path: Any) -> None:
    texts = ["def parser(name):\n    return name\n" * 20, "the parser of the name\n" * 20]
    first = train_tokenizer(texts, vocab_size=300)
    again = train_tokenizer(texts, vocab_size=300)
    assert first.get_vocab() == again.get_vocab()
    assert len(first) <= 300
    assert [first.bos_token_id, first.eos_token_id, first.pad_token_id] == [0, 1, 2]
