"""Makes the same images in different ways: what came out, what was computed, how long it took."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnemon.cli.diffusion.settings import Setting, uncached
from mnemon.cli.diffusion.work import Counter, Work
from mnemon.errors import MnemonError

__all__ = ["Outcome", "Progress", "Run", "Studio", "Task", "describe"]

_BETWEEN = 16  # settings timed between two uncached generations
Progress = Callable[[str], None]  # says what comes next; one unit of work is about to begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which images are made.

    Args:
        steps: of the sampler.
        samples: images.
        batch: images at a time.
        guidance: of the classes; 1 is none.
        seed: of the noise.
    """

    steps: int
    samples: int
    batch: int
    guidance: float = 2.0
    seed: int = 0


class Run(NamedTuple):
    """One generation of a task's images.

    Args:
        images: (samples, channels, height, width) in [-1, 1], on the CPU.
        seconds: in the pipeline, switching a cache on and off left out.
        peak_bytes: features kept at most; None where nobody counts them.
    """

    images: Tensor
    seconds: float
    peak_bytes: int | None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What was measured of one setting on one pipeline; None for what was not.

    Args:
        images: the first few, for pictures.
    """

    setting: Setting
    psnr: float | None = None
    calls: float | None = None
    macs: int | None = None
    macs_share: float | None = None
    peak_bytes: int | None = None
    accuracy: float | None = None
    distance: float | None = None
    rounds_s: list[float] | None = None
    error: str | None = None
    images: Tensor | None = None

    @property
    def seconds(self) -> float | None:
        """The median round."""
        return statistics.median(self.rounds_s) if self.rounds_s else None


class Studio:
    """One pipeline and one task.

    Args:
        pipe: a `DiTPipeline`; nothing stays on it.
        task: what is made of it.
        num_classes: classes are 0, 1, ... in turn.
    """

    def __init__(self, pipe: Any, task: Task, num_classes: int) -> None:
        self.pipe, self.task = pipe, task
        self._num_classes = num_classes
        self._counter = Counter(pipe.transformer)

    @property
    def labels(self) -> list[int]:
        """The class of each image."""
        return [i % self._num_classes for i in range(self.task.samples)]

    def at(self, **changes: Any) -> Studio:
        """The same pipeline with another task."""
        return Studio(self.pipe, replace(self.task, **changes), self._num_classes)

    def run(self, setting: Setting) -> Run:
        """Makes the images."""
        return self._run(setting, None)

    def counted(self, setting: Setting) -> tuple[Run, Work]:
        """Makes the images and counts; slower, so its seconds mean little."""
        work = Work()
        return self._run(setting, work), work

    def _run(self, setting: Setting, work: Work | None) -> Run:
        task, pieces, seconds = self.task, [], 0.0
        peak: int | None = None
        for number, labels in enumerate(_chunks(self.labels, task.batch)):
            generator = torch.Generator().manual_seed(task.seed * 1_000_003 + number)
            with contextlib.ExitStack() as stack:
                attached = stack.enter_context(setting.apply(self.pipe))
                counts = None if work is None else stack.enter_context(self._counter.counting())
                self._wait()
                begin = time.perf_counter()
                images = self.pipe(
                    class_labels=labels,
                    num_inference_steps=setting.steps or task.steps,
                    guidance_scale=task.guidance,
                    generator=generator,
                    output_type="pt",
                ).images
                self._wait()
                seconds += time.perf_counter() - begin
                if attached is not None:
                    peak = max(peak or 0, attached.report().peak_bytes)
            if work is not None and counts is not None:
                work.macs += counts.macs
                work.attention += counts.attention
                work.feed_forward += counts.feed_forward
            pieces.append((images * 2 - 1).float().cpu())
        return Run(torch.cat(pieces), seconds, peak)

    def _wait(self) -> None:
        if self.pipe.device.type != "cpu":
            torch.accelerator.synchronize()

    def quality(
        self,
        settings: Sequence[Setting],
        progress: Progress,
        *,
        judge: Callable[[Tensor], tuple[float, float | None]] | None = None,
        keep: int = 0,
    ) -> list[Outcome]:
        """One counted run of each: the uncached one first, which all others are compared with.

        Args:
            settings: all but the uncached one.
            progress: told before each run.
            judge: class accuracy and feature distance of images.
            keep: images of each that its `Outcome` holds.
        """
        from mnemon.diffusion.fitting import psnr

        plain = uncached()
        progress(plain.name)
        reference, full = self.counted(plain)
        found = []
        for setting in (plain, *settings):
            outcome = Outcome(setting=setting)
            found.append(outcome)
            if setting is plain:
                run, work = reference, full
            else:
                progress(setting.name)
                try:
                    run, work = self.counted(setting)
                except Exception as error:
                    outcome.error = describe(setting, error)
                    continue
                outcome.psnr = psnr(run.images, reference.images)
            outcome.calls = work.calls(full)
            outcome.macs, outcome.macs_share = work.macs, work.macs / full.macs
            outcome.peak_bytes = run.peak_bytes
            if setting.library == "":
                outcome.peak_bytes = 0
            if judge is not None:
                outcome.accuracy, outcome.distance = judge(run.images)
            outcome.images = run.images[:keep].clone() if keep else None
        return found

    def clock(self, outcomes: Sequence[Outcome], rounds: int, progress: Progress) -> None:
        """Times all that work, in turn, every other round in reverse.

        The first, uncached, which all others are compared with, comes again after every 16 others:
        in a long round the machine may change its speed.

        Args:
            outcomes: get their `rounds_s`.
            rounds: timed; a generation before them is not.
            progress: told before each run but the uncached one's repetitions.
        """
        for outcome in outcomes:
            outcome.rounds_s = None if outcome.error is not None else []
        self.run(uncached())
        for number in range(rounds):
            others = outcomes[1:] if number % 2 == 0 else outcomes[:0:-1]
            for place, outcome in enumerate(others):
                if place % _BETWEEN == 0:
                    self._time(outcomes[0])
                progress(f"round {number + 1}: {outcome.setting.name}")
                if outcome.error is None:
                    self._time(outcome)

    def _time(self, outcome: Outcome) -> None:
        assert outcome.rounds_s is not None
        try:
            outcome.rounds_s.append(self.run(outcome.setting).seconds)
        except Exception as error:
            outcome.error = describe(outcome.setting, error)


def describe(setting: Setting, error: Exception) -> str:
    """A line for a table; what is neither a message of ours nor others' code is raised again."""
    if not setting.any_error and not isinstance(error, MnemonError):
        raise error
    if setting.known_error is not None:
        return setting.known_error
    words = str(error).splitlines()
    text = words[0] if words else ""
    return text if isinstance(error, MnemonError) else f"{type(error).__name__}: {text}"[:160]


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
