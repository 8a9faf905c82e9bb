"""Memory that a model learns to keep: GRC between segments, DMC and DMS between tokens.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemon.compression import Compression
    from mnemon.memory.grc import GatedRecurrentCache, GRCAttention, add_grc, remove_grc
    from mnemon.memory.retrofitting import (
        attach_compression,
        detach_compression,
        load_retrofitted,
        retrofit,
        save_retrofitted,
    )

_HOME = {
    "Compression": "mnemon.compression",
    "GRCAttention": "mnemon.memory.grc",
    "GatedRecurrentCache": "mnemon.memory.grc",
    "add_grc": "mnemon.memory.grc",
    "attach_compression": "mnemon.memory.retrofitting",
    "detach_compression": "mnemon.memory.retrofitting",
    "load_retrofitted": "mnemon.memory.retrofitting",
    "remove_grc": "mnemon.memory.grc",
    "retrofit": "mnemon.memory.retrofitting",
    "save_retrofitted": "mnemon.memory.retrofitting",
}

__all__ = [
    "Compression",
    "GRCAttention",
    "GatedRecurrentCache",
    "add_grc",
    "attach_compression",
    "detach_compression",
    "load_retrofitted",
    "remove_grc",
    "retrofit",
    "save_retrofitted",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mnemon.memory' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
