"""A retrofitted model on disk: a normal model folder, and one small file beside it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import AutoModelForCausalLM, PreTrainedModel

from mnemon.compression import Compression, compression_of
from mnemon.errors import LearnedMemoryError
from mnemon.files.atomic import write_atomically
from mnemon.memory.retrofitting.attaching import (
    attach_compression,
    control_of,
    decision_weights,
    detach_compression,
)

__all__ = ["ADAPTER_NAME", "load_retrofitted", "save_retrofitted"]

ADAPTER_NAME = "mnemon_memory.safetensors"
_VERSION = "1"


def save_retrofitted(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` as a normal model folder, with what decides in a small file beside it.

    ``config.json`` says how the cache is compressed; ``model.safetensors`` holds the names that a
    plain model has; `ADAPTER_NAME` holds the projections that decide, if there are some, and
    `facts`.

    Args:
        model: from `attach_compression`, `load_retrofitted` or `mnemon.memory.retrofit`.
        folder: is made if it is not there.
        facts: JSON-able, e.g. how it was trained.

    Raises:
        LearnedMemoryError: a model that does not compress.
        FileError: the folder cannot be written.
    """
    control = control_of(model)
    if control is None:
        raise LearnedMemoryError(
            f"{type(model).__name__} does not compress its cache: expected a model from "
            f"mnemon.memory.retrofit or attach_compression; save others by model.save_pretrained."
        )
    target = Path(os.path.expanduser(os.fspath(folder)))
    extra = decision_weights(model)
    plain = {name: weight for name, weight in model.state_dict().items() if name not in extra}
    model.save_pretrained(target, state_dict=plain)
    content = {
        "version": _VERSION,
        "compression": json.dumps(control.compression.to_dict()),
        "facts": json.dumps(dict(facts or {})),
    }
    data = save({name: weight.contiguous() for name, weight in extra.items()}, metadata=content)
    write_atomically(target / ADAPTER_NAME, lambda writer: writer.write(data))
    return target


def load_retrofitted(
    folder: str | os.PathLike[str], model: PreTrainedModel | None = None, **options: Any
) -> PreTrainedModel:
    """Load what `save_retrofitted` wrote: a model whose `mnemon.Cache` compresses.

    Args:
        folder: of the model.
        model: the plain model, if it is loaded already (it is changed in place).
        **options: for ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``.

    Raises:
        LearnedMemoryError: no adapter there, or one of another model.
        ModelError: the model cannot be loaded.
    """
    source = Path(os.path.expanduser(os.fspath(folder)))
    compression, weights, _ = read_adapter(source)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    named = compression_of(model.config)
    if named is not None and named != compression:
        raise LearnedMemoryError(
            f"{source / ADAPTER_NAME} says {compression} and the model's config {named}: they "
            f"are of different runs. Take both from one folder."
        )
    attach_compression(model, compression)
    expected = decision_weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in expected.items()}
    came = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != came:
        detach_compression(model)
        odd = sorted(name for name in {*shapes, *came} if shapes.get(name) != came.get(name))
        raise LearnedMemoryError(
            f"{source / ADAPTER_NAME} does not fit {type(model).__name__}: {odd[0]} is "
            f"{came.get(odd[0])} there, expected {shapes.get(odd[0])}. It was made for another "
            f"model."
        )
    with torch.no_grad():
        for name, weight in expected.items():
            weight.copy_(weights[name])
    model.eval()
    return model


def read_adapter(
    folder: Path,
) -> tuple[Compression, dict[str, torch.Tensor], dict[str, Any]]:
    """How the model of a folder compresses, the weights that decide, and what was noted.

    Raises:
        LearnedMemoryError: no adapter, one that is damaged, or of a newer version.
    """
    path = folder / ADAPTER_NAME
    if not path.is_file():
        raise LearnedMemoryError(
            f"{path} is not there: expected a folder that mnemon.memory.retrofit, `mnemon "
            f"retrofit` or save_retrofitted wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            content = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        version = content["version"]
        compression = json.loads(content["compression"])
        facts = json.loads(content["facts"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise LearnedMemoryError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or not "
            f"written by mnemon. Take it from where it came again."
        ) from error
    if version != _VERSION:
        raise LearnedMemoryError(
            f"{path} is of version {version}; this mnemon reads {_VERSION}. Update mnemon."
        )
    return Compression.of(compression), weights, facts
