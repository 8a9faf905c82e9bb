"""ListOps: nested lists of digits under MIN, MAX, MED and SM, and their value.

    [MAX 2 9 [MIN 4 7 ] 0 ]    ->  9

Source: Nangia and Bowman, arXiv 1804.06028, as generated for Long Range Arena, arXiv 2011.04006:
a node is an operator with probability 0.25 above the greatest depth, with two to ten arguments. MED
is the median rounded down, SM the sum modulo 10. Brackets stay in the text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from mnemon.errors import LearnedMemoryError

__all__ = [
    "CLASSES",
    "OPERATORS",
    "PADDING",
    "VOCABULARY",
    "Expression",
    "ListOps",
    "encode",
    "evaluate",
    "generate",
    "median",
    "text",
]

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
CLASSES = 10
VOCABULARY = ("<pad>", *map(str, range(CLASSES)), *OPERATORS, END)
PADDING = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOps:
    """What is generated.

    Args:
        shortest: tokens of an expression at least, brackets counted.
        longest: tokens at most.
        depth: operators within each other at most.
        max_args: arguments of an operator at most.
        operator_share: probability that a node above `depth` is an operator.
    """

    shortest: int = 30
    longest: int = 150
    depth: int = 5
    max_args: int = 10
    operator_share: float = 0.25


class Node(NamedTuple):
    """An operator with its arguments."""

    operator: str
    arguments: tuple[Tree, ...]


Tree: TypeAlias = int | Node


class Expression(NamedTuple):
    """An expression as tokens, and what it is worth."""

    tokens: tuple[str, ...]
    value: int


def generate(settings: ListOps, seed: int) -> Iterator[Expression]:
    """Expressions without end, the same for the same seed; each drawn anew until it fits."""
    rng = random.Random(seed)
    while True:
        # The root is an operator: a lone digit would be too short in any case.
        tree = _operator(rng, settings, 1, settings.longest)
        if tree is None:
            continue
        tokens = tuple(_words(tree))
        if settings.shortest <= len(tokens) <= settings.longest:
            yield Expression(tokens, _value(tree))


def _operator(rng: random.Random, settings: ListOps, depth: int, room: int) -> Node | None:
    """An operator at `depth`, or None as soon as it cannot stay within `room` tokens."""
    name = rng.choice(OPERATORS)
    count = rng.randint(2, settings.max_args)
    left = room - 2 - count
    arguments: list[Tree] = []
    for _ in range(count):
        if depth >= settings.depth or rng.random() > settings.operator_share:
            arguments.append(rng.randrange(CLASSES))
            continue
        inner = _operator(rng, settings, depth + 1, left + 1) if left >= 0 else None
        if inner is None:
            return None
        left -= _length(inner) - 1
        arguments.append(inner)
    return Node(name, tuple(arguments)) if left >= 0 else None


def _length(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(map(_length, tree.arguments))


def _words(tree: Tree) -> Iterator[str]:
    if isinstance(tree, int):
        yield str(tree)
        return
    yield tree.operator
    for argument in tree.arguments:
        yield from _words(argument)
    yield END


def _value(tree: Tree) -> int:
    if isinstance(tree, int):
        return tree
    return _applied(tree.operator, [_value(argument) for argument in tree.arguments])


def _applied(operator: str, values: Sequence[int]) -> int:
    match operator:
        case "[MIN":
            return min(values)
        case "[MAX":
            return max(values)
        case "[MED":
            return median(values)
        case _:
            return sum(values) % CLASSES


def median(values: Sequence[int]) -> int:
    """The median, rounded down where it lies between two values."""
    ordered, half = sorted(values), len(values) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) // 2


def evaluate(tokens: Sequence[str]) -> int:
    """The value of an expression, read from its tokens.

    Raises:
        LearnedMemoryError: not one whole expression.
    """
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for token in tokens:
        if token in OPERATORS:
            open_lists.append((token, []))
        elif token == END and len(open_lists) > 1 and open_lists[-1][1]:
            operator, values = open_lists.pop()
            open_lists[-1][1].append(_applied(operator, values))
        elif len(token) == 1 and token.isdecimal() and token.isascii():
            open_lists[-1][1].append(int(token))
        else:
            raise LearnedMemoryError(
                f"{token!r} came in an expression; a digit, an operator "
                f"({', '.join(OPERATORS)}), or ']' after at least one argument was expected"
            )
    if len(open_lists) != 1 or len(open_lists[0][1]) != 1:
        raise LearnedMemoryError(
            f"{text(tokens)[:60]!r} came; one expression with all its brackets was expected"
        )
    return open_lists[0][1][0]


def text(tokens: Sequence[str]) -> str:
    """Tokens as one line; split at spaces they are tokens again."""
    return " ".join(tokens)


def encode(tokens: Sequence[str]) -> list[int]:
    """Tokens as places in `VOCABULARY`."""
    places = {word: place for place, word in enumerate(VOCABULARY)}
    return [places[token] for token in tokens]
