"""Random models that decide about half of their tokens, and the plain maths they must equal."""

from __future__ import annotations

from typing import Any

import torch
from small import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

from mnemon.compression import Compression
from mnemon.memory import attach_compression
from mnemon.memory.retrofitting.attaching import control_of
from mnemon.memory.retrofitting.attention import PROJECTION
from mnemon.memory.retrofitting.control import Control

METHODS: tuple[tuple[str, int], ...] = (
    ("dms", 0), ("dms", 4), ("dms", 100), ("dmc", 12), ("dmc", 3), ("dmc", 1),
)  # fmt: skip


def deciding_model(
    family: str = "llama",
    method: str = "dms",
    window: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    source: str | None = None,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A model of two layers, two KV heads and four query heads; about half is compressed."""
    make_config, make_model = FAMILIES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = make_model(
        make_config(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "initializer_range": 0.2,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": 0,
                **config,
            }
        )
    )
    model.eval().to(dtype)
    # Of DMC about 70% merge, so that runs go beyond the window of 12.
    offset = 0.5 if method == "dmc" else 0.0
    compression = Compression.named(method, window=window, offset=offset, source=source)
    attach_compression(model, compression)
    for layer in model.model.layers:
        if hasattr(layer.self_attn, PROJECTION):
            torch.nn.init.normal_(getattr(layer.self_attn, PROJECTION).weight, std=0.2)
    return model


def control(model: PreTrainedModel) -> Control:
    found = control_of(model)
    assert found is not None
    return found


def some_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (rows, tokens), generator=generator)


def mean_of_segment(x: Tensor, weights: Tensor, merged: Tensor, window: int) -> Tensor:
    """DMC's pooling as a loop over tokens, [tokens, width]."""
    out = torch.zeros_like(x)
    for now in range(len(x)):
        first = now
        while first > 0 and merged[first]:
            first -= 1
        first = max(first, now - window + 1)
        share = weights[first : now + 1]
        out[now] = (share[:, None] * x[first : now + 1]).sum(0) / share.sum()
    return out


def dms_cache(marks: Tensor, window: int, query: int) -> list[int]:
    """Tokens that a DMS cache holds for one head when `query` attends, token by token."""
    held: list[int] = []
    marked: set[int] = set()
    for now in range(query + 1):
        if now and marks[now]:
            marked.add(now - 1)
        held.append(now)
        held = [token for token in held if now - token <= window or token not in marked]
    return held


def dmc_cache(merged: Tensor, query: int) -> list[int]:
    """Tokens whose means lie in the slots of one head when `query` attends, token by token."""
    slots: list[int] = []
    for now in range(query + 1):
        if now and merged[now]:
            slots[-1] = now
        else:
            slots.append(now)
    return slots
