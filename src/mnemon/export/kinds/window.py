"""Keys and values of a sliding window: the newest ``window - 1`` tokens, for the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from mnemon.export.kinds.base import Part, Slot, read_pair, write_pair
from mnemon.export.kinds.dense import GraphTokens, pair_slots

__all__ = ["Window"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Part):
    """The newest tokens alone.

    Args:
        window: tokens that a query sees, itself included.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int

    kind: ClassVar[str] = "window"

    def slots(self, layer: int, tokens: str) -> list[Slot]:
        return pair_slots(layer, self.kv_heads, tokens, self.key_dim, self.value_dim)

    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        return {tokens: min(num_tokens, self.window - 1)}

    def bounds(self, tokens: str) -> dict[str, int]:
        return {tokens: self.window - 1}

    def lengths(self) -> list[int]:
        return [self.window - 1, self.window, 2 * self.window + 1]

    def read(self, layer: Any, index: int) -> list[Tensor]:
        keys, values = read_pair(layer, index)
        most = self.window - 1
        if keys.shape[2] > most:
            start = keys.shape[2] - most
            keys, values = keys.narrow(2, start, most), values.narrow(2, start, most)
        return [keys, values]

    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        write_pair(layer, tensors[0], tensors[1], num_tokens)

    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphTokens:
        return GraphTokens(tensors[0], tensors[1], self.window)
