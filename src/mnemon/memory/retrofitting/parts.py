"""What one call of a retrofitted attention module works with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemon.compression import Compression
from mnemon.hf import compressing as hf
from mnemon.memory.retrofitting import decisions

__all__ = ["Decided", "first_tokens", "place", "valid_tokens"]


class Decided(NamedTuple):
    """One call's parts and decisions.

    Attributes:
        query: before positions, [batch, heads, new, head_dim].
        keys: before positions, [batch, kv_heads, new, head_dim].
        values: [batch, kv_heads, new, value_dim].
        logits: of the decisions, [batch, kv_heads, new].
        weights: DMC: how much each token counts in its segment's mean, [batch, kv_heads, new].
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    weights: Tensor | None


def place(
    module: nn.Module,
    compression: Compression,
    query: Tensor,
    keys: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    neuron_left: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Queries and keys at their positions, in the query's dtype; a borrowed neuron stays out."""
    query, keys = hf.rotate(module, query, keys.to(query.dtype), *position_embeddings)
    return decisions.borrow(compression, query, keys, neuron_left)


def first_tokens(valid: Tensor | None, like: Tensor) -> Tensor:
    """Which tokens have nothing before them, bool [batch, 1, tokens]: they cannot be merged."""
    if valid is None:
        first = torch.zeros(like.shape[-1], dtype=torch.bool, device=like.device)
        first[:1] = True
        return first[None, None]
    return ((valid.cumsum(-1) == 1) | ~valid)[:, None]


def valid_tokens(seen: Tensor | None, num_new: int) -> Tensor | None:
    """Which of the newest `num_new` tokens are no padding, bool [batch, num_new]; None: all.

    A row of padding sees nothing in a mask, or all columns where a release of transformers keeps
    softmax from dividing by zero.
    """
    if seen is None:
        return None
    own = seen[:, 0, :, seen.shape[-1] - num_new :]
    itself = own.diagonal(dim1=-2, dim2=-1)
    ahead = own.diagonal(offset=1, dim1=-2, dim2=-1)
    valid = itself & ~F.pad(ahead, (0, 1), value=False)
    return None if bool(valid.all()) else valid
