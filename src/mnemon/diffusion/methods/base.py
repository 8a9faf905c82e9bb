"""What a caching method is: settings that never change, and a session for each guidance branch.

    begin(step)                 decide what this evaluation computes
    sublayer(...), block(...)   called in place of the model's own; compute, or answer from memory
    end()                       the evaluation ran through

A session belongs to one key (branch, evaluation within a timestep) of one run and is thrown away
with it: what it keeps cannot reach another.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mnemon.diffusion.clock import Step
from mnemon.diffusion.hidden import BlockCall
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Sites

__all__ = ["Level", "Method", "Session"]

Level = Literal["sublayer", "block"]


class Session(abc.ABC):
    """What a method keeps of one key of one run.

    Args:
        sites: where it is attached.

    Attributes:
        computed: per sublayer, which share of its tokens the running evaluation computes; zeros
            when `begin` is called.
        ran: per block, 1 if it runs at all (norms, modulations), 0 if it is left out; ones when
            `begin` is called.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.computed = [0.0] * len(sites.sublayers)
        self.ran = [1.0] * len(sites.blocks)

    @abc.abstractmethod
    def begin(self, step: Step) -> None:
        """Decides about the evaluation that follows."""

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        """The output of sublayer `index`."""
        self.computed[index] = 1.0
        return original(*args, **kwargs)

    def block(self, index: int, call: BlockCall) -> Output:
        """The output of block `index`."""
        return call.compute()

    def probe(self, number: int, output: Output) -> None:  # noqa: B027
        """Module `number` of the method's probes returned `output`."""

    def answer(self, result: Any, hidden: Tensor | None) -> Any:
        """What the transformer returns in place of `result`; `hidden` is its first tensor."""
        return result

    def end(self) -> None:  # noqa: B027  # most have nothing to do
        """The evaluation ran through."""

    @abc.abstractmethod
    def held(self) -> Iterator[Any]:
        """All that is kept for later evaluations, to count its bytes."""


class Method(abc.ABC):
    """A caching method's settings: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    made_for_one: ClassVar[bool] = False  # of its options, one was made from a single model

    @property
    @abc.abstractmethod
    def levels(self) -> Sequence[Level]:
        """Which calls it takes: of sublayers, of blocks, or of both."""

    @abc.abstractmethod
    def session(self, sites: Sites, model: nn.Module) -> Session:
        """A fresh session for a key that has just appeared."""

    def probes(self, model: nn.Module, sites: Sites) -> Sequence[str]:
        """Paths of further modules whose outputs its sessions want to see."""
        return ()

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options().items() if v is not None)
        return f"{self.name}({options})"

    def options(self) -> dict[str, Any]:
        """The options, by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every method is one
        return {field.name: getattr(self, field.name) for field in fields}

    def check_sampler(self, name: str) -> None:  # noqa: B027  # most do not care
        """Refuses a scheduler, by the name of its class; asked where one is known.

        Raises:
            DiffusionError: says why.
        """

    def check(self, sites: Sites) -> None:  # noqa: B027  # most fit every model
        """Refuses a model that it cannot serve.

        Raises:
            DiffusionError: says why.
        """
