"""What a cache holds, taken apart: for files, and for whoever moves caches about."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mnemon.layers.base import LayerState

__all__ = ["CacheState", "Prefilled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """Everything a cache holds.

    Args:
        layers: states of the decoder's layers, in order.
        cross: states of the cross-attention layers; empty without an encoder.
        tokens: int64 ``[batch, num_tokens]``; -1 unknown, -2 padding.
        meta: JSON-able facts.
    """

    layers: tuple[LayerState, ...]
    cross: tuple[LayerState, ...] = ()
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.int64))
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """How the leading tokens were computed: what reuse without a changed bit depends on.

    Args:
        chunk: tokens per chunk, aligned to absolute positions.
        num_tokens: leading tokens computed so, whole chunks.
        batch_size: rows they were computed with.
        arithmetic: what computed them (attention, device, threads, torch): other bits otherwise.
    """

    chunk: int
    num_tokens: int
    batch_size: int
    arithmetic: str
