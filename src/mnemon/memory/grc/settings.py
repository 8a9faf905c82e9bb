"""What a gated recurrent cache is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mnemon.errors import LearnedMemoryError

__all__ = ["Rule", "Settings", "Variant", "summary_width"]

Variant = Literal["paper", "repo"]
Rule = Literal["gated", "fifo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `add_grc`, checked.

    Args:
        ratio: share of the channels that is kept, above 0 and at most 1 (r in the paper).
        memory_length: slots (T_m).
        variant: "paper" or "repo"; see `GatedRecurrentCache` and `MemoryBranch`.
        initial_lambda: what the mixing weights start from before the sigmoid; None: 0 in the
            paper, -1 in the public code.
        rule: "gated", or "fifo" for the control that keeps the latest tokens instead.
        pinned: the buffer is never written: what it holds (zeros) is all that is ever read.
        synchronise: average over all ranks of torch.distributed where it runs.

    Raises:
        LearnedMemoryError: an option outside these bounds.
    """

    ratio: float = 0.5
    memory_length: int = 64
    variant: Variant = "paper"
    initial_lambda: float | None = None
    rule: Rule = "gated"
    pinned: bool = False
    synchronise: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise LearnedMemoryError(
                f"ratio={self.ratio!r} came; a share of the channels above 0 and at most 1 was "
                "expected, such as 0.5"
            )
        if self.memory_length < 1:
            raise LearnedMemoryError(
                f"memory_length={self.memory_length!r} came; at least one slot is needed"
            )
        for name, found, known in (
            ("variant", self.variant, get_args(Variant)),
            ("rule", self.rule, get_args(Rule)),
        ):
            if found not in known:
                raise LearnedMemoryError(
                    f"{name}={found!r} came; one of {', '.join(map(repr, known))} was expected"
                )

    @property
    def start(self) -> float:
        """Where the lambdas start."""
        if self.initial_lambda is not None:
            return self.initial_lambda
        return 0.0 if self.variant == "paper" else -1.0


def summary_width(dim: int, num_heads: int, ratio: float) -> int:
    """Channels that are kept (D_m): the multiple of `num_heads` nearest to ratio * dim, not 0.

    Args:
        dim: channels of what is summarised (D).
        num_heads: heads of the memory's attention; `dim` is a multiple.
        ratio: the share asked for.

    Raises:
        LearnedMemoryError: `dim` cannot be divided among the heads.
    """
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise LearnedMemoryError(
            f"{dim} channels and {num_heads} heads came; a multiple of the heads was expected"
        )
    # Halves go up, so that a ratio never rounds to less than was asked for.
    return num_heads * min(dim // num_heads, max(1, int(ratio * dim / num_heads + 0.5)))
