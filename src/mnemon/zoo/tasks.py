"""Training rows: text, and recall tasks made so that what a cache forgets shows.

Three kinds of row, all of the same length and all reproducible from (seed, step, row):

- ``chunks``: a segment of random tokens cut into chunks, then the chunks again in
  another order. All but the first tokens of a repeated chunk can be recalled. Chunks of
  two tokens are key-value pairs; one chunk of the whole segment is copying.
- ``needles``: real text with planted lines ``@ key key value value``; later lines
  repeat the two words of a key, and the two words of its value can be recalled.
- ``text``: real text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnemon.errors import ZooError

Ids = NDArray[np.int64]
KEY_WORDS = 2
VALUE_WORDS = 2
KINDS = ("chunks", "needles", "text")


class Row(NamedTuple):
    """One training row of ``tokens`` tokens.

    Attributes:
        ids: [tokens] token ids.
        weight: [tokens] weight of the loss of predicting each token from those before it.
        distance: [tokens] for a recalled token, how many tokens back its source lies; else 0.
    """

    ids: Ids
    weight: NDArray[np.float32]
    distance: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVocabulary:
    """What the generators write with: token ids, all of them from the public tokenizer.

    Attributes:
        words: ids that read as one space and a few letters.
        ordinary: every id but the special ones.
        marker: the ids that open a planted line.
        separator: the ids between key and value in half of the rows.
        newline: the id that ends a planted line.
        bos: the id that opens a row.
    """

    words: Ids
    ordinary: Ids
    marker: tuple[int, ...]
    separator: tuple[int, ...]
    newline: int
    bos: int


def copy_row(rng: np.random.Generator, vocabulary: TaskVocabulary, length: int) -> Row:
    """A ``chunks`` row: random tokens, then their chunks again in another order.

    Args:
        rng: the source of randomness.
        vocabulary: the ids to write with.
        length: tokens in the row, at least 16.

    Returns:
        The row; only recalled tokens carry weight.

    Raises:
        ZooError: the row is too short to repeat anything.
    """
    if length < 16:
        raise ZooError(f"a chunks row needs at least 16 tokens (got length={length})")
    pool = vocabulary.words if rng.random() < 0.4 else vocabulary.ordinary
    segment_tokens = int((length - 1) * rng.uniform(0.3, 0.55))
    unique = segment_tokens <= len(pool)
    key_tokens = 1 if unique else 2
    sizes = [size for size in (2, 3, 4, 8, 16, 32) if key_tokens < size <= segment_tokens // 2]
    chunk = segment_tokens if rng.random() < 0.15 else int(rng.choice(sizes))
    num_chunks = segment_tokens // chunk
    segment_tokens = num_chunks * chunk
    segment = rng.choice(pool, size=segment_tokens, replace=not unique)

    order: list[int] = []
    remaining = length - 1 - segment_tokens
    while len(order) * chunk < remaining:
        order.extend(rng.permutation(num_chunks).tolist())
    source = (np.asarray(order)[:, None] * chunk + np.arange(chunk)).reshape(-1)[:remaining]
    offset = np.tile(np.arange(chunk), len(order))[:remaining]

    ids = np.concatenate([[vocabulary.bos], segment, segment[source]]).astype(np.int64)
    distance = np.zeros(length, dtype=np.int64)
    position = np.arange(1 + segment_tokens, length)
    distance[position] = np.where(offset >= key_tokens, position - (1 + source), 0)
    return Row(ids, (distance > 0).astype(np.float32), distance)


def text_row(rng: np.random.Generator, text: Ids, length: int) -> Row:
    """A ``text`` row: a random window of the training text, every token weighted 1."""
    start = int(rng.integers(0, len(text) - length))
    weight = np.ones(length, dtype=np.float32)
    weight[0] = 0.0
    return Row(text[start : start + length].copy(), weight, np.zeros(length, dtype=np.int64))


def needle_row(
    rng: np.random.Generator,
    vocabulary: TaskVocabulary,
    text: Ids,
    length: int,
    *,
    answer_weight: float = 2.0,
) -> Row:
    """A ``needles`` row: text, planted lines in it, and later lines that ask for them.

    Args:
        rng: the source of randomness.
        vocabulary: the ids to write with.
        text: [any] the training text's ids.
        length: tokens in the row.
        answer_weight: the loss weight of an answer's token; text weighs 1, a planted line 0.

    Returns:
        The row; ``distance`` counts to the line that was planted, not to earlier answers.
    """
    separator = vocabulary.separator if rng.random() < 0.5 else ()
    head = (*vocabulary.marker,)
    line_tokens = len(head) + KEY_WORDS + len(separator) + VALUE_WORDS + 1
    density = rng.uniform(0.1, 0.5)
    num_lines = max(2, int(length * density / line_tokens))
    num_needles = max(1, int(num_lines * rng.uniform(0.3, 0.6)))
    gaps = rng.multinomial(
        max(0, length - 1 - num_lines * line_tokens), np.full(num_lines + 1, 1 / (num_lines + 1))
    )
    # Needles come early and queries late, with an overlap: every distance occurs in one row.
    rank = np.arange(num_lines) + rng.uniform(0, num_lines * rng.uniform(0.1, 1.0), num_lines)
    needle_slots = np.zeros(num_lines, dtype=bool)
    needle_slots[np.argsort(rank)[:num_needles]] = True
    needle_slots[0] = True

    start = int(rng.integers(0, len(text) - length))
    pieces: list[Ids] = [np.array([vocabulary.bos])]
    weights: list[NDArray[np.float32]] = [np.zeros(1, dtype=np.float32)]
    distances: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    planted: list[tuple[int, Ids]] = []
    unasked: list[int] = []
    at = 1
    for slot in range(num_lines + 1):
        gap = int(gaps[slot])
        if slot == num_lines:
            gap = length - at
        pieces.append(text[start : start + gap])
        weights.append(np.ones(gap, dtype=np.float32))
        distances.append(np.zeros(gap, dtype=np.int64))
        start, at = start + gap, at + gap
        if slot == num_lines:
            break
        weight = np.zeros(line_tokens, dtype=np.float32)
        distance = np.zeros(line_tokens, dtype=np.int64)
        if needle_slots[slot]:
            key_and_value = rng.choice(vocabulary.words, KEY_WORDS + VALUE_WORDS, replace=False)
            unasked.append(len(planted))
            planted.append((at, key_and_value))
        else:
            # Ask for each needle once before any is asked for twice.
            if unasked and rng.random() < 0.8:
                chosen = unasked.pop(int(rng.integers(len(unasked))))
            else:
                chosen = int(rng.integers(len(planted)))
            asked_at, key_and_value = planted[chosen]
            weight[-1 - VALUE_WORDS : -1] = answer_weight
            distance[-1 - VALUE_WORDS : -1] = at - asked_at
        line = [
            *head,
            *key_and_value[:KEY_WORDS],
            *separator,
            *key_and_value[KEY_WORDS:],
            vocabulary.newline,
        ]
        pieces.append(np.asarray(line))
        weights.append(weight)
        distances.append(distance)
        at += line_tokens
    return Row(
        np.concatenate(pieces)[:length].astype(np.int64),
        np.concatenate(weights)[:length],
        np.concatenate(distances)[:length],
    )


def make_rows(
    *,
    seed: int,
    step: int,
    num_rows: int,
    length: int,
    vocabulary: TaskVocabulary,
    text: Ids,
    shares: tuple[float, float, float],
) -> tuple[Row, NDArray[np.int64]]:
    """The batch of one step, the same for the same arguments on every machine.

    Args:
        seed: the run's seed.
        step: the optimiser step, from 0.
        num_rows: rows in the batch.
        length: tokens per row.
        vocabulary: the ids to write with.
        text: [any] the training text's ids.
        shares: the probability of each of `KINDS`; they sum to 1.

    Returns:
        A Row of stacked arrays, each [rows, tokens], and each row's kind [rows].
    """
    rng = np.random.default_rng([seed, step, length])
    # Stratified rather than independent draws: a batch of four rows keeps its mix.
    points = (np.arange(num_rows) + rng.random()) / num_rows
    kinds = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
    rows = []
    for kind in kinds:
        if kind == 0:
            rows.append(copy_row(rng, vocabulary, length))
        elif kind == 1:
            rows.append(needle_row(rng, vocabulary, text, length))
        else:
            rows.append(text_row(rng, text, length))
    stacked = Row(*(np.stack(columns) for columns in zip(*rows, strict=True)))
    return stacked, kinds.astype(np.int64)
