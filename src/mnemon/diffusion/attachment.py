"""`attach` and `detach`: a caching method on one model, and nothing else changed."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import nn

from mnemon.diffusion.attached import ATTRIBUTE, AttachedModel
from mnemon.diffusion.methods.base import Method
from mnemon.diffusion.methods.registry import make_method
from mnemon.diffusion.report import Report, Tally
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

__all__ = ["Attachment", "attach", "detach"]

# Of a pipeline; a second transformer works on the later, less noisy timesteps (Wan 2.2).
_COMPONENTS = ("transformer", "transformer_2")


class Attachment:
    """A method attached to the transformers of one pipeline; also a context manager.

    Attributes:
        method: the method with its options.
    """

    def __init__(self, models: list[AttachedModel], method: Method, scheduler: Any) -> None:
        self.method = method
        self._models = models
        done: list[AttachedModel] = []
        try:
            for model in models:
                model.install(scheduler)
                done.append(model)
                vars(model.inner)[ATTRIBUTE].detach = self.detach
        except BaseException:
            for model in done:
                model.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def sites(self) -> Sites:
        """Where the (first) transformer is attached to."""
        return self._models[0].sites

    @property
    def nbytes(self) -> int:
        """Bytes of features kept at this moment."""
        return sum(model.nbytes for model in self._models)

    def report(self) -> Report:
        """What was computed, what reused, since `attach` or the last `clear_report`."""
        return Report(
            method=self.method, tallies={model.name: model.tally for model in self._models}
        )

    def longest_run(self) -> int:
        """Evaluations of one key in the latest run, of the key that had most."""
        return max(model.clock.longest for model in self._models)

    def clear_report(self) -> None:
        """Counts from zero."""
        for model in self._models:
            model.tally = Tally(model.sites)

    def reset(self) -> None:
        """Forgets all features: what follows is another run.

        Needed only without a pipeline: where a run stops after its very first step and is begun
        again with the same input, where runs are interleaved out of step, and between runs of a
        single step, which look like further evaluations at one timestep.
        """
        for model in self._models:
            model.reset()

    def detach(self) -> None:
        """Gives the models back as they were; a second call does nothing."""
        for model in reversed(self._models):
            model.remove()


def attach(target: Any, method: str | Method, **options: Any) -> Attachment:
    """Puts a caching method on a diffusers pipeline or a transformer.

        with mnemon.diffusion.attach(pipe, "taylor", order=1, interval=3) as cached:
            images = pipe(...).images
        print(cached.report())

    Only this instance changes, until `detach`. Features are kept by guidance branch and by
    evaluation within a timestep, and dropped when another run, another shape or an error comes.
    Nobody has to say how many steps there are.

    Args:
        target: a pipeline with a `transformer` (its scheduler then says where runs begin), or a
            transformer alone.
        method: a name, a text such as ``"interval(interval=3)"``, or a `Method`.
        options: the method's.

    Raises:
        NoSites: the model has no blocks with the usual names.
        DiffusionError: attached already, no such method, a bad option, or one that this model
            cannot serve.
    """
    chosen = make_method(method, **options)
    if isinstance(target, nn.Module):
        models = [AttachedModel("transformer", target, chosen)]
        return Attachment(models, chosen, None)
    found = {name: getattr(target, name, None) for name in _COMPONENTS}
    models = [AttachedModel(n, m, chosen) for n, m in found.items() if isinstance(m, nn.Module)]
    if len(models) > 1 and chosen.made_for_one:
        raise DiffusionError(
            f"this {type(target).__name__} has {len(models)} transformers, and {chosen.name} was "
            "made for the steps of one; attach it to each by itself, with what was made for it"
        )
    if not models:
        raise DiffusionError(
            f"a {type(target).__name__} came; a pipeline with a transformer, or a transformer "
            "(torch.nn.Module), was expected"
            + (". UNets are not served" if getattr(target, "unet", None) is not None else "")
        )
    return Attachment(models, chosen, getattr(target, "scheduler", None))


def detach(target: Any) -> None:
    """Takes the method off a pipeline or a transformer; one that has none is left as it is."""
    parts = (
        [target]
        if isinstance(target, nn.Module)
        else [getattr(target, name, None) for name in _COMPONENTS]
    )
    for part in parts:
        mark = getattr(getattr(part, "_orig_mod", part), ATTRIBUTE, None)
        if mark is not None and mark.detach is not None:
            mark.detach()
