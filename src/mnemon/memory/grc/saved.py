"""A model's memories as a file of their own, beside what `save_pretrained` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from mnemon.errors import LearnedMemoryError
from mnemon.files.atomic import write_atomically
from mnemon.memory.grc.branch import MemoryBranch

__all__ = ["load_branches", "save_branches"]


def save_branches(branches: Mapping[str, MemoryBranch], path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file, whole or not at all: each branch under its attention's name.

    Raises:
        LearnedMemoryError: there is nothing to write.
        FileError: the file cannot be written.
    """
    if not branches:
        raise LearnedMemoryError("the model has no memories any more; save before remove()")
    data = save(
        {
            f"{name}.{key}": value.detach().contiguous()
            for name, branch in branches.items()
            for key, value in branch.state_dict().items()
        },
        metadata={"format": "pt", "kind": "mnemon-grc"},
    )
    write_atomically(path, lambda file: file.write(data))


def load_branches(branches: Mapping[str, MemoryBranch], path: str | os.PathLike[str]) -> None:
    """Takes weights and buffers from a file of `save_branches`; all of them or none.

    Raises:
        LearnedMemoryError: not such a file, or one of other memories.
    """
    source = Path(path).expanduser()
    try:
        found = load_file(source)
    except (OSError, safetensors.SafetensorError) as error:
        raise LearnedMemoryError(
            f"{source} cannot be read as a safetensors file ({error}); a file of GRC.save was "
            "expected"
        ) from error
    own: dict[str, Tensor] = {
        f"{name}.{key}": value
        for name, branch in branches.items()
        for key, value in branch.state_dict().items()
    }
    for name in sorted({*own, *found}):
        came = tuple(found[name].shape) if name in found else "nothing"
        expected = tuple(own[name].shape) if name in own else "nothing"
        if came != expected:
            raise LearnedMemoryError(
                f"{source} has {came} for {name}, this model {expected}; give add_grc the options "
                "that the saved memories had"
            )
    for name, value in own.items():
        value.copy_(found[name])
