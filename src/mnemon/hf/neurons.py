"""The rows of an attention module's projections that make a borrowed neuron."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["borrowed_rows"]


def borrowed_rows(module: nn.Module, method: str) -> Iterator[Tensor]:
    """Views of the weights (and biases) whose products are the neurons that decide.

    DMC takes the last neuron of every key head, and of every query head for the weight of a token
    in its segment's mean; DMS the last of the first query head of every group.

    Args:
        module: a self-attention module, see `mnemon.hf.compressing`.
        method: ``"dmc"`` or ``"dms"``.
    """
    parts: Any = module
    width, keys, query = int(parts.head_dim), parts.k_proj, parts.q_proj
    heads = query.weight.shape[0] // keys.weight.shape[0]
    chosen = [(query, 1), (keys, 1)] if method == "dmc" else [(query, heads)]
    for projection, every in chosen:
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                yield parameter.detach().unflatten(0, (-1, width))[::every, -1]
