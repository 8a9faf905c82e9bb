"""ListOps: values by hand, and what is generated."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice

import pytest

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.experiments.listops import (
    OPERATORS,
    PADDING,
    VOCABULARY,
    ListOps,
    encode,
    evaluate,
    generate,
    median,
    text,
)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 2 9 [MAX 4 7 ] 1 ]", 1),
        ("[SM 9 9 9 ]", 7),
        ("[SM [SM 5 5 ] [SM 1 2 ] ]", 3),
        ("[MED 1 2 ]", 1),
        ("[MED 8 1 2 5 ]", 3),
        ("[MED 9 0 4 ]", 4),
        ("[MAX [MED 3 [SM 8 [MIN 7 4 ] ] 9 ] 1 ]", 3),
        ("[MIN 5 ]", 5),
    ],
)
def test_values_by_hand(expression: str, value: int) -> None:
    assert evaluate(expression.split()) == value


@pytest.mark.parametrize(
    "wrong",
    ["", "[MAX ]", "[MAX 1 2", "1 2", "]", "[MAX 1 2 ] ]", "[MAX 1 x ]", "[AVG 1 2 ]", "12", "²"],
)
def test_what_is_no_expression(wrong: str) -> None:
    with pytest.raises(LearnedMemoryError, match="came"):
        evaluate(wrong.split())


def test_the_median_is_the_whole_part_of_the_usual_one() -> None:
    for values in ([3], [1, 2], [4, 9, 0, 1], [9, 9, 8, 8], [5, 1, 4]):
        assert median(values) == int(statistics.median(values))


def depth(tokens: tuple[str, ...]) -> int:
    deepest = now = 0
    for token in tokens:
        now += (token in OPERATORS) - (token == "]")
        deepest = max(deepest, now)
    return deepest


def arguments(tokens: tuple[str, ...]) -> list[list[bool]]:
    """For each operator, which of its arguments are operators."""
    done: list[list[bool]] = []
    open_lists: list[list[bool]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            open_lists[-1].append(True)
            open_lists.append([])
        elif token == "]":
            done.append(open_lists.pop())
        else:
            open_lists[-1].append(False)
    return done


def test_what_is_generated() -> None:
    found = list(islice(generate(ListOps(), 4), 1500))
    assert all(evaluate(expression.tokens) == expression.value for expression in found)
    lengths = [len(expression.tokens) for expression in found]
    assert min(lengths) >= 30
    assert max(lengths) <= 150
    assert 70 < statistics.fmean(lengths) < 100
    depths = [depth(expression.tokens) for expression in found]
    assert max(depths) == 5
    counts = [len(each) for expression in found for each in arguments(expression.tokens)]
    assert (min(counts), max(counts)) == (2, 10)
    first = Counter(expression.tokens[0] for expression in found)
    assert set(first) == set(OPERATORS)
    assert min(first.values()) > 0.2 * len(found)
    values = Counter(expression.value for expression in found)
    assert set(values) == set(range(10))
    assert max(values.values()) < 0.2 * len(found)
    assert len({expression.tokens for expression in found}) == len(found)


def test_a_quarter_of_the_nodes_are_operators() -> None:
    """Without limits on the length, which favour some."""
    free = ListOps(shortest=0, longest=10**6, depth=2)
    found = islice(generate(free, 1), 3000)
    roots = [each for expression in found for each in arguments(expression.tokens)[-1:]]
    share = statistics.fmean(inner for root in roots for inner in root)
    assert abs(share - 0.25) < 0.01
    assert abs(statistics.fmean(len(root) for root in roots) - 6) < 0.15


def test_the_same_seed_gives_the_same() -> None:
    one, two, other = (list(islice(generate(ListOps(), seed), 5)) for seed in (1, 1, 2))
    assert one == two != other


def test_tokens_go_round() -> None:
    (expression,) = islice(generate(ListOps(), 3), 1)
    assert tuple(text(expression.tokens).split()) == expression.tokens
    ids = encode(expression.tokens)
    assert PADDING not in ids
    assert tuple(VOCABULARY[i] for i in ids) == expression.tokens
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 16
