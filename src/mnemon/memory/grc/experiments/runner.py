"""All runs of an experiment, in this process or in several, one thread each."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, cast, final

import torch

from mnemon.memory.grc.experiments.arms import chosen_arms
from mnemon.memory.grc.experiments.record import Record
from mnemon.memory.grc.experiments.scales import Size
from mnemon.memory.grc.experiments.tasks import make_task
from mnemon.memory.grc.experiments.training import Result, train

__all__ = ["run_all"]

Tick = Callable[[int], None]


@final
class _Stopped(Exception):
    """The experiment was interrupted; a worker need not finish its run."""


def run_all(record: Record, jobs: int, tick: Tick, done: Callable[[Result], None]) -> None:
    """Does the runs that are missing and writes each into the record as it ends.

    A run's result does not depend on how many run at a time: each has one thread and random
    numbers of its own.

    Args:
        record: what is to be done, and where it goes.
        jobs: processes; 1 runs all here.
        tick: is told of training steps done.
        done: is told of each result, after it was written.

    Raises:
        FileError: the record cannot be written.
    """
    missing = record.missing()
    if jobs == 1 or len(missing) < 2:
        with _one_thread():
            for arm, seed in missing:
                _finish(record, _run(record, arm, seed, tick), done)
        return
    context = multiprocessing.get_context("spawn")
    ticks, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(
        min(jobs, len(missing)), context, initializer=_prepare, initargs=(ticks, stop)
    )
    with pool:
        try:
            waiting = {
                pool.submit(_work, record.plan.task, record.plan.size, arm, seed, record.plan.steps)
                for arm, seed in missing
            }
            while waiting:
                finished, waiting = _next(waiting)
                for count in _drained(ticks):
                    tick(count)
                for future in finished:
                    _finish(record, future.result(), done)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _next(waiting: set[Future[Result]]) -> tuple[set[Future[Result]], set[Future[Result]]]:
    finished, others = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
    return finished, others


def _drained(ticks: Any) -> Iterator[int]:
    while True:
        try:
            yield ticks.get_nowait()
        except queue.Empty:
            return


def _finish(record: Record, result: Result, done: Callable[[Result], None]) -> None:
    record.add(result)
    done(result)


def _run(record: Record, arm: str, seed: int, tick: Tick) -> Result:
    plan = record.plan
    return _trained(plan.task, plan.size, arm, seed, plan.steps, tick)


def _trained(task: str, size: str, arm: str, seed: int, steps: int, tick: Tick) -> Result:
    made = make_task(task, cast("Size", size))
    chosen = next(each for each in chosen_arms(task) if each.name == arm)
    return train(made, chosen, seed, steps, tick)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
class _Channel:
    """What a worker process talks to its parent through: set once, in the worker's own process.

    A queue cannot be an argument of a task; only a process that begins can be given one.
    """

    ticks: Any = None
    stop: Any = None


def _prepare(ticks: Any, stop: Any) -> None:
    """In a worker, once: Ctrl-C is the parent's to answer, and it says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _Channel.ticks, _Channel.stop = ticks, stop


def _work(task: str, size: str, arm: str, seed: int, steps: int) -> Result:
    def tick(count: int) -> None:
        if _Channel.stop.is_set():
            raise _Stopped
        _Channel.ticks.put(count)

    return _trained(task, size, arm, seed, steps, tick)
