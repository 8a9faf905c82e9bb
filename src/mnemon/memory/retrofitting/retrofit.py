"""`mnemon.memory.retrofit`: from a causal language model to one that compresses its cache."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mnemon.errors import LearnedMemoryError
from mnemon.memory.retrofitting.data import Data, Rows, bundled_rows, bundled_text, rows_of
from mnemon.memory.retrofitting.measuring import calibrate
from mnemon.memory.retrofitting.options import RetrofitOptions
from mnemon.memory.retrofitting.trainer import Progress, Retrofitter

__all__ = ["calibration_rows", "make_rows", "retrofit", "run_with_checkpoints"]


def retrofit(
    model: PreTrainedModel,
    method: str | None = "dmc",
    ratio: float = 4.0,
    *,
    data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    autocast: bool | None = None,
    calibrated: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_s: float = 60.0,
    after_step: Callable[[Progress], None] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Train `model` further until its cache holds one slot per `ratio` tokens.

    Args:
        model: a causal model of Llama, Qwen2, Qwen3 or Mistral type; changed in place, float32
            from then on.
        method: ``"dmc"`` merges tokens, ``"dms"`` drops them after a window; None or ``"none"``
            trains as long without compression, a control.
        ratio: tokens seen per slot kept.
        data: texts, token ids, or a function of the step, see `rows_of`; None is what the bundled
            model was trained with, for its vocabulary.
        tokenizer: of the model, for texts and for the bundled mixture.
        device: where to train; None leaves the model where it is.
        autocast: compute in bfloat16; None does so on an accelerator.
        calibrated: at the end, shift the decisions' offset until rows of the data are compressed by
            `ratio` without the noise of training.
        checkpoint: a file for the run's state, written every `checkpoint_s` seconds and when the
            run is interrupted; it goes away at the end.
        resume: go on from that file.
        after_step: is told of each step.
        **options: further fields of `RetrofitOptions`.

    Returns:
        `model`, which follows `mnemon.Cache(model.config)`; write it by `save_retrofitted`.

    Raises:
        LearnedMemoryError: another kind of model, a value out of range, no data, or a checkpoint
            that is missing or of another run.
        FileError: the checkpoint cannot be written.
    """
    wanted = _options(method or "none", ratio, options)
    if resume and checkpoint is None:
        raise LearnedMemoryError("resume needs the checkpoint to go on from: pass checkpoint=.")
    rows = make_rows(data, tokenizer, wanted, model)
    if device is not None:
        torch.nn.Module.to(model, device)
    trainer = Retrofitter(model, rows, wanted, autocast=autocast)
    run_with_checkpoints(
        trainer, checkpoint, resume=resume, every_s=checkpoint_s, after_step=after_step
    )
    if calibrated and trainer.control is not None and wanted.ratio > 1:
        calibrate(
            model, calibration_rows(rows, wanted, model, tokenizer, own=data is None), wanted.ratio
        )
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return model


def run_with_checkpoints(
    trainer: Retrofitter,
    checkpoint: str | os.PathLike[str] | None,
    *,
    resume: bool = False,
    every_s: float = 60.0,
    after_step: Callable[[Progress], None] | None = None,
) -> None:
    """Train to the end; an interrupt leaves a checkpoint to go on from."""
    if checkpoint is not None and resume:
        trainer.load(checkpoint)
    saved = time.monotonic()
    with _deferred_interrupt() as interrupted:

        def note(progress: Progress) -> None:
            nonlocal saved
            if after_step is not None:
                after_step(progress)
            stops = interrupted()
            if checkpoint is not None and (stops or time.monotonic() - saved > every_s):
                trainer.save(checkpoint)
                saved = time.monotonic()
            if stops:
                raise KeyboardInterrupt

        trainer.run(note)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, so that a step is never left half done.

    The second one stops at once. Outside the main thread signals do not come.
    """
    came = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def make_rows(
    data: Data | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RetrofitOptions,
    model: PreTrainedModel,
) -> Rows:
    """The rows of `data`, or the bundled model's mixture.

    Raises:
        LearnedMemoryError: no tokenizer, or no data for a model that is not the bundled one.
    """
    if data is not None:
        return rows_of(data, tokenizer, options)
    if tokenizer is None or tokenizer.vocab_size != model.config.vocab_size:
        raise LearnedMemoryError(
            "Without data a retrofit trains with what the bundled model was trained with, and "
            "needs the model's tokenizer: pass tokenizer=, or data= with texts or token ids."
        )
    return bundled_rows(tokenizer, options)


def calibration_rows(
    rows: Rows,
    options: RetrofitOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    own: bool,
    num_tokens: int = 6144,
) -> list[Tensor]:
    """Rows to set the decisions' offset with.

    Args:
        rows: of the training; those of the steps after the last are taken.
        options: of the retrofit.
        model: that is trained.
        tokenizer: of the model.
        own: take long rows of the bundled model's training text instead, without recall tasks.
        num_tokens: at least.
    """
    if own:
        assert tokenizer is not None
        text = bundled_text(tokenizer, options.seed + 1)
        length = min(int(model.config.max_position_embeddings), 3072)
        starts = range(0, num_tokens, length)
        return [torch.from_numpy(text[start : start + length])[None] for start in starts]
    found: list[Tensor] = []
    while sum(ids.numel() for ids in found) < num_tokens and len(found) < 16:
        found.append(rows(options.steps + len(found)).ids)
    return found


def _options(method: str, ratio: float, options: dict[str, Any]) -> RetrofitOptions:
    try:
        return RetrofitOptions(method=method, ratio=ratio, **options)
    except TypeError as error:
        known = sorted(RetrofitOptions.__dataclass_fields__)
        odd = sorted(set(options) - set(known))
        raise LearnedMemoryError(
            f"{', '.join(odd) or error}: no option of a retrofit; there are {', '.join(known)}."
        ) from error
