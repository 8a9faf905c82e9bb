"""What a traced model becomes: one file per kind."""

from mnemon.errors import ExportError
from mnemon.export.targets.aoti import Aoti
from mnemon.export.targets.base import PartInfo, Session, Target
from mnemon.export.targets.onnx import Onnx
from mnemon.export.targets.program import Program

__all__ = ["TARGETS", "PartInfo", "Session", "Target", "target"]

TARGETS = ("program", "onnx", "aoti")


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: there is none.
    """
    for kind in (Program, Onnx, Aoti):
        if kind.name == name:
            return kind()
    raise ExportError(f"to={name!r} is no target; known are {', '.join(TARGETS)}.")
