"""onnx-diagnostic: torch.export with its patches, in its own environment; see common.py.

Two sets of inputs are shown, for its `ModelInputs` guesses the dynamic shapes from what differs.
The program runs with its serialization functions registered, as its documentation says.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from common import SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_QUERY, Call, Result, Shape, main, make_call
from onnx_diagnostic.export import ModelInputs
from onnx_diagnostic.torch_export_patches import (
    register_additional_serialization_functions,
    torch_export_patches,
)
from torch import Tensor

# transformers writes these into a program's signature; a cache's flag is no tensor.
_NO_TENSORS = ("use_cache",)


def shown(call: Call) -> dict[str, Any]:
    """Tensors and caches only."""
    named = {key: value for key, value in call.inputs().items() if key not in _NO_TENSORS}
    if call.has_encoder:
        # Its guess for a BaseModelOutput is a dict, which torch.export refuses; a tuple works.
        named["encoder_outputs"] = (call.encoded.last_hidden_state,)
    return named


def export(model: Any, name: str, way: str, folder: Path) -> Result:
    """Export with the shapes that it guesses from two sets of inputs."""
    one = Shape(SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_QUERY)
    other = Shape(SAMPLE_BATCH + 1, SAMPLE_PAST - 1, SAMPLE_QUERY + 1)  # within the window
    samples = [shown(make_call(model, shape, padded=False)) for shape in (one, other)]

    def trace(oblivious: bool) -> Any:
        with (
            torch_export_patches(patch_transformers=True) as prepare,
            torch.no_grad(),
            torch.fx.experimental._config.patch(backed_size_oblivious=oblivious),
        ):
            given = [prepare(copy.deepcopy(each)) for each in samples]
            _, dynamic = ModelInputs(model, given).guess_dynamic_shapes()
            return torch.export.export(
                model, (), kwargs=given[0], dynamic_shapes=dynamic, strict=False
            ).module()

    # Sizes 0 and 1 are told apart while tracing unless torch is told not to, as its own evaluation
    # of exporters does in one of its ways; where that fails, without.
    try:
        module, how = trace(True), "backed_size_oblivious"
    except Exception:
        module, how = trace(False), "not backed_size_oblivious, which fails"

    def answer(call: Call) -> Tensor:
        with torch.no_grad(), register_additional_serialization_functions():
            logits: Tensor = module(**shown(call)).logits
        return logits

    notes = (
        f"samples: {one} and {other}, masks of ones, position_ids; guess_dynamic_shapes(); "
        f"torch_export_patches(patch_transformers=True); {how}"
    )
    return Result(answer, notes=notes)


if __name__ == "__main__":
    main(export, "onnx-diagnostic")
