"""One token into the slots of a compressing cache, by the native kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemon.attention import cpu

__all__ = ["serves_slots", "store_token"]


def serves_slots(keys: Tensor, values: Tensor, decisions: Tensor) -> bool:
    """Whether `store_token` takes them: memory of a CPU, one token, the last axis contiguous."""
    return (
        keys.device.type == "cpu"
        and decisions.dtype is torch.bool
        and keys.stride(-1) == 1 == values.stride(-1)
        and cpu.is_built()
    )


def store_token(
    parts: Sequence[Tensor],
    lengths: Tensor,
    counts: Tensor,
    keys: Tensor,
    values: Tensor,
    decisions: Tensor,
    marks: Tensor | None = None,
) -> None:
    """Write one token of every row and head; lengths, counts and marks follow, all in place.

    Args:
        parts: keys and values, [batch, kv_heads, capacity, width], contiguous, with room for one
            more slot; and positions, int32 [batch, kv_heads, capacity, 1], if there are some.
        lengths: live slots, int32 [batch, kv_heads].
        counts: real tokens of each row so far, int64 [batch].
        keys: [batch, kv_heads, 1, head_dim], in the dtype of the slots.
        values: [batch, kv_heads, 1, value_dim], in the dtype of the slots.
        decisions: bool [batch, kv_heads, 1].
        marks: DMS: of the ring's slots, bool [batch, kv_heads, ring]; None: DMC, where a token
            that is decided writes the newest slot anew.
    """
    module = cpu.native()
    batch, heads, capacity, _ = parts[0].shape
    numbers: list[int] = [batch, heads, capacity]
    for part, new in ((parts[0], keys), (parts[1], values)):
        size = part.element_size()
        numbers += (
            part.data_ptr(), part.shape[3] * size,
            new.data_ptr(), new.stride(0) * size, new.stride(1) * size,
        )  # fmt: skip
    numbers += (
        parts[2].data_ptr() if len(parts) > 2 else 0,
        lengths.data_ptr(), counts.data_ptr(),
        decisions.data_ptr(), decisions.stride(0), decisions.stride(1),
        0 if marks is None else marks.shape[2], 0 if marks is None else marks.data_ptr(),
    )  # fmt: skip
    module.store_token(numbers)
