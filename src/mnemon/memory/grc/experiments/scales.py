"""How large an experiment is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Scale", "Size"]

Size = Literal["small", "large"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A model, its memory and its training.

    Args:
        dim: channels.
        num_heads: heads.
        num_layers: blocks.
        hidden: channels within a feed-forward.
        memory_length: slots of GRC, tokens of Transformer-XL's cache.
        ratio: share of the channels that GRC keeps.
        batch: samples, or streams, of a step.
        length: tokens at most, or of a segment.
        steps: of training.
        rate: highest learning rate.
        train_count: samples to train on.
        test_count: samples, or segments of each stream, to judge by.
    """

    dim: int
    num_heads: int
    num_layers: int
    hidden: int
    memory_length: int
    ratio: float = 0.5
    batch: int
    length: int
    steps: int
    rate: float
    train_count: int
    test_count: int

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)
