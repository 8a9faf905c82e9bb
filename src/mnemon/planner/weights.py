"""Bytes of a model's weights, from the headers of its files or, for Llama's kin, its config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mnemon.planner.layers import ModelPlan
from mnemon.planner.recipes import ITEM_BYTES
from mnemon.planner.settings import Settings

_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header
_MOST_HEADER_BYTES = 100 << 20
_FLOATING = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def model_dtype(config: dict[str, Any], folder: Path | None) -> str:
    """The dtype the model loads in: what the config says, else its files, else float32."""
    for section in (config, config.get("text_config") or {}):
        name = section.get("dtype") or section.get("torch_dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in ITEM_BYTES:
            return name.removeprefix("torch.")
    headers = _headers(folder) if folder else None
    if headers:
        sizes: dict[str, int] = {}
        for tensor in headers:
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + _size(tensor)
        largest = max(sizes, key=lambda name: sizes[name])
        return _FILE_DTYPES.get(largest, "float32")
    return "float32"


def weight_bytes(
    config: dict[str, Any], model: ModelPlan, folder: Path | None, *, dtype: str, as_saved: bool
) -> int | None:
    """Bytes of the weights once loaded; None where neither files nor config tell.

    Args:
        config: the config.json as plain data.
        model: from `plan_model`.
        folder: where the weights lie, if they are on this machine.
        dtype: the dtype the model will run in.
        as_saved: `dtype` is the one the weights were saved in: count what the files hold.
    """
    headers = _headers(folder) if folder else None
    if headers:
        if as_saved:
            return sum(_size(tensor) for tensor in headers)
        item = ITEM_BYTES[dtype]
        return sum(
            _size(tensor) // _FLOATING[tensor["dtype"]] * item
            if tensor["dtype"] in _FLOATING
            else _size(tensor)
            for tensor in headers
        )
    parameters = _count(model.settings) if model.settings.raw is config else None
    return None if parameters is None else parameters * ITEM_BYTES[dtype]


def _size(tensor: dict[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end - begin)


def _headers(folder: Path) -> list[dict[str, Any]] | None:
    """Every tensor's entry in the safetensors headers; None unless all files are there."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        else:
            files = [folder / "model.safetensors"]
        return [tensor for file in files for tensor in _header(file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not downloaded, or not safetensors: the config may still tell


def _header(file: Path) -> list[dict[str, Any]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_MOST_HEADER_BYTES, os.fstat(stream.fileno()).st_size):
            raise ValueError(f"{file} has no safetensors header")
        header = json.loads(stream.read(length))
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _count(s: Settings) -> int | None:
    """Parameters of Llama and its closest kin; None for any other architecture."""
    if s.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    hidden, vocabulary = s.number("hidden_size"), s.number("vocab_size")
    heads = s.number("num_attention_heads")
    key_heads = s.first("num_key_value_heads", "num_attention_heads")
    head_dim = s.number("head_dim") if s.get("head_dim") else hidden // heads
    attention = 2 * hidden * head_dim * (heads + key_heads)
    inner = s.number("intermediate_size")
    feed_forward = 3 * hidden * inner
    if s.model_type == "qwen2":
        attention += head_dim * (heads + 2 * key_heads)  # biases of q, k and v
    elif s.get("attention_bias"):
        attention += head_dim * (heads + 2 * key_heads) + hidden
    if s.get("mlp_bias"):
        feed_forward += 2 * inner + hidden
    norms = 2 * hidden + (2 * head_dim if s.model_type == "qwen3" else 0)
    embeddings = vocabulary * hidden * (1 if s.get("tie_word_embeddings") else 2)
    return s.number("num_hidden_layers") * (attention + feed_forward + norms) + embeddings + hidden
