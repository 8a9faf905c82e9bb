"""The experiments by name."""

from __future__ import annotations

import functools

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.experiments.digits_task import DigitsTask
from mnemon.memory.grc.experiments.listops_task import ListOpsTask
from mnemon.memory.grc.experiments.lm_task import LanguageTask
from mnemon.memory.grc.experiments.scales import Size
from mnemon.memory.grc.experiments.training import Task

__all__ = ["TASKS", "make_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (ListOpsTask, DigitsTask, LanguageTask)}


@functools.lru_cache(maxsize=8)
def make_task(name: str, size: Size = "small") -> Task:
    """A task, made once in each process.

    Raises:
        LearnedMemoryError: no such task.
    """
    if name not in TASKS:
        raise LearnedMemoryError(f"no experiment is called {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name](size)
