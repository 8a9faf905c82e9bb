"""AOTInductor: the graph compiled to a shared library for this machine's processor."""

import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, final

import torch

from mnemon.errors import DependencyError, ExportError
from mnemon.export.few_rows import few_rows
from mnemon.export.targets.base import PartInfo, Session, Target

__all__ = ["Aoti"]

# Numbers that the model's code rounds to half precision and back stay rounded, as in eager.
_CONFIGS = {"emulate_precision_casts": True}


@final
class AotiSession(Session):
    """A loaded package. It checks nothing about its inputs: who calls it has to."""

    def __init__(self, package: Callable[..., Any]) -> None:
        self._package = package

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            # Also its own outputs: the end of a window comes back as a part of something longer.
            return list(self._package(*(one.contiguous() for one in inputs)))


@final
class Aoti(Target):
    """``torch._inductor.aoti_compile_and_package``."""

    name = "aoti"

    def check(self, dtype: torch.dtype) -> None:
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise DependencyError(
                "AOTInductor compiles C++ and found no compiler. Install g++ or clang, or export "
                "to 'onnx' or 'program'."
            )

    def tracing(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return few_rows() if dtype == torch.float32 else nullcontext()

    def build(
        self, program: torch.export.ExportedProgram, part: PartInfo, folder: Path, **options: Any
    ) -> None:
        path = str(folder / f"{part.name}.pt2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own use of what it deprecates
            try:
                torch._inductor.aoti_compile_and_package(
                    program, package_path=path, inductor_configs=_CONFIGS
                )
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                raise ExportError(
                    f"AOTInductor cannot compile the {part.name}: {type(error).__name__}: "
                    f"{lines[0][:400]}"
                ) from error

    def load(self, part: PartInfo, folder: Path) -> Session:
        return AotiSession(torch._inductor.aoti_load_package(str(folder / f"{part.name}.pt2")))
