"""One answer of a model: generated, streamed as text, timed. `generate` and `chat` share it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteria, StoppingCriteriaList

from mnemon.cli.trial import GREEDY, pad_option
from mnemon.hf.generate import stream as argument_names
from mnemon.hf.streaming import BaseStreamer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mnemon.binding import Attachment
    from mnemon.cli.models import LoadedModel

__all__ = ["Answer", "Sampling", "StopSign", "answer", "interruptible"]

Write = Callable[[str], None]

MIN_TEMPERATURE = 1e-5  # below, probabilities are those of the likeliest token, or overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this probability; 1 is all.
        seed: of the random choices; None leaves the generator as it is.
        num_beams: 1, or beam search, which cannot stream.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1

    def options(self) -> dict[str, Any]:
        """As `model.generate` takes them."""
        options = {**GREEDY, "num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.temperature > MIN_TEMPERATURE:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            del options["top_k"]  # the model's own, if it names one
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came out of one call.

    Attributes:
        tokens: the new token ids.
        text: the new text, without special tokens and without the stop marker.
        num_prompt: tokens of the prompt.
        num_reused: prompt tokens that were taken from the cache.
        first_token_s: seconds to the first token; None with beams.
        tokens_per_s: speed after the first token (over all with beams), None if there is none.
        total_s: seconds in all.
        interrupted: whether it was stopped from outside.
    """

    tokens: list[int]
    text: str
    num_prompt: int
    num_reused: int
    first_token_s: float | None
    tokens_per_s: float | None
    total_s: float
    interrupted: bool


class StopSign:
    """A flag that a Ctrl-C raises and that generation looks at after each token."""

    def __init__(self) -> None:
        self.is_up = False

    def raise_(self) -> None:
        """Ask generation to stop."""
        self.is_up = True


@contextmanager
def interruptible() -> Iterator[StopSign]:
    """While open, a first Ctrl-C raises the stop sign; a second one interrupts as usual.

    Stopping between two tokens leaves the cache whole. Signals reach the main thread only: in any
    other the sign never goes up.
    """
    sign = StopSign()
    if threading.current_thread() is not threading.main_thread():
        yield sign
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if sign.is_up:
            raise KeyboardInterrupt
        sign.raise_()

    signal.signal(signal.SIGINT, handler)
    try:
        yield sign
    finally:
        signal.signal(signal.SIGINT, before)


class _Stream(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Turns tokens into text as they come, and stops at a marker without showing any of it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Write | None, marker: str | None
    ) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.found_marker = False
        self._tokenizer, self._write, self._marker = tokenizer, write, marker
        self._prompt_seen = False
        self._num_shown = 0

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # `generate` hands over the prompt first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.ids.extend(value.reshape(-1).tolist())
        if self._marker and self._marker in self._decoded():
            self.found_marker = True
        if self._write is not None:
            self._show(self._safe(self.text()))

    def end(self) -> None:
        if self._write is not None:
            self._show(self.text())

    def text(self) -> str:
        """What came so far, up to the marker."""
        text = self._decoded()
        return text.split(self._marker, 1)[0] if self._marker else text

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self.ids, skip_special_tokens=True))

    def _safe(self, text: str) -> str:
        """What later tokens cannot change: no half character, no beginning of the marker."""
        text = text.rstrip("\ufffd")
        marker = self._marker or ""
        for size in range(min(len(marker) - 1, len(text)), 0, -1):
            if text.endswith(marker[:size]):
                return text[:-size]
        return text

    def _show(self, text: str) -> None:
        if self._write is not None and len(text) > self._num_shown:
            self._write(text[self._num_shown :])
            self._num_shown = len(text)


class _Stop(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Stops at the marker or at the stop sign."""

    def __init__(self, stream: _Stream, sign: StopSign) -> None:
        self._stream, self._sign = stream, sign

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        is_done = self._stream.found_marker or self._sign.is_up
        return torch.full((input_ids.shape[0],), is_done, device=input_ids.device)


def answer(
    loaded: LoadedModel,
    ids: list[int],
    cache: Any,
    attachment: Attachment,
    sampling: Sampling,
    *,
    write: Write | None = None,
    marker: str | None = None,
    sign: StopSign | None = None,
) -> Answer:
    """Generate an answer to a prompt, reusing what the cache holds of it.

    Args:
        loaded: the model, attached, and its tokenizer.
        ids: the whole prompt.
        cache: a `mnemon.Cache`; afterwards it holds the prompt and all new tokens but the last.
        attachment: what `mnemon.attach(model)` returned; it counts the reused tokens.
        sampling: how tokens are chosen.
        write: called with each piece of new text; None to be silent.
        marker: text at which the answer ends, e.g. the beginning of the next turn.
        sign: stops generation when it goes up.

    Returns:
        The answer and its times.
    """
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    sign = sign or StopSign()
    stream = _Stream(tokenizer, write, marker)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    prompt = torch.tensor([ids], device=model.device)
    stats = attachment.stats
    before = stats.tokens_reused
    options: dict[str, Any] = {**sampling.options(), **pad_option(model)}
    if sampling.num_beams == 1:
        options["streamer"] = stream
        options["stopping_criteria"] = StoppingCriteriaList([_Stop(stream, sign)])
    name = argument_names(model).cache  # Mamba-type models have their own
    start = time.perf_counter()
    out = model.generate(  # type: ignore[operator,unused-ignore]
        prompt, attention_mask=torch.ones_like(prompt), **{name: cache}, **options
    )
    total_s = time.perf_counter() - start
    # An encoder-decoder answers from its own start token; a decoder goes on after the prompt.
    num_before = 1 if model.config.is_encoder_decoder else len(ids)
    tokens = out[0, num_before:].tolist()
    if not stream.ids:
        stream.ids = tokens
    return Answer(
        tokens=tokens,
        text=stream.text(),
        num_prompt=len(ids),
        num_reused=stats.tokens_reused - before,
        first_token_s=stream.times[0] - start if stream.times else None,
        tokens_per_s=_speed(stream.times, len(tokens), total_s),
        total_s=total_s,
        interrupted=sign.is_up,
    )


def _speed(times: list[float], num_tokens: int, total_s: float) -> float | None:
    if len(times) > 1:
        return (len(times) - 1) / (times[-1] - times[0])
    return num_tokens / total_s if num_tokens and not times else None
