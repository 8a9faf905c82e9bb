"""What was really computed, counted below everything that a cache may replace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Counter", "Work"]


@dataclass(slots=True)
class Work:
    """Multiply-accumulates, and tokens that went through attentions and MLPs.

    Element-wise work and what a cache itself computes are in the seconds alone.
    """

    macs: int = 0
    attention: int = 0
    feed_forward: int = 0

    def calls(self, full: Work) -> float:
        """The share of attentions and MLPs that was computed, of those in `full`."""
        parts = [
            done / whole
            for done, whole in (
                (self.attention, full.attention),
                (self.feed_forward, full.feed_forward),
            )
            if whole
        ]
        return sum(parts) / len(parts) if parts else 0.0


class Counter:
    """Counts the work of one transformer.

    Args:
        transformer: a DiT as it is without a cache, which may hide or rename blocks later.
    """

    def __init__(self, transformer: nn.Module) -> None:
        names = dict(transformer.named_modules())
        self._linear = [m for m in names.values() if isinstance(m, nn.Linear)]
        self._convolutions = [m for m in names.values() if isinstance(m, nn.Conv2d)]
        self._queries = [m for name, m in names.items() if name.endswith(".to_q")]
        self._mlps = [m for name, m in names.items() if name.endswith(".ff.net.0.proj")]

    @contextlib.contextmanager
    def counting(self) -> Iterator[Work]:
        """Counts what is computed inside."""
        work = Work()

        def linear(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            work.macs += inputs[0].numel() * module.out_features

        def convolution(module: Any, _: tuple[Tensor, ...], output: Tensor) -> None:
            work.macs += output.numel() * module.weight[0].numel()

        def query(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            rows, tokens = inputs[0].shape[:2]
            work.attention += rows * tokens
            work.macs += 2 * rows * tokens**2 * module.out_features

        def mlp(_: Any, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            work.feed_forward += inputs[0].shape[:-1].numel()

        hooks = []
        for modules, function in (
            (self._linear, linear),
            (self._convolutions, convolution),
            (self._queries, query),
            (self._mlps, mlp),
        ):
            hooks += [module.register_forward_hook(function) for module in modules]
        try:
            yield work
        finally:
            for hook in hooks:
                hook.remove()
