"""Recurrent and convolution states: Mamba, gated linear attention, short convolutions.

Models run other code for one token than for many, and only that for one goes on from a state: a
graph with states takes one token at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mnemon.export.kinds.base import GraphPart, Part, Slot, empty_layer
from mnemon.layers.base import LayerState

__all__ = ["GraphStates", "State", "States", "read_states"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One state of a layer.

    Args:
        role: "conv" or "recurrent".
        index: which of the layer's states.
        shape: without the batch.
        dtype: a name of torch's.
    """

    role: str
    index: int
    shape: tuple[int, ...]
    dtype: str


def read_states(layer: Any) -> dict[tuple[str, int], Tensor]:
    """All states of a layer of any cache class, by role and index."""
    layer = getattr(layer, "recurrent", None) or layer  # beside keys and values
    found = {}
    for role in ("conv", "recurrent"):
        for index, state in sorted(getattr(layer, f"{role}_states", {}).items()):
            if state is not None:
                found[role, index] = state
    return found


@final
class GraphStates(GraphPart):
    """States in a traced pass.

    Models write into what they are given; those are copies, for inputs of a graph are not written.
    """

    def __init__(self, states: Sequence[State], tensors: Sequence[Tensor]) -> None:
        self._old = list(tensors)
        self._known = [(state.role, state.index) for state in states]
        self._now: dict[tuple[str, int], Tensor] = {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in zip(self._known, tensors, strict=True)
        }

    def conv_state(self, state_idx: int = 0) -> Tensor | None:
        return self._now.get(("conv", state_idx))

    def recurrent_state(self, state_idx: int = 0) -> Tensor | None:
        return self._now.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Add ``[batch, channels, new]`` columns; returns past and new ones."""
        past = self._now["conv", state_idx]
        columns = torch.cat([past, conv_states.to(past.dtype)], dim=-1)
        self._now["conv", state_idx] = columns[..., -past.shape[-1] :]
        return columns

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        """Replace the recurrent state ``[batch, ...]``."""
        key = ("recurrent", state_idx)
        self._now[key] = recurrent_states.to(self._now[key].dtype)
        return self._now[key]

    def settle(self, is_token: Tensor) -> None:
        for key, old in zip(self._known, self._old, strict=True):
            rows = is_token.view(-1, *(1,) * (old.ndim - 1))
            self._now[key] = torch.where(rows, self._now[key], old)

    def held(self) -> list[Tensor]:
        return [self._now[key] for key in self._known]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class States(Part):
    """States of a fixed size: ``conv.0``, ``recurrent.0`` and so on."""

    states: tuple[State, ...]

    kind: ClassVar[str] = "states"
    takes_one_token: ClassVar[bool] = True

    def slots(self, layer: int, tokens: str) -> list[Slot]:
        return [
            Slot(
                name=f"past_key_values.{layer}.{state.role}.{state.index}",
                layer=layer,
                axes=("batch", *state.shape),
                dtype=state.dtype,
            )
            for state in self.states
        ]

    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        return {}

    def read(self, layer: Any, index: int) -> list[Tensor]:
        found = read_states(layer)
        if any((state.role, state.index) not in found for state in self.states):
            raise empty_layer(index)
        return [found[state.role, state.index] for state in self.states]

    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        layer = getattr(layer, "recurrent", None) or layer
        given = {
            (state.role, state.index): tensor
            for state, tensor in zip(self.states, tensors, strict=True)
        }
        kernels = {key[1]: tensor.shape[-1] for key, tensor in given.items() if key[0] == "conv"}
        indices = sorted({index for _, index in given})
        if hasattr(layer, "load_state"):
            meta = {
                "num_states": layer.num_states,
                "kernel": {str(index): size for index, size in kernels.items()},
                "has_state": [index in indices for index in range(layer.num_states)],
            }
            named = {f"{role}.{index}": tensor for (role, index), tensor in given.items()}
            layer.load_state(LayerState(kind=layer.kind, tensors=named, meta=meta))
            return
        for (role, index), tensor in given.items():  # copied: models write states in place
            getattr(layer, f"{role}_states")[index] = tensor.clone()
            getattr(layer, f"is_{role}_states_initialized")[index] = True
            layer.has_previous_state[index] = True
            layer.dtype, layer.device = tensor.dtype, tensor.device
        layer.conv_kernel_size |= kernels

    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphStates:
        return GraphStates(self.states, tensors)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "States":
        return cls(
            states=tuple(State(**{**one, "shape": tuple(one["shape"])}) for one in facts["states"])
        )
