"""`transformers.exporters`, in mnemon's environment; see common.py.

Ways: "program" and "onnx" export the forward with one sample and `dynamic=True`;
"program-generation" and "onnx-generation" call `export_for_generation(...,
multi_token_decode=True)`, whose prefill graph answers where there is no past and whose decode
graph answers the rest.
"""

from pathlib import Path
from typing import Any

from common import SAMPLE_PAST, Call, Result, main, sample
from torch import Tensor
from transformers import GenerationConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter


def inputs_of(call: Call, counted: int) -> dict[str, Any]:
    """The inputs, with the counters of the window's layers as they were when traced.

    A program only takes a cache whose counters are those of its sample; the caches that it returns
    have them, so that is what its user would pass.
    """
    named = call.inputs()
    cache = named["past_key_values"]
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if isinstance(getattr(layer, "cumulative_length", None), int):
            layer.cumulative_length = counted
    return named


def export(model: Any, name: str, way: str, folder: Path) -> Result:
    """As the documentation of `HfExporter` says."""
    target, _, generation = way.partition("-")
    exporter, config = (
        (DynamoExporter(), DynamoConfig(dynamic=True))
        if target == "program"
        else (OnnxExporter(), OnnxConfig(dynamic=True))
    )
    shown = sample(model)
    if not generation:
        inputs = shown.inputs()
        exported = exporter.export(model, inputs, config)
        exported.to("cpu")
        return Result(
            lambda call: exported(**inputs_of(call, SAMPLE_PAST)).logits,
            notes="sample: batch 2, past 5, query 3, mask of ones, position_ids; dynamic=True",
        )

    if shown.has_encoder:
        asked = {"input_ids": shown.source_ids, "attention_mask": shown.source_mask}
    else:
        # One row is padded, for generate() drops a mask of ones and the graph would have none.
        mask = shown.mask[:, :SAMPLE_PAST].clone()
        mask[0, 0] = 0
        asked = {"input_ids": shown.ids[:, :SAMPLE_PAST].clone(), "attention_mask": mask}
    exported = exporter.export_for_generation(
        model,
        asked,
        config,
        generation_config=GenerationConfig(pad_token_id=0, do_sample=False),
        multi_token_decode=True,
    )
    exported.to("cpu")

    def answer(call: Call) -> Tensor:
        part = "decode" if call.shape.past else "prefill"
        named = inputs_of(call, SAMPLE_PAST)
        takes = exported.components[part].metadata.kwargs
        if "decoder_attention_mask" in takes:
            named["decoder_attention_mask"] = call.mask
        if "past_key_values" in takes and not call.shape.past:
            named["past_key_values"] = call.filled()
        if "input_ids" in takes and call.has_encoder:
            named["input_ids"] = call.source_ids
        named = {key: value for key, value in named.items() if key in takes}
        return exported.runners[part](**named).logits

    return Result(
        answer,
        notes="generate() on batch 2 x 5 (source: 6), one row padded; multi_token_decode=True",
    )


if __name__ == "__main__":
    main(export, "onnx", "onnxscript", "onnxruntime")
