"""Keys and values in the graph's own memory: room for a fixed number of tokens, nothing copied."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mnemon.export.kinds.base import Part, Slot, TokenPart

__all__ = ["Static"]


@final
class GraphBuffers(TokenPart):
    """Buffers that a pass writes behind what is there, and reads as far as they are filled."""

    def __init__(self, keys: Tensor, values: Tensor, num_seen: Any) -> None:
        self.keys = keys
        self.values = values
        self.num_seen = num_seen

    @property
    def length(self) -> Any:
        return self.num_seen

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        num_new = keys.shape[2]
        where = torch.arange(num_new, device=keys.device) + self.num_seen
        self.keys.index_copy_(2, where, keys)
        self.values.index_copy_(2, where, values)
        self.num_seen = self.num_seen + num_new
        return self.keys.narrow(2, 0, self.num_seen), self.values.narrow(2, 0, self.num_seen)

    def held(self) -> list[Tensor]:
        return []


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Static(Part):
    """Room for `num_tokens` tokens of every layer, windows included (their mask hides the rest)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    num_tokens: int

    kind: ClassVar[str] = "static"
    keeps_all: ClassVar[bool] = True
    is_static: ClassVar[bool] = True

    def slots(self, layer: int, tokens: str) -> list[Slot]:
        return []

    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        return {}

    def lengths(self) -> list[int]:
        return [self.num_tokens - 3]  # the newest token falls on the last place

    def read(self, layer: Any, index: int) -> list[Tensor]:
        return []

    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        """Nothing: the graph has it."""

    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphBuffers:
        return GraphBuffers(tensors[0], tensors[1], num_seen)

    def buffers(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        return [
            torch.zeros((batch, self.kv_heads, self.num_tokens, width), dtype=dtype)
            for width in (self.key_dim, self.value_dim)
        ]
