"""What the zoo's tests share: the bundled tokenizer and a task vocabulary."""

from typing import Any

import pytest

from mnemon.zoo import bundled_model_path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="session")
def filler() -> str:
    from mnemon.zoo.recall import held_out_filler

    return held_out_filler()
