"""What a layer keeps, as tensors of a graph: one `Part` per thing kept, one file per kind.

A layer has the parts of its kind: keys and values, recurrent states, or both, or none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mnemon.errors import ExportError

__all__ = [
    "GraphPart",
    "Part",
    "Slot",
    "TokenPart",
    "distance",
    "empty_layer",
    "read_pair",
    "write_pair",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor of a cache.

    Args:
        name: as a graph's input is called; its output begins with "present".
        layer: index of the layer.
        axes: what each axis is: a symbol ("batch", "past", ...) or a size.
        dtype: "float32" or another name of torch's; empty for the cache's own.
    """

    name: str
    layer: int
    axes: tuple[str | int, ...]
    dtype: str = ""

    @property
    def output(self) -> str:
        """The name under which a graph returns it."""
        return self.name.replace("past_key_values", "present", 1)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the symbols."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def torch_dtype(self, default: torch.dtype) -> torch.dtype:
        """The tensor's dtype, where the cache's is `default`."""
        found = getattr(torch, self.dtype) if self.dtype else default
        assert isinstance(found, torch.dtype)
        return found


class GraphPart(ABC):
    """A part inside a traced forward pass: shapes only, no Python number is remembered."""

    @abstractmethod
    def held(self) -> list[Tensor]:
        """The tensors after the pass, in the order of the part's slots."""

    def settle(self, is_token: Tensor) -> None:
        """Called after the pass: rows whose newest token is padding (``[batch]`` false) keep what
        they had, where the part is not told by a mask."""
        return


class TokenPart(GraphPart):
    """Keys and values in a traced forward pass."""

    window: int | None = None

    @property
    @abstractmethod
    def length(self) -> Any:
        """Tokens that attention read in the pass before, an expression of shapes."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what the next call needs; returns what attention reads now."""


class Part(ABC):
    """One thing that a layer keeps."""

    kind: ClassVar[str]
    #: Tokens that a query sees, itself included; None for all.
    window: int | None = None
    #: The shapes of its tensors say how many tokens were seen.
    keeps_all: ClassVar[bool] = False
    #: The model's code for one token is another than for several: the graph takes one at a time.
    takes_one_token: ClassVar[bool] = False
    #: It lives in the graph's own memory and is neither given nor returned.
    is_static: ClassVar[bool] = False

    @abstractmethod
    def slots(self, layer: int, tokens: str) -> list[Slot]:
        """Its tensors; `tokens` is the symbol of its token axis."""

    @abstractmethod
    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        """The sizes of its own symbols after `num_tokens` tokens."""

    def bounds(self, tokens: str) -> dict[str, int]:
        """The most that its own symbols can be, where they are bounded."""
        return {}

    def lengths(self) -> list[int]:
        """Numbers of tokens at which something changes: a comparison goes there."""
        return []

    @abstractmethod
    def read(self, layer: Any, index: int) -> list[Tensor]:
        """Its tensors in a filled cache layer of any class, without an operator if possible.

        Raises:
            ExportError: the layer is empty, or another kind.
        """

    @abstractmethod
    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        """Put tensors into a cache layer of any class; `num_tokens` were seen."""

    @abstractmethod
    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphPart:
        """The part inside a traced pass.

        Args:
            tensors: in the order of `slots`; of a static part in that of `buffers`.
            num_seen: tokens before this pass, an expression of shapes.
        """

    def buffers(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        """The memory that a graph holds for it; only of a static part."""
        return []

    def difference(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """How far the tensors of two runs are apart, at most; both in the order of `slots`."""
        return max((distance(*pair) for pair in zip(found, expected, strict=True)), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Part":
        """The reverse of `to_json`, without the kind."""
        return cls(**facts)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors; nan where their shapes differ."""
    if found.shape != expected.shape:
        return float("nan")
    return float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0


def empty_layer(index: int) -> ExportError:
    """The error of a layer that holds nothing."""
    return ExportError(
        f"Layer {index} of the cache is empty; a graph is fed tensors of length 0 instead of "
        f"nothing. Pass past_key_values=None for an empty cache."
    )


def read_pair(layer: Any, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer of any cache, or a pair itself.

    Raises:
        ExportError: there are none.
    """
    if isinstance(layer, tuple | list):
        keys, values = layer[0], layer[1]
    else:
        keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.ndim != 4:
        raise empty_layer(index)
    return keys, values


def write_pair(layer: Any, keys: Tensor, values: Tensor, num_tokens: int) -> None:
    """Make a layer of any cache hold these keys and values, of `num_tokens` tokens seen."""
    from mnemon.layers.base import LayerState

    layer = getattr(layer, "attention", layer)  # beside recurrent states
    if hasattr(layer, "load_state"):
        meta: dict[str, Any] = {"num_tokens": num_tokens, "tail": None}
        if getattr(layer, "window", None) is not None:
            meta["window"] = layer.window
        state = LayerState(kind=layer.kind, tensors={"keys": keys, "values": values}, meta=meta)
        layer.load_state(state)
        return
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = num_tokens
