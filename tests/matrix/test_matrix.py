"""The same tokens as transformers' default cache: every architecture, every decoding mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mnemon import Cache
from mnemon.errors import RecipeError

from .architectures import rows
from .broken import forgetful_cache
from .cells import EQUAL, NOT_APPLICABLE, bench, judge, reference
from .modes import MODES, NUM_NEW, STATIC

# transformers and the modeling files warn about their own deprecations: not what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

GENERATING = [mode for mode in MODES if mode not in STATIC]
FAMILIES = {
    *("decoder", "moe", "window", "hybrid", "mamba", "mla", "indexed", "compressed", "shared"),
    *("encoder-decoder", "speech", "multimodal"),
}
#: At most so many of the 13 modes may be beyond transformers' own cache, by family. States cannot
#: be drafted on; the few others are one model's own limits.
MOST_NOT_APPLICABLE = dict.fromkeys(FAMILIES, 2) | {
    **{"hybrid": 3, "mamba": 3, "speech": 4, "compressed": 4}
}


def _params() -> list[Any]:
    """Rows; one row stays on one worker, so that its model is built once."""
    return [
        pytest.param(
            name,
            marks=[pytest.mark.xdist_group(name), *([] if row.fast else [pytest.mark.matrix])],
        )
        for name, row in rows().items()
    ]


every_row = pytest.mark.parametrize("row", _params())


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("mode", MODES)
@every_row  # last: the row changes least often
def test_same_tokens(
    row: str, mode: str, attached: bool, record_property: Callable[[str, object], None]
) -> None:
    outcome = judge(row, mode, attached)
    record_property("cell", [row, mode, attached, outcome.kind, outcome.detail])
    if outcome.kind == NOT_APPLICABLE:
        pytest.skip(outcome.detail)
    assert outcome.kind == EQUAL, outcome.detail


@every_row
def test_a_broken_cache_is_noticed(row: str) -> None:
    """The cells can fail: a cache that forgets a token per block is caught in >= 90% of them."""
    outcomes = {mode: judge(row, mode, False, forgetful_cache).kind for mode in GENERATING}
    missed = [mode for mode, kind in outcomes.items() if kind == EQUAL]
    assert len(missed) <= 1, f"forgotten tokens change nothing in {missed}"


@every_row
def test_the_reference_says_something(row: str) -> None:
    """A model that repeats one token would agree with any cache."""
    tokens = reference(row, "greedy")
    assert isinstance(tokens, Tensor), tokens
    assert tokens.shape == (1, tokens.shape[1])
    assert len(set(tokens[0, -NUM_NEW:].tolist())) >= 3


@every_row
def test_few_cells_are_not_applicable(row: str) -> None:
    """What transformers cannot do is found by trying it, and may not grow unnoticed."""
    raised = [mode for mode in MODES if isinstance(reference(row, mode), Exception)]
    assert len(raised) <= MOST_NOT_APPLICABLE[rows()[row].family], raised


@pytest.mark.matrix
@pytest.mark.parametrize("row", ["gpt_neo", "led", "deepseek_v4"])
def test_static_is_refused_where_it_would_give_other_tokens(row: str) -> None:
    """There transformers' StaticCache raises KeyError, or silently gives other tokens."""
    assert isinstance(reference(row, "static"), Exception)
    with pytest.raises(RecipeError, match="does not fit this model"):
        Cache(bench(row).model.config, "static(64)")


def test_the_matrix_covers_enough() -> None:
    assert len(rows()) >= 75
    assert {row.family for row in rows().values()} == FAMILIES
    assert {row.family for row in rows().values() if row.fast} >= FAMILIES - {
        "indexed",
        "compressed",
        "multimodal",
    }
