"""optimum-onnx in its own environment, run by onnxruntime; see common.py.

Exported with the task "text-generation-with-past" ("text2text-generation-with-past" for
encoder-decoder models); it makes its own sample inputs. Of an encoder-decoder model, the graph
without a past answers where there is none and the one with a past answers the rest.
"""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import Call, Result, main
from optimum.exporters.onnx import onnx_export_from_model
from torch import Tensor


def session(file: Path) -> Any:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def names(part: Any) -> list[str]:
    return [each.name for each in part.get_inputs()]


def run(part: Any, feeds: dict[str, Tensor]) -> Tensor:
    """The logits; inputs that the graph does not have are left out."""
    arrays = {name: feeds[name].numpy() for name in names(part) if name in feeds}
    return torch.from_numpy(part.run(["logits"], arrays)[0])


def past(call: Call, positions: bool = True) -> dict[str, Tensor]:
    """The cache by the names that optimum gives it."""
    infix = ".decoder" if call.has_encoder else ""
    found = {}
    for index, (keys, values) in enumerate(call.pairs(positions)):
        found[f"past_key_values.{index}{infix}.key"] = keys
        found[f"past_key_values.{index}{infix}.value"] = values
    for index, (keys, values) in enumerate(call.cross_pairs() if call.has_encoder else ()):
        found[f"past_key_values.{index}.encoder.key"] = keys
        found[f"past_key_values.{index}.encoder.value"] = values
    return found


def export(model: Any, name: str, way: str, folder: Path) -> Result:
    """The model is the only thing given."""
    encodes = model.config.is_encoder_decoder
    task = "text2text-generation-with-past" if encodes else "text-generation-with-past"
    onnx_export_from_model(model, folder, task=task, do_validation=False, no_post_process=encodes)
    if not encodes:
        part = session(folder / "model.onnx")
        positions = "position_ids" in names(part)

        def answer(call: Call) -> Tensor:
            feeds = past(call, positions) | {
                "input_ids": call.query_ids,
                "attention_mask": call.mask,
                "position_ids": call.positions,
            }
            return run(part, feeds)

        given = "" if positions else ", which has no position_ids"
        return Result(answer, positions, f"{task}{given}; its own sample inputs")

    first = session(folder / "decoder_model.onnx")
    later = session(folder / "decoder_with_past_model.onnx")

    def decode(call: Call) -> Tensor:
        feeds = {
            "input_ids": call.query_ids,
            "decoder_input_ids": call.query_ids,
            "encoder_hidden_states": call.encoded.last_hidden_state,
            "encoder_attention_mask": call.source_mask,
        }
        if not call.shape.past:
            return run(first, feeds)
        return run(later, feeds | past(call))

    return Result(decode, notes=f"{task}, decoders not merged; its own sample inputs")


if __name__ == "__main__":
    main(export, "optimum-onnx", "optimum", "onnx", "onnxruntime")
