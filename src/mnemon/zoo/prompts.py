"""Recall prompts at a chosen distance, with fixed seeds.

Two tasks. The distance is the same thing in both: how many tokens before an answer's
token the same token stood in the prompt.

``needle``: real text, one planted line ``@ key key value value`` and a few more such
lines with other keys; the prompt ends with the line's beginning, ``@ key key``::

    ... filler ...
    @ parser name window sort
    ... filler, `distance` tokens from one @ to the other ...
    @ parser name            -> " window sort"

``pairs``: no text at all, only random words read as two-word keys with two-word values::

     key key value value  key key value value ... key key  -> " value value"

Every prompt is text: encoding its decoding gives the same ids (but for ``<|bos|>``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mnemon.errors import ZooError
from mnemon.zoo.tasks import KEY_WORDS, VALUE_WORDS, Ids
from mnemon.zoo.tokenizer import word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("needle", "pairs")
PREFIX_TOKENS = 64  # tokens before the thing to recall


class RecallPrompt(NamedTuple):
    """A prompt and what should follow.

    Attributes:
        input_ids: the prompt's token ids, ``<|bos|>`` first.
        answer_ids: the two tokens that are right.
        distance: tokens from each answer token back to its source.
    """

    input_ids: list[int]
    answer_ids: list[int]
    distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMaker:
    """Makes prompts with one tokenizer and one filler text.

    Attributes:
        words: ids of the words keys and values are drawn from.
        filler: ids of the filler text.
        line_starts: where in ``filler`` a piece may begin: at a line that begins with a letter.
        may_end: whether a piece may end before each position: between two pieces of BPE.
        marker: the ids that open a planted line.
        newline: the id that ends one.
        bos: the id that opens a prompt.
    """

    words: Ids
    filler: Ids
    line_starts: Ids
    may_end: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    marker: tuple[int, ...]
    newline: int
    bos: int

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, filler: str) -> PromptMaker:
        """Prepare a filler text for a tokenizer."""
        ids = list(tokenizer(filler, verbose=False)["input_ids"])
        pieces = [str(tokenizer.decode([token_id])) for token_id in ids]
        starts = [
            i for i in range(1, len(ids)) if pieces[i - 1] == "\n" and pieces[i][:1].isalpha()
        ]
        may_end = np.zeros(len(ids) + 1, dtype=np.bool_)
        for i in range(1, len(ids)):
            may_end[i] = pieces[i - 1][-1:].isalnum() and pieces[i][:1] in {" ", "\n"}
        return cls(
            words=np.asarray(word_ids(tokenizer)),
            filler=np.asarray(ids, dtype=np.int64),
            line_starts=np.asarray(starts, dtype=np.int64),
            may_end=may_end,
            marker=tuple(tokenizer("\n@")["input_ids"]),
            newline=int(tokenizer("\n")["input_ids"][0]),
            bos=int(tokenizer.bos_token_id),
        )

    def _piece(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        if num_tokens == 0:
            return []
        fits = self.line_starts[self.line_starts + num_tokens < len(self.filler)]
        fits = fits[self.may_end[fits + num_tokens]]
        if len(fits) == 0:
            raise ZooError(
                f"the filler text has no piece of {num_tokens} tokens that begins a line "
                f"(it has {len(self.filler)} tokens); give a longer one"
            )
        start = int(fits[rng.integers(len(fits))])
        return [int(token) for token in self.filler[start : start + num_tokens]]

    def _text(self, rng: np.random.Generator, num_tokens: int, lines: list[list[int]]) -> list[int]:
        """Filler of an exact length with whole lines strewn in."""
        room = num_tokens - sum(map(len, lines))
        cuts = np.sort(rng.integers(0, room // 8 + 1, len(lines))) * 8
        out: list[int] = []
        for begin, end, line in zip([0, *cuts], [*cuts, room], [*lines, list[int]()], strict=True):
            out += self._piece(rng, int(end - begin)) + line
        return out

    def needle(self, *, distance: int, seed: int, num_distractors: int = 4) -> RecallPrompt:
        """One needle prompt; ``distance`` at least 24 tokens.

        Raises:
            ZooError: the distance is too short for the lines.
        """
        if distance < 24:
            raise ZooError(f"a needle needs a distance of 24 tokens or more (got {distance})")
        rng = np.random.default_rng([seed, distance, 0])
        drawn = rng.choice(
            self.words, (1 + num_distractors) * (KEY_WORDS + VALUE_WORDS), replace=False
        ).reshape(1 + num_distractors, -1)
        lines = [[*self.marker, *map(int, words), self.newline] for words in drawn]
        between_tokens = distance - len(lines[0])
        room = min(num_distractors // 2, between_tokens // (len(lines[0]) + 8))
        before = self._text(rng, PREFIX_TOKENS, lines[1 + room :])
        between = self._text(rng, between_tokens, lines[1 : 1 + room])
        query = lines[0][: len(self.marker) + KEY_WORDS]
        answer = lines[0][len(self.marker) + KEY_WORDS : -1]
        return RecallPrompt([self.bos, *before, *lines[0], *between, *query], answer, distance)

    def pairs(self, *, distance: int, seed: int) -> RecallPrompt:
        """One prompt of key-value pairs; ``distance`` a multiple of 4 tokens, 8 or more.

        Raises:
            ZooError: another distance.
        """
        size = KEY_WORDS + VALUE_WORDS
        if distance < 2 * size or distance % size:
            raise ZooError(
                f"pairs need a distance of {2 * size} tokens or more, a multiple of {size} "
                f"(got {distance})"
            )
        rng = np.random.default_rng([seed, distance, 1])
        num_before, num_after = PREFIX_TOKENS // size, distance // size - 1
        drawn = rng.choice(self.words, ((num_before + 1 + num_after), size))
        asked = drawn[num_before]
        # No other pair may have the key: where one came up, move its first word along.
        clash = (drawn[:, :KEY_WORDS] == asked[:KEY_WORDS]).all(axis=1)
        clash[num_before] = False
        drawn[clash, 0] = self.words[(np.searchsorted(self.words, asked[0]) + 1) % len(self.words)]
        ids = [self.bos, *map(int, drawn.reshape(-1)), *map(int, asked[:KEY_WORDS])]
        return RecallPrompt(ids, [int(word) for word in asked[KEY_WORDS:]], distance)

    def make(self, task: str, *, distance: int, seed: int) -> RecallPrompt:
        """One prompt of the named task.

        Raises:
            ZooError: no such task, or a distance it cannot have.
        """
        makers: dict[str, Callable[..., RecallPrompt]] = {
            "needle": self.needle,
            "pairs": self.pairs,
        }
        if task not in makers:
            raise ZooError(f"no recall task is called {task!r}; there are: {', '.join(TASKS)}")
        return makers[task](distance=distance, seed=seed)
