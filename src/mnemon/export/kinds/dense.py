"""Keys and values of every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mnemon.export.kinds.base import Part, Slot, TokenPart, read_pair, write_pair

__all__ = ["Dense", "GraphTokens", "pair_slots"]


def pair_slots(
    layer: int, kv_heads: int, tokens: str, key_dim: int, value_dim: int, middle: str = ""
) -> list[Slot]:
    """Two tensors ``[batch, kv_heads, tokens, width]``."""
    return [
        Slot(
            name=f"past_key_values.{layer}.{middle}{side}",
            layer=layer,
            axes=("batch", kv_heads, tokens, width),
        )
        for side, width in (("key", key_dim), ("value", value_dim))
    ]


@final
class GraphTokens(TokenPart):
    """Keys and values that grow by concatenation.

    Args:
        keys, values: ``[batch, kv_heads, tokens, width]``; None where nothing is kept yet.
        window: tokens that a query sees, itself included; None for all.
    """

    def __init__(
        self,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        self.keys = keys
        self.values = values
        self.window = window

    @property
    def length(self) -> Any:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        else:  # in one piece, as a caller will want them
            keys = keys.clone(memory_format=torch.contiguous_format)
            values = values.clone(memory_format=torch.contiguous_format)
        self.keys, self.values = keys, values
        if self.window is not None:
            length = keys.shape[2]
            kept = torch.sym_min(length, self.window - 1)
            self.keys = keys.narrow(2, length - kept, kept)
            self.values = values.narrow(2, length - kept, kept)
        return keys, values

    def held(self) -> list[Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return [self.keys, self.values]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Part):
    """Every token, in the model's dtype: ``key`` and ``value``."""

    kv_heads: int
    key_dim: int
    value_dim: int

    kind: ClassVar[str] = "dense"
    keeps_all: ClassVar[bool] = True

    def slots(self, layer: int, tokens: str) -> list[Slot]:
        return pair_slots(layer, self.kv_heads, tokens, self.key_dim, self.value_dim)

    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        return {tokens: num_tokens}

    def read(self, layer: Any, index: int) -> list[Tensor]:
        return list(read_pair(layer, index))

    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        write_pair(layer, tensors[0], tensors[1], num_tokens)

    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphTokens:
        return GraphTokens(tensors[0], tensors[1])
