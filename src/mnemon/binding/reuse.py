"""What of a cache serves the prompt of a `generate` call: verified, cropped, rows chosen.

The order of one call::

    content   another image or encoder input            -> forget everything
    tokens    compare the log with the prompt           -> crop to the common prefix, or forget
    rows      the cached row that serves each prompt    -> select, repeat
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from mnemon.binding import prefix
from mnemon.binding.content import digest
from mnemon.binding.states import continues_states
from mnemon.binding.tracking import is_of_another_model
from mnemon.cache import Cache
from mnemon.errors import PrefixMismatch
from mnemon.hf import generate as hf

__all__ = ["OnMismatch", "Reuse", "Stats"]

OnMismatch = Literal["crop", "error"]


@dataclass(slots=True, kw_only=True)
class Stats:
    """Counts over the `generate` calls of one attachment; tokens are counted per prompt row.

    Args:
        calls: `generate` calls that brought a mnemon cache.
        tokens_reused: prompt tokens taken from a cache.
        tokens_unverified: of these, tokens that nobody could compare (given as embeddings, or
            cached without their ids).
        tokens_computed: prompt tokens that the model had to compute.
        tokens_recomputed: of these, tokens that were cached and matched, yet had to be computed
            again (the last token of a wholly cached prompt, or what a reset lost).
        tokens_cropped: cached tokens dropped because the prompt does not continue them.
        resets: caches emptied because they could not be cropped, or held another image or another
            encoder input.
    """

    calls: int = 0
    tokens_reused: int = 0
    tokens_unverified: int = 0
    tokens_computed: int = 0
    tokens_recomputed: int = 0
    tokens_cropped: int = 0
    resets: int = 0


@dataclass(slots=True)
class Reuse:
    """Fits one cache to one prompt. After `fit`, `num_cached` leading prompt tokens are in it.

    Args:
        arguments: of the `generate` call, by name; inputs that the cached tokens already consumed
            are taken out.
        limit: reuse at most so many tokens.
        align: reuse a multiple of so many tokens.

    Raises (all methods):
        PrefixMismatch: the cache does not hold the prompt's beginning and `on_mismatch` is
            "error", or what is missing was not passed either.
    """

    model: PreTrainedModel
    cache: Cache
    prompt: hf.Prompt
    arguments: dict[str, Any]
    on_mismatch: OnMismatch
    stats: Stats
    limit: int | None = None
    align: int = 1
    num_cached: int = 0
    _num_matching: int = field(default=0, init=False)
    _num_unverified: int = field(default=0, init=False)

    def fit(self) -> None:
        self._fit()
        rows, computed = self.prompt.batch_size, self.prompt.num_tokens - self.num_cached
        self.stats.tokens_reused += self.num_cached * rows
        self.stats.tokens_unverified += min(self._num_unverified, self.num_cached * rows)
        self.stats.tokens_computed += computed * rows
        self.stats.tokens_recomputed += max(0, self._num_matching - self.num_cached) * rows

    def _fit(self) -> None:
        cache, is_pair = self.cache, bool(self.model.config.is_encoder_decoder)
        tensors = hf.other_tensors(self.model, self.arguments)
        content, before = digest(tensors), cache.content_key or ""
        # An encoder's keys may be cached before the decoder has seen a token.
        is_filled = cache.batch_size > 0
        is_continued = self.prompt.num_given < self.prompt.num_tokens
        if is_filled and not is_continued and is_of_another_model(cache, self.model):
            self._mismatch("another model filled it, or one that is gone")
            self._reset()
            is_filled = False
        if is_filled and (is_pair or content) and content != before and not is_continued:
            self._forget_content(is_pair)
            is_filled = False
        if is_filled:
            self._fit_tokens(grouped=is_pair or bool(before))
            if content and content == before and self.num_cached and not (is_pair or is_continued):
                self._drop_consumed(tensors)
        elif is_continued:
            raise PrefixMismatch(_missing(self.prompt, 0))
        if content and content != before:
            joined = is_continued and bool(before) and not is_pair
            cache.content_key = f"{before}+{content}" if joined else content

    # -- tokens ----------------------------------------------------------------------------------

    def _fit_tokens(self, *, grouped: bool) -> None:
        prompt, cache = self.prompt, self.cache
        held = cache.num_tokens
        if prompt.num_given < prompt.num_tokens:
            self._fit_continuation(held)
            return
        if prompt.unreadable:
            self._mismatch(f"the prompt cannot be compared: {prompt.unreadable}")
            self._reset()
            return
        log = cache.tokens
        is_unnamed = prompt.ids is None or bool((log == prefix.UNKNOWN).any())
        if (grouped or is_unnamed) and not self._rows_are_clear(is_unnamed):
            self._mismatch(self._unclear_rows())
            self._reset()
            return
        if prompt.ids is None:
            ids = torch.full((prompt.batch_size, prompt.num_tokens), prefix.UNKNOWN)
            log = torch.full_like(log, prefix.UNKNOWN)
        else:
            ids = prefix.marked(prompt.ids, prompt.mask)
        rows, common = self._best_rows(log, ids, grouped=grouped)
        if common < held:
            self._mismatch(_difference(log, ids, rows))
        self._num_matching = common
        # At least one token has to run: its logits choose the first new one.
        keep = min(common, prompt.num_tokens - 1)
        if cache.num_recorded:
            # What a compiled forward added to named tokens nobody wrote down: computed again.
            keep = min(keep, cache.num_recorded)
        keep = keep if self.limit is None else min(keep, self.limit)
        keep = keep // self.align * self.align
        if 0 < keep < prompt.num_tokens - 1 and not continues_states(self.model, cache):
            keep = 0
            self.stats.resets += 1
        if self._shorten(held, keep, common):
            self._choose(rows)
            self.num_cached = keep
            unknown = log[rows, :keep] == prefix.UNKNOWN
            self._num_unverified = int(unknown.sum()) * prompt.batch_size // len(rows)

    def _fit_continuation(self, held: int) -> None:
        """Only new tokens were passed: the mask says how many are cached, and nobody says which."""
        prompt, cache = self.prompt, self.cache
        if prompt.num_tokens - prompt.num_given != held or prompt.unreadable:
            raise PrefixMismatch(_missing(prompt, held))
        log = cache.tokens
        if not self._rows_are_clear(True):
            raise PrefixMismatch(
                f"Only new tokens were passed, and {self._unclear_rows()}. Choose with "
                f"cache.select(rows)."
            )
        # What can be compared is where padding was.
        cached = torch.where(log == prefix.UNKNOWN, log, (log == prefix.PADDING).to(log.dtype))
        passed = (prompt.mask[:, :held].to("cpu") == 0).to(log.dtype)
        rows, common = self._best_rows(cached, passed, grouped=cache.batch_size > 1)
        if common < held:
            raise PrefixMismatch(
                f"Only new tokens were passed ({prompt.num_given} ids, a mask of "
                f"{prompt.num_tokens}), and at position {common} the mask and the cache disagree: "
                f"padding in one, a token in the other. Pass the mask that the cache was filled "
                f"with, or the whole prompt."
            )
        self._choose(rows)
        self.num_cached = held
        self._num_unverified = held * prompt.batch_size

    def _rows_are_clear(self, is_unnamed: bool) -> bool:
        """Whether the number of rows says which row belongs to which prompt."""
        held, prompts = self.cache.batch_size, self.prompt.batch_size
        if is_unnamed:
            return held in (1, prompts, prompts * self.prompt.expand)
        return held % prompts == 0

    def _unclear_rows(self) -> str:
        return (
            f"the cache holds {self.cache.batch_size} rows for {self.prompt.batch_size} prompts, "
            f"and nothing says which belongs to which"
        )

    def _best_rows(
        self, log: torch.Tensor, ids: torch.Tensor, *, grouped: bool
    ) -> tuple[torch.Tensor, int]:
        """Cache row per prompt, or per prompt and beam where the cache already holds the beams."""
        best = prefix.match(log, ids, grouped=grouped)
        if self.prompt.expand > 1 and log.shape[0] == ids.shape[0] * self.prompt.expand:
            ids = ids.repeat_interleave(self.prompt.expand, dim=0)
            as_they_are = prefix.match(log, ids, grouped=True)
            if as_they_are.num_common >= best.num_common:
                return as_they_are
        return best

    def _choose(self, rows: torch.Tensor) -> None:
        held = self.cache.batch_size
        if rows.tolist() == list(range(held)):
            return
        if held == 1:
            self.cache.repeat(len(rows))
        else:
            self.cache.select(rows)

    def _shorten(self, held: int, keep: int, common: int) -> bool:
        """Crop from `held` to `keep` tokens; False if the cache had to be emptied instead."""
        self.stats.tokens_cropped += (held - common) * self.prompt.batch_size
        if keep == held:
            return True
        # Rows of an emptied cache are nobody's, but an encoder's keys stay useful.
        worth_keeping = keep > 0 or bool(self.model.config.is_encoder_decoder)
        if worth_keeping and self.cache.can_crop(held - keep):
            self.cache.crop(keep - held)
            return True
        self.cache.reset()
        self.stats.resets += keep > 0
        return False

    def _reset(self) -> None:
        self.cache.reset()
        self.stats.resets += 1

    def _mismatch(self, difference: str) -> None:
        if self.on_mismatch == "error":
            raise PrefixMismatch(
                f"The cache does not hold the beginning of this prompt: {difference}. Pass another "
                f"cache, crop this one, or attach with on_mismatch='crop' to keep what they share."
            )

    # -- images, sounds, encoder inputs ----------------------------------------------------------

    def _forget_content(self, is_pair: bool) -> None:
        what = "encoder input" if is_pair else "image, sound or other input besides tokens"
        self._mismatch(f"it was filled with another {what}, or with one that was not recorded")
        self._reset()

    def _drop_consumed(self, tensors: dict[str, torch.Tensor]) -> None:
        """Leave out what the cached tokens already consumed; start over if some is still needed."""
        ids, placeholders = self.prompt.ids, hf.placeholder_ids(self.model)
        is_consumed = (
            ids is not None
            and bool(placeholders)
            and hf.consumed_with_prompt(tensors)
            and not bool(
                torch.isin(ids[:, self.num_cached :].to("cpu"), torch.tensor(placeholders)).any()
            )
        )
        if is_consumed:
            for name in tensors:
                self.arguments.pop(name, None)
        else:
            self._reset()
            self.cache.content_key = digest(tensors)
            self.num_cached = 0


def _difference(log: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> str:
    ids = ids.repeat_interleave(len(rows) // len(ids), dim=0)
    row, position = prefix.first_difference(log, ids, rows)
    held, wanted = log.shape[1], ids.shape[1]
    where = f"(row {row}; the cache holds {held} tokens, the prompt has {wanted})"
    if position == wanted:
        return f"the prompt ends at position {wanted} where the cache goes on {where}"
    cached, came = int(log[int(rows[row]), position]), int(ids[row, position])
    return f"at position {position} it holds {_name(cached)} and {_name(came)} came {where}"


def _name(token: int) -> str:
    return "padding" if token == prefix.PADDING else f"token {token}"


def _missing(prompt: hf.Prompt, held: int) -> str:
    claimed = prompt.num_tokens - prompt.num_given
    return (
        f"Only {prompt.num_given} tokens were passed and the mask covers {prompt.num_tokens}, so "
        f"{claimed} should be cached; the cache holds {held}. Pass the whole prompt, or the cache "
        f"and the mask that belong together."
    )
