"""What every target has in common: a traced part becomes files, and files become a session."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mnemon.recipe import Recipe

__all__ = ["PartInfo", "Session", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One graph of an export: "decoder", and "encoder" where there is one.

    Args:
        name: which.
        inputs: names of its inputs, in order.
        outputs: names of its outputs, in order.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "PartInfo":
        """The reverse of `to_json`."""
        return cls(
            name=facts["name"], inputs=tuple(facts["inputs"]), outputs=tuple(facts["outputs"])
        )


class Session(ABC):
    """A loaded part, ready to run. What it returns it also takes, without a copy."""

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Outputs in order; inputs are contiguous tensors or what `run` returned before."""

    def tensor(self, value: Any) -> Tensor:
        """An output as a tensor."""
        assert isinstance(value, Tensor)
        return value


class Target(ABC):
    """A kind of file that a traced part becomes."""

    name: ClassVar[str]
    #: Whether only operators that every runtime knows may be in the graph.
    plain_operators: ClassVar[bool] = False

    @abstractmethod
    def check(self, dtype: torch.dtype) -> None:
        """Raise `ExportError` or `DependencyError` before work begins."""

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise `ExportError` where this kind of file cannot keep a cache so."""
        return

    def tracing(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Open while the model is traced for this target."""
        return nullcontext()

    @abstractmethod
    def build(
        self, program: torch.export.ExportedProgram, part: PartInfo, folder: Path, **options: Any
    ) -> None:
        """Write the part's files into `folder`; their names begin with the part's."""

    @abstractmethod
    def load(self, part: PartInfo, folder: Path) -> Session:
        """Load what `build` wrote."""
