"""ONNX, run by onnxruntime."""

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mnemon.errors import DependencyError, ExportError
from mnemon.export.targets.base import PartInfo, Session, Target
from mnemon.recipe import Recipe

__all__ = ["Onnx"]

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@final
class OnnxSession(Session):
    """An onnxruntime session on the CPU. Values stay onnxruntime's between calls."""

    def __init__(self, path: Path, part: PartInfo) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._runtime = onnxruntime
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        # An input that the graph does not read is not one of its inputs.
        self._known = {value.name for value in self._session.get_inputs()}
        self._part = part

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        feeds = {
            name: self._value(value)
            for name, value in zip(self._part.inputs, inputs, strict=True)
            if name in self._known
        }
        return list(self._session.run_with_ort_values(list(self._part.outputs), feeds))

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        array = value.detach().cpu().numpy()
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    def tensor(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.from_numpy(value.numpy())


@final
class Onnx(Target):
    """``torch.onnx.export`` of a traced program."""

    name = "onnx"
    plain_operators = True

    def check(self, dtype: torch.dtype) -> None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise DependencyError(
                f"Export to ONNX needs {', '.join(missing)}: pip install 'mnemon[onnx]'."
            )
        if dtype == torch.bfloat16:
            raise ExportError(
                "onnxruntime's CPU kernels have no bfloat16. Load the model in float16 or float32 "
                "(--dtype float16), or export to 'aoti' or 'program'."
            )

    def check_recipe(self, recipe: Recipe) -> None:
        if recipe.static_tokens is not None:
            raise ExportError(
                f"The recipe {recipe} has no form in ONNX: its graphs keep nothing between two "
                f"calls. Leave it out, or export to 'program' or 'aoti'."
            )
        if recipe.packed is not None and "fp8" in recipe.packed.name:
            raise ExportError(
                f"The recipe {recipe} has no form in ONNX: onnxruntime's CPU kernels do not read "
                f"float8. Use int8, int4 or int2, or export to 'program' or 'aoti'."
            )

    def build(
        self, program: torch.export.ExportedProgram, part: PartInfo, folder: Path, **options: Any
    ) -> None:
        quiet = contextlib.redirect_stdout(io.StringIO())  # the exporter prints its progress
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with quiet, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    input_names=list(part.inputs),
                    output_names=list(part.outputs),
                    opset_version=options.get("opset"),
                    verbose=False,
                )
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            shown = next((line for line in lines if "Error" in line), lines[0] if lines else "")
            raise ExportError(
                f"The {part.name} cannot be written as ONNX: {type(error).__name__}: {shown[:400]}"
            ) from error
        finally:
            logger.setLevel(level)
        assert exported is not None
        wanted, got = options.get("opset"), exported.model.opset_imports.get("")
        if wanted is not None and got != wanted:
            raise ExportError(f"opset={wanted} cannot be had: the graph needs opset {got}.")
        _rename(exported.model, options.get("symbols", {}))
        exported.save(str(folder / f"{part.name}.onnx"), external_data=True)

    def load(self, part: PartInfo, folder: Path) -> Session:
        self.check(torch.float32)
        return OnnxSession(folder / f"{part.name}.onnx", part)


def _rename(model: Any, symbols: Mapping[str, str]) -> None:
    """Call the model's dimensions by our names: ``batch`` instead of ``s43``."""
    if not symbols:
        return
    import onnx_ir as ir

    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    values = [*model.graph.inputs, *model.graph.outputs]
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is None:
            continue
        dims = [
            pattern.sub(lambda found: symbols[found[0]], str(dim.value))
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
            else dim
            for dim in value.shape
        ]
        value.shape = ir.Shape(dims)
