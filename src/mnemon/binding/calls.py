"""One `generate` call with a mnemon cache: what is done before it, in it and after it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from mnemon.binding import chunks
from mnemon.binding.reuse import OnMismatch, Reuse, Stats
from mnemon.binding.states import continues_states, keeps_states
from mnemon.cache import Cache
from mnemon.hf import generate as hf

__all__ = ["Call"]


@dataclass(slots=True, kw_only=True)
class Call:
    """A `generate` call in progress.

    Args:
        arguments: of the call, by name; changed where cached tokens consumed some.
        exact_chunk: tokens per chunk of an exact prefill; None to prefill as transformers does.
    """

    model: PreTrainedModel
    cache: Cache
    arguments: dict[str, Any]
    prompt: hf.Prompt
    on_mismatch: OnMismatch
    exact_chunk: int | None
    stats: Stats
    #: Leading ids of the call that are cached and must not be fed again.
    _num_to_skip: int = field(default=0, init=False)

    def prepare(self) -> None:
        """Fit the cache to the prompt, and compute ahead what `generate` would do worse.

        Raises:
            PrefixMismatch: see `Reuse`.
        """
        cache, prompt = self.cache, self.prompt
        is_plain = hf.is_plain_text(self.model, self.arguments, prompt)
        is_exact = is_plain and prompt.num_given == prompt.num_tokens
        chunk = self.exact_chunk if is_exact else None
        reuse = Reuse(self.model, cache, prompt, self.arguments, self.on_mismatch, self.stats)
        if chunk is not None:
            reuse.align = chunk
            reuse.limit = chunks.reusable(self.model, cache, prompt.batch_size, chunk)
        reuse.fit()
        done, last = reuse.num_cached, prompt.num_tokens - 1
        if done and hf.chunks_cached_again() and self._setting("prefill_chunk_size"):
            chunk = chunk or int(self._setting("prefill_chunk_size"))
        size = self._size_ahead(chunk) if is_plain and done < last else 0
        if size:
            self._run_ahead(done, last, size)
            done = last
        if done and hf.chunks_cached_again() and self._setting("prefill_chunk_size"):
            self.arguments["prefill_chunk_size"] = None
        if cache.batch_size == prompt.batch_size and prompt.expand > 1 and cache.num_tokens:
            cache.repeat(prompt.expand)
        self._num_to_skip = done - (prompt.num_tokens - prompt.num_given)
        hf.announce_cached(self.arguments, prompt, done)

    def _size_ahead(self, exact_chunk: int | None) -> int:
        """Chunk size in which to compute all but the prompt's last token; 0 leaves it to generate.

        Ahead, because a prompt of several beams or samples is computed once and then repeated, and
        because exact chunks, or a state that is only read one token at a time, need it.
        """
        model, cache, prompt = self.model, self.cache, self.prompt
        last = prompt.num_tokens - 1
        if exact_chunk is not None:
            return exact_chunk if continues_states(model, cache) else last
        is_continued = prompt.num_given < prompt.num_tokens
        if is_continued and prompt.num_given > 1 and not continues_states(model, cache):
            return 1
        has_beams = cache.num_tokens > 0 and cache.batch_size > prompt.batch_size
        if prompt.expand == 1 or has_beams or hf.wants_prompt_outputs(model, self.arguments):
            return 0
        if cache.num_tokens == 0 and keeps_states(cache):
            return 0  # a step rounds and clamps otherwise than the scan that transformers runs
        size = self._setting("prefill_chunk_size")
        return int(size) if size and continues_states(model, cache) else last

    def _setting(self, name: str) -> Any:
        return hf.setting(self.model, self.arguments, name, None)

    def _run_ahead(self, start: int, stop: int, size: int) -> None:
        """Compute tokens ``[start, stop)`` of the prompt, for all rows that the cache has."""
        cache, prompt = self.cache, self.prompt
        assert prompt.ids is not None  # plain text
        # Of a prompt whose beginning was not passed, the cached columns are never read.
        ids = torch.nn.functional.pad(prompt.ids, (prompt.num_tokens - prompt.num_given, 0))
        mask = None if bool((prompt.mask == 1).all()) else prompt.mask
        copies = cache.batch_size // prompt.batch_size if cache.num_tokens else 1
        if copies > 1:
            ids = ids.repeat_interleave(copies, dim=0)
            mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
        chunks.run(self.model, ids, cache, mask, start, stop, size)

    def skip_cached(self, arguments: dict[str, Any], names: hf.Stream) -> None:
        """Take from the arguments of the first forward what is cached already.

        `generate` slices the prompt itself, except where `feeds_cached_again` says otherwise.
        """
        skip, self._num_to_skip = self._num_to_skip, 0
        ids = arguments.get(names.ids)
        if not skip or ids is None or ids.ndim != 2 or ids.shape[1] < self.prompt.num_given:
            return
        if not hf.feeds_cached_again(names):
            return
        num_fed = ids.shape[1]
        for name in (names.ids, names.positions, "token_type_ids", "mm_token_type_ids"):
            value = arguments.get(name)
            if isinstance(value, torch.Tensor) and value.shape[-1] == num_fed:
                arguments[name] = value[..., skip:]
        mask = arguments.get(names.mask)
        if names.takes_own_mask and isinstance(mask, torch.Tensor):
            arguments[names.mask] = mask[..., mask.shape[-1] - (num_fed - skip) :]

    def name_unlogged(self, result: Any) -> None:
        """Name tokens that a compiled forward cached without writing them down.

        Args:
            result: what `generate` returned.
        """
        tokens = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        held, named = self.cache.num_tokens, self.cache.num_recorded
        if (
            isinstance(tokens, torch.Tensor)
            and named < held <= tokens.shape[1]
            and tokens.shape[0] == self.cache.batch_size
            and self.prompt.num_given == self.prompt.num_tokens
        ):
            self.cache.record_tokens(tokens[:, named:held], None, named)
