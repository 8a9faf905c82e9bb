"""What a pipeline asks its transformer in whole runs: inputs and answers, to train on offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mnemon.diffusion.attachment import attach
from mnemon.diffusion.clock import Step
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.outputs import answer_of, tensors
from mnemon.diffusion.sites import Sites

__all__ = ["Call", "record_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One evaluation of the transformer, without a cache.

    Args:
        timestep: as the transformer was told it.
        run, branch, index: which run, which guidance branch (in order of appearance), which step.
        arguments: of the forward call, by name.
        hidden: the latents among them: the first tensor.
        answer: what it predicted.
    """

    timestep: float
    run: int
    branch: int
    index: int
    arguments: dict[str, Any]
    hidden: Tensor
    answer: Tensor


@dataclass(slots=True, kw_only=True)
class _Notes:
    run: int = 0
    branches: int = 0
    place: tuple[int, int, float] = (0, 0, 0.0)
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorder(Method):
    name: ClassVar[str] = "recorder"
    notes: _Notes

    @property
    def levels(self) -> Sequence[Level]:
        return ()

    def session(self, sites: Sites, model: nn.Module) -> Session:
        self.notes.branches += 1
        return _RecorderSession(sites, self.notes, self.notes.branches - 1)


class _RecorderSession(Session):
    def __init__(self, sites: Sites, notes: _Notes, branch: int) -> None:
        super().__init__(sites)
        self._notes, self._branch = notes, branch

    def begin(self, step: Step) -> None:
        self._notes.place = (self._branch, step.index, step.timestep)

    def held(self) -> Iterator[Any]:
        return iter(())


def record_runs(pipe: Any, model: nn.Module, runs: Sequence[Callable[[Any], Any]]) -> list[Call]:
    """Runs the pipeline and notes every call of `model`, its transformer.

    Inputs and answers are kept on the model's device: per call as much as the latents and the
    conditioning.
    """
    notes = _Notes()
    names = list(_parameters(model))

    def note(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        branch, index, timestep = notes.place
        arguments = dict(zip(names, args, strict=False)) | kwargs
        kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        answer = answer_of(result).detach().clone()
        notes.calls.append(
            Call(
                timestep=timestep,
                run=notes.run,
                branch=branch,
                index=index,
                arguments=kept,
                hidden=next(tensors(kept)),
                answer=answer,
            )
        )

    with torch.no_grad(), attach(pipe, _Recorder(notes=notes)) as attached:
        handle = model.register_forward_hook(note, with_kwargs=True)
        try:
            for number, run in enumerate(runs):
                notes.run, notes.branches = number, 0
                attached.reset()
                run(pipe)
        finally:
            handle.remove()
    return notes.calls


def _parameters(model: nn.Module) -> Sequence[str]:
    import inspect

    return list(inspect.signature(type(model).forward).parameters)[1:]
