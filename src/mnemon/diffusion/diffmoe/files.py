"""A pipeline with experts on disk: a `DiTPipeline` folder, and moe.json of what is in its blocks.

The weights are safetensors under the names of the state dict. diffusers alone cannot load such a
folder: it would make up feed-forwards where the experts are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnemon.diffusion.diffmoe.layer import MoELayer
from mnemon.diffusion.diffmoe.place import KINDS, install, moe_layers
from mnemon.errors import DependencyError, ModelError

if TYPE_CHECKING:
    from diffusers import DiTPipeline

__all__ = ["load_moe", "save_moe"]

FILE = "moe.json"
_FORMAT = 1


def save_moe(pipe: DiTPipeline, folder: str | os.PathLike[str]) -> None:
    """Saves a pipeline whose transformer has experts.

    Raises:
        ModelError: it has none.
    """
    layers = moe_layers(pipe.transformer)
    if not layers:
        raise ModelError(
            "this pipeline's transformer has no experts; save it with pipe.save_pretrained"
        )
    blocks = [
        place
        for place, block in enumerate(pipe.transformer.transformer_blocks)
        if isinstance(block.ff, MoELayer)
    ]
    pipe.save_pretrained(os.fspath(folder), safe_serialization=True)
    first = layers[0]
    record = {
        "format": _FORMAT,
        "kind": first.kind,
        "num_experts": first.num_experts,
        "capacity": float(first.capacity),
        "blocks": blocks,
    }
    (Path(folder) / FILE).write_text(json.dumps(record, indent=1) + "\n")


def load_moe(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> DiTPipeline:
    """The pipeline that `save_moe` saved, in evaluation mode; progress bars are off.

    Raises:
        ModelError: the folder has none, its moe.json is damaged or newer, or the weights are not
            those of the experts it names.
        DependencyError: diffusers is not installed.
    """
    path = Path(folder).expanduser()
    record = _record(path)
    try:
        from diffusers import DiTPipeline, DiTTransformer2DModel
        from diffusers.utils import logging
    except ModuleNotFoundError as error:
        raise DependencyError(
            "diffusers is not installed; pip install 'mnemon[diffusion]'"
        ) from error
    config = path / "transformer" / "config.json"
    if not config.is_file():
        raise ModelError(f"{os.fspath(path)} has no transformer/config.json; save it again")
    transformer: Any = DiTTransformer2DModel.from_config(json.loads(config.read_text()))
    layers = install(
        transformer,
        record["kind"],
        num_experts=record["num_experts"],
        capacity=record["capacity"],
        blocks=record["blocks"],
    )
    for layer in layers:
        layer.replaced = ()  # a fresh feed-forward is nothing to go back to
    _load_weights(transformer, path)
    transformer.eval()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe = DiTPipeline.from_pretrained(
            os.fspath(path), transformer=transformer, low_cpu_mem_usage=False
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def _record(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise ModelError(
            f"{os.fspath(folder)} has no {FILE}; give the folder that save_moe wrote, or load a "
            "pipeline without experts with DiTPipeline.from_pretrained"
        )
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{os.fspath(file)} is not JSON ({error}); save it again") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        came = record.get("format") if isinstance(record, dict) else record
        raise ModelError(
            f"{os.fspath(file)} has format {came!r}, this mnemon reads {_FORMAT}; update mnemon"
        )
    if record.get("kind") not in KINDS:
        raise ModelError(
            f"{os.fspath(file)} has kind {record.get('kind')!r}; expected one of {', '.join(KINDS)}"
        )
    blocks = record.get("blocks")
    if (
        type(record.get("num_experts")) is not int
        or type(record.get("capacity")) not in (int, float)
        or not isinstance(blocks, list)
        or not all(type(block) is int for block in blocks)
    ):
        raise ModelError(
            f"{os.fspath(file)} has {record}; expected num_experts (a whole number), capacity (a "
            "number) and blocks (a list of whole numbers)"
        )
    return record


def _load_weights(transformer: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ModelError(f"{os.fspath(file)} is damaged ({error}); save it again") from error
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [
        f"{name}: {came.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | came.keys())
        if came.get(name) != expected.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"the weights in {os.fspath(folder)} are not of the experts that its {FILE} names: "
            f"{'; '.join(wrong[:3])}{more}; put back the file that was saved with them"
        )
    transformer.load_state_dict(weights)
