"""torch's own exported program: portable, runs in Python."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch

from mnemon.export.targets.base import PartInfo, Session, Target

__all__ = ["Program"]


@final
class ProgramSession(Session):
    """An exported program's module."""

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return list(self._module(*inputs))


@final
class Program(Target):
    """``torch.export.save``: a zip of JSON and raw tensors."""

    name = "program"

    def check(self, dtype: torch.dtype) -> None:
        """Every dtype will do."""

    def build(
        self, program: torch.export.ExportedProgram, part: PartInfo, folder: Path, **options: Any
    ) -> None:
        # Sample inputs would be pickled; nobody needs them.
        program.example_inputs = None
        torch.export.save(program, folder / f"{part.name}.pt2")

    def load(self, part: PartInfo, folder: Path) -> Session:
        return ProgramSession(torch.export.load(folder / f"{part.name}.pt2").module())
