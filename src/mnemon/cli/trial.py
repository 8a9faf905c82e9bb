"""Run one generation and measure it: speed, first token, peak memory, logits on a given text."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon.hf.generate import stream, supports_logits_to_keep
from mnemon.hf.streaming import BaseStreamer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["PeakMemory", "Scores", "Trial", "generate", "score"]

SINGLE_STEPS = 16  # tokens that `score` feeds one by one, as decoding does
SCORE_CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of `model.generate`.

    Attributes:
        tokens: the new token ids.
        first_token_s: seconds from the call to the first new token.
        step_s: seconds from each new token to the next; one shorter than `tokens`.
    """

    tokens: list[int]
    first_token_s: float
    step_s: list[float]


class Scores(NamedTuple):
    """What a cache predicts on a text that is fed to it.

    Attributes:
        logits: [tokens, vocabulary], float32 on the CPU: the prediction of each scored token.
        nll: total negative log likelihood of the scored tokens, in nats.
    """

    logits: torch.Tensor
    nll: float


class _Clock(BaseStreamer):  # type: ignore[no-untyped-call,misc,unused-ignore]
    """Notes when each new token arrives; the prompt, which comes first, is not one."""

    def __init__(self, on_first: Callable[[], None] | None = None) -> None:
        self.times: list[float] = []
        self._prompt_seen = False
        self._on_first = on_first

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any, num_new: int) -> Trial:
    """Generate greedily, exactly `num_new` tokens, and time each of them.

    Args:
        model: in evaluation mode.
        ids: [1, tokens] the prompt.
        cache: what is passed as `past_key_values`.
        num_new: new tokens; the end-of-sequence token is held back until then.

    Returns:
        The new tokens and their times.
    """
    import torch

    clock = _Clock()
    start = time.perf_counter()
    out = model.generate(  # type: ignore[operator,unused-ignore]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        streamer=clock,
        **{stream(model).cache: cache},  # Mamba-type models have their own name for it
        **GREEDY,
        **pad_option(model),
    )
    steps = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]
    return Trial(
        tokens=out[0, ids.shape[1] :].tolist(), first_token_s=clock.times[0] - start, step_s=steps
    )


# A model's own generation_config may ask for sampling; None switches each option off.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def pad_option(model: PreTrainedModel) -> dict[str, int]:
    """A padding token for models that name none, so that `generate` does not warn."""
    config = model.generation_config
    if config is None or config.pad_token_id is not None:
        return {}
    end = config.eos_token_id
    return {"pad_token_id": end[0] if isinstance(end, list) else end} if end is not None else {}


def score(model: PreTrainedModel, ids: torch.Tensor, cache: Any, num_prompt: int) -> Scores:
    """Feed a text through a cache and note what was predicted after the prompt.

    The prompt goes in whole; then `SINGLE_STEPS` tokens one by one, as in decoding; then chunks.

    Args:
        model: in evaluation mode.
        ids: [1, tokens] prompt and continuation.
        cache: an empty cache.
        num_prompt: tokens of the prompt, fewer than `tokens`.

    Returns:
        The prediction of every token after the prompt.
    """
    import torch

    ends = [num_prompt, *range(num_prompt + 1, min(num_prompt + SINGLE_STEPS, ids.shape[1]) + 1)]
    while ends[-1] < ids.shape[1]:
        ends.append(min(ends[-1] + SCORE_CHUNK, ids.shape[1]))
    pieces, start = [], 0
    name, can_cut = stream(model).cache, supports_logits_to_keep(model)
    with torch.no_grad():
        for end in ends:
            options: dict[str, Any] = {name: cache, "use_cache": True}
            if start == 0 and can_cut:
                options["logits_to_keep"] = 1
            logits = model(input_ids=ids[:, start:end], **options).logits[0]
            # of the prompt only the last prediction counts
            pieces.append((logits[-1:] if start == 0 else logits).float().cpu())
            start = end
    logits = torch.cat(pieces)[:-1]  # the last one predicts what follows the text
    target = ids[0, num_prompt:].cpu()
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return Scores(logits, float(nll))


@dataclass(slots=True)
class PeakMemory:
    """A context: how far memory rose above where it stood, in `bytes`, None where unknown.

    On an accelerator the allocator's own peak is read. On Linux the kernel's peak of resident
    memory is reset and read; freed memory is first given back, or old garbage would hide growth.
    """

    device: Any
    bytes: int | None = None
    _before: int | None = field(default=None, repr=False)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before = _reset_resident_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            import torch

            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        self.bytes = None if peak is None else max(0, peak - self._before)


def _reset_resident_peak() -> int | None:
    """Give freed memory back, reset the kernel's peak; resident bytes now, None if not possible."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # a C library without it: the figure is only a little less sharp
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """One line of the kernel's account of this process, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
