"""The row generators: well formed, deterministic, and every distance is true."""

from typing import Any

import numpy as np
import pytest

from mnemon.errors import ZooError
from mnemon.zoo import tasks
from mnemon.zoo.prepare import task_vocabulary

TEXT = np.random.default_rng(0).integers(300, 4096, 20_000)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> tasks.TaskVocabulary:
    return task_vocabulary(tokenizer)


def rows(vocabulary: tasks.TaskVocabulary, length: int, shares: Any, step: int = 3) -> tasks.Row:
    row, _ = tasks.make_rows(
        seed=1,
        step=step,
        num_rows=6,
        length=length,
        vocabulary=vocabulary,
        text=TEXT,
        shares=shares,
    )
    return row


@pytest.mark.parametrize("length", [64, 257, 1024, 4096])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_rows_are_well_formed(vocabulary: tasks.TaskVocabulary, length: int, kind: int) -> None:
    row = rows(vocabulary, length, tuple(float(kind == other) for other in range(3)))
    assert row.ids.shape == row.weight.shape == row.distance.shape == (6, length)
    assert row.ids.min() >= 0
    assert row.ids.max() < 4096
    assert (row.weight[:, 0] == 0).all()
    assert (row.distance > 0).any() == (kind != 2)
    for i, at in zip(*np.nonzero(row.distance), strict=True):
        assert row.ids[i, at] == row.ids[i, at - row.distance[i, at]]
        assert row.weight[i, at] > 0


def test_a_step_gives_the_same_rows_again(vocabulary: tasks.TaskVocabulary) -> None:
    shares = (0.4, 0.4, 0.2)
    first, again = rows(vocabulary, 128, shares), rows(vocabulary, 128, shares)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.ids != rows(vocabulary, 128, shares, step=4).ids).any()


def test_recalled_tokens_are_determined_by_what_precedes(
    vocabulary: tasks.TaskVocabulary,
) -> None:
    """In chunks of unique tokens, the token before a recalled one stood before its source."""
    row = rows(vocabulary, 256, (1.0, 0.0, 0.0))
    for i, at in zip(*np.nonzero(row.distance), strict=True):
        source = at - row.distance[i, at]
        assert row.ids[i, at - 1] == row.ids[i, source - 1]


def test_shares_are_kept_within_a_batch(vocabulary: tasks.TaskVocabulary) -> None:
    _, kinds = tasks.make_rows(
        seed=0,
        step=0,
        num_rows=20,
        length=64,
        vocabulary=vocabulary,
        text=TEXT,
        shares=(0.25, 0.5, 0.25),
    )
    assert np.bincount(kinds, minlength=3).tolist() == [5, 10, 5]


def test_a_row_too_short_to_repeat_is_refused(vocabulary: tasks.TaskVocabulary) -> None:
    with pytest.raises(ZooError, match="at least 16"):
        tasks.copy_row(np.random.default_rng(0), vocabulary, 8)
