"""`mnemon.export_model`, in mnemon's environment; see common.py."""

from pathlib import Path
from typing import Any

from common import Call, Result, main
from torch import Tensor

from mnemon import export_model


def export(model: Any, name: str, way: str, folder: Path) -> Result:
    """Nothing but the model is given."""
    exported = export_model(model, to=way, verify=False)

    def answer(call: Call) -> Tensor:
        cache = call.cache() if call.shape.past else None
        named = {}
        if call.has_encoder:
            named["encoder_attention_mask"] = call.source_mask
            if cache is None:
                named["encoder_input_ids"] = call.source_ids
        return exported(call.query_ids, call.mask, cache, **named).logits

    return Result(answer, notes="no sample")


if __name__ == "__main__":
    main(export, "mnemon", "onnx", "onnxscript", "onnxruntime")
