"""The hidden states in a block's call: read, replaced, handed on without running the block."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Stack
from mnemon.errors import DiffusionError

__all__ = ["BlockCall", "Ports"]

Hidden = tuple[Tensor | None, ...]


class Ports:
    """Where a stack's blocks take their hidden states, and how they return them."""

    def __init__(self, stack: Stack, block: nn.Module) -> None:
        self.returns = stack.returns
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._places = [names.index(name) for name in stack.returns]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hidden:
        """The hidden states of this call, in the order in which they are returned."""
        return tuple(
            args[place] if place < len(args) else kwargs.get(name)
            for name, place in zip(self.returns, self._places, strict=True)
        )


class BlockCall:
    """One call of a block.

    Attributes:
        inputs: its hidden states, in the order in which it returns them.
    """

    __slots__ = ("_args", "_kwargs", "_original", "inputs")

    def __init__(
        self,
        ports: Ports,
        original: Callable[..., Output],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.inputs: Hidden = ports.read(args, kwargs)
        self._original, self._args, self._kwargs = original, args, kwargs

    def compute(self) -> Output:
        """Runs the block; whatever it returns."""
        return self._original(*self._args, **self._kwargs)

    def hand_on(self, hidden: Hidden | None = None) -> Output:
        """`hidden` (by default the inputs) in the form in which the block would return them."""
        values = self.inputs if hidden is None else hidden
        return cast(Tensor, values[0]) if len(values) == 1 else values

    @staticmethod
    def parts(output: Output) -> Hidden:
        """What a block returned, as a tuple."""
        if isinstance(output, tuple):
            return output
        if isinstance(output, Tensor):
            return (output,)
        raise DiffusionError(
            f"a block returned a {type(output).__name__}; a tensor or a tuple was expected"
        )
