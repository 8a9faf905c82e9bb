"""Export with a cache whose lengths stay free, verified against the model.

exported = mnemon.export_model(model, to="onnx")
exported.runner().generate(input_ids, attention_mask, max_new_tokens=64)
exported.save("exported"); exported = mnemon.load_export("exported")
"""

from mnemon.export.axes import Axis, Shapes
from mnemon.export.exported import Exported, ExportedOutput, load_export
from mnemon.export.held import HeldCache
from mnemon.export.making import export_model
from mnemon.export.pytrees import pytrees
from mnemon.export.report import Case, Report, Verdict
from mnemon.export.runner import Runner

__all__ = [
    "Axis",
    "Case",
    "Exported",
    "ExportedOutput",
    "HeldCache",
    "Report",
    "Runner",
    "Shapes",
    "Verdict",
    "export_model",
    "load_export",
    "pytrees",
]
