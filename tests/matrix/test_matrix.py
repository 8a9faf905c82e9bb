"""The same tokens as transformers' default cache: every architecture, every decoding mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mnemon import Cache
from mnemon.errors import RecipeError

from .architectures import missing, rows
from .broken import forgetful_cache
from .cells import EQUAL, NOT_APPLICABLE, RELEASE, bench, judge, reference, why_refused
from .modes import MODES, NUM_NEW, STATIC

# transformers and the modeling files warn about their own deprecations: not what is tested here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
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
if RELEASE < (5, 19):  # zamba2 in turns, drafts of inkling
    MOST_NOT_APPLICABLE |= {"hybrid": 7}
if RELEASE < (5, 14):  # no encoder-decoder in chunks, no static cache for those with old masks
    MOST_NOT_APPLICABLE |= {"decoder": 3, "encoder-decoder": 3, "multimodal": 3, "speech": 6}
#: Rows that a release has, and for how many of them mnemon has no cache there. Other releases are
#: not pinned.
NUM_ROWS = {(4, 57): (110, 13), (5, 14): (138, 2), (5, 23): (143, 0)}
#: Where a preallocated cache would give other tokens, so that mnemon refuses one.
NO_STATIC = {
    "deepseek_v4", "gpt_neo", "inkling_text", "led", "minimax_m3_vl_text", "paligemma",
    *(["bloom"] if RELEASE < (5, 22) else []),
}  # fmt: skip


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
    _skip_refused(row)
    if RELEASE < (5, 22) and not rows()[row].fast:
        pytest.skip("says nothing about a release")
    outcomes = {mode: judge(row, mode, False, forgetful_cache).kind for mode in GENERATING}
    missed = [mode for mode, kind in outcomes.items() if kind == EQUAL]
    assert len(missed) <= 1, f"forgotten tokens change nothing in {missed}"


@every_row
def test_the_reference_says_something(row: str) -> None:
    """A model that repeats one token would agree with any cache."""
    _skip_refused(row)
    tokens = reference(row, "greedy")
    assert isinstance(tokens, Tensor), tokens
    assert tokens.shape == (1, tokens.shape[1])
    # Configs of transformers 4 make another tiny Qwen 3 MoE, which says little.
    assert len(set(tokens[0, -NUM_NEW:].tolist())) >= (3 if RELEASE >= (5, 14) else 2)


@every_row
def test_few_cells_are_not_applicable(row: str) -> None:
    """What transformers cannot do is found by trying it, and may not grow unnoticed."""
    _skip_refused(row)
    raised = [mode for mode in MODES if isinstance(reference(row, mode), Exception)]
    assert len(raised) <= MOST_NOT_APPLICABLE[rows()[row].family], raised


@pytest.mark.matrix
@every_row
def test_static_is_refused_where_it_would_give_other_tokens(row: str) -> None:
    """There transformers' StaticCache raises KeyError, or gives other tokens (but for BLOOM)."""
    _skip_refused(row)
    config = bench(row).model.config
    if row not in NO_STATIC:
        Cache(config, "static(64)")
        return
    tried = [reference(row, mode) for mode in STATIC]
    assert row == "bloom" or any(isinstance(found, Exception) for found in tried)
    with pytest.raises(RecipeError, match="does not fit this model"):
        Cache(config, "static(64)")


def test_the_matrix_covers_enough() -> None:
    refused = [row for row in rows() if why_refused(row)]
    assert len(rows()) >= 75
    assert NUM_ROWS.get(RELEASE, (len(rows()), len(refused))) == (len(rows()), len(refused))
    assert not set(rows()) & set(missing())
    if RELEASE >= (5, 22):
        assert {row.family for row in rows().values()} == FAMILIES
        assert {row.family for row in rows().values() if row.fast} >= FAMILIES - {
            "indexed",
            "compressed",
            "multimodal",
        }


@pytest.mark.parametrize("name", ["matrix_4.57", "matrix_5.14", "matrix"])
def test_the_records_show_no_difference(name: str) -> None:
    """What was measured on each release, as it was written down; a collapse would be seen here."""
    record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    release = tuple(int(part) for part in record["versions"]["transformers"].split(".")[:2])
    signs = "".join(
        one[half] for one in record["architectures"].values() for half in ("alone", "attached")
    )
    assert set(signs) == {"=", "-"}
    assert len(record["architectures"]) == NUM_ROWS[release][0]
    assert len(signs) == NUM_ROWS[release][0] * len(MODES) * 2
    assert signs.count("-") <= {(4, 57): 480, (5, 14): 205, (5, 23): 120}[release]


def _skip_refused(row: str) -> None:
    reason = why_refused(row)
    if reason is not None:
        pytest.skip(reason)
