"""What layers keep, as tensors of a graph: one file per kind."""

from collections.abc import Mapping
from typing import Any

from mnemon.export.kinds.base import GraphPart, Part, Slot, TokenPart
from mnemon.export.kinds.dense import Dense, GraphTokens
from mnemon.export.kinds.packed import Packed
from mnemon.export.kinds.states import GraphStates, State, States, read_states
from mnemon.export.kinds.static import Static
from mnemon.export.kinds.window import Window

__all__ = [
    "Dense",
    "GraphPart",
    "GraphStates",
    "GraphTokens",
    "Packed",
    "Part",
    "Slot",
    "State",
    "States",
    "Static",
    "TokenPart",
    "Window",
    "part_from_json",
    "read_states",
]

_KINDS: dict[str, type[Part]] = {cls.kind: cls for cls in (Dense, Window, Packed, States, Static)}


def part_from_json(facts: Mapping[str, Any]) -> Part:
    """The part that `Part.to_json` described."""
    rest = dict(facts)
    return _KINDS[rest.pop("kind")].from_json(rest)
