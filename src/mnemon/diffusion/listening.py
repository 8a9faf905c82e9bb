"""What pipelines say by themselves: the names of guidance branches, and where runs begin."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Branches", "Listener", "listen_to"]

# Is told the class of the scheduler, and its timesteps where they are known.
Listener = Callable[[str, Sequence[float] | None], None]


class Branches:
    """Stands for a model's `cache_context`, and notes the names it is given."""

    def __init__(self, model: nn.Module, name_branch: Callable[[str], str]) -> None:
        self._model, self._name_branch = model, name_branch
        self._original: Any = model.cache_context

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before = self._name_branch(name)
        try:
            with self._original(name, *args, **kwargs):
                yield
        finally:
            self._name_branch(before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._model)]
        return type(copied).cache_context.__get__(copied)


def listen_to(scheduler: Any, listener: Listener) -> Callable[[], None]:
    """Tells `listener` of every run that this scheduler begins; the result takes it off again."""
    found = vars(scheduler).get("set_timesteps")
    announcer = found if isinstance(found, _Announcer) else _Announcer(scheduler)
    announcer.listeners.append(listener)
    return functools.partial(announcer.forget, listener)


class _Announcer:
    """Stands for a scheduler's `set_timesteps`, and tells models of the runs that begin with it.

    Schedulers are shared between pipelines: each model takes itself off the list, and the last one
    gives the scheduler back.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._original = scheduler.set_timesteps
        self._own = "set_timesteps" in vars(scheduler)
        self.listeners: list[Listener] = []
        functools.update_wrapper(self, self._original, updated=())
        scheduler.set_timesteps = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        found = getattr(self._scheduler, "timesteps", None)
        timesteps = found.flatten().tolist() if isinstance(found, Tensor) else None
        for listener in self.listeners:
            listener(type(self._scheduler).__name__, timesteps)
        return result

    def forget(self, listener: Listener) -> None:
        """It is told no more."""
        self.listeners.remove(listener)
        if not self.listeners and vars(self._scheduler).get("set_timesteps") is self:
            if self._own:
                self._scheduler.set_timesteps = self._original
            else:
                del self._scheduler.set_timesteps

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._scheduler)]
        return type(copied).set_timesteps.__get__(copied)
