"""Whether Triton is there, and what its kernels serve. Imports triton only when asked."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mnemon.errors import DependencyError
from mnemon.formats import PackedHalf, PackedTensor

__all__ = [
    "MAX_ROWS",
    "MAX_WIDTH",
    "half_of",
    "is_available",
    "is_interpreting",
    "require",
    "supports",
]

#: Query rows per sequence and head that count as decoding.
MAX_ROWS = 32
MAX_WIDTH = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@cache
def is_available() -> bool:
    """Whether Triton is installed (on Linux; torch for CUDA brings it)."""
    return find_spec("triton") is not None


def require() -> None:
    """Raise `DependencyError` unless Triton is installed."""
    if not is_available():
        raise DependencyError(
            "Attention on a GPU reads caches with Triton, which is not installed. Install it: "
            "pip install 'mnemon[triton]' (torch for CUDA brings it along)."
        )


def is_interpreting() -> bool:
    """Whether kernels run on the CPU, as tests do: TRITON_INTERPRET=1 before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def half_of(given: Tensor | PackedHalf) -> PackedHalf | None:
    """The packed half behind keys or values; None if they are dense."""
    if isinstance(given, PackedTensor):
        return given.half
    return given if isinstance(given, PackedHalf) else None


def supports(query: Tensor, keys: Tensor | PackedHalf, values: Tensor | PackedHalf) -> bool:
    """Whether `decode` serves these; otherwise torch's path is the one to take.

    Not served: more than 32 query rows, widths above 256, keys and values of which only one is
    packed or which are packed in other blocks, rotated values, numbers of other dtypes, rows that
    are not contiguous, gradients, and what `torch.compile` traces.
    """
    on_device = query.device.type == "cuda" or (query.device.type == "cpu" and is_interpreting())
    if not on_device or not is_available() or torch.compiler.is_compiling():
        return False
    if query.dtype not in _FLOATS or not 1 <= query.shape[2] <= MAX_ROWS or not query.numel():
        return False
    key_half, value_half = half_of(keys), half_of(values)
    if (key_half is None) != (value_half is None):
        return False
    if key_half is None or value_half is None:
        if not (_is_plain(keys) and _is_plain(values)):
            return False
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        tensors = [keys, values]
    else:
        tensors = [key_half.tail, value_half.tail]
        if not _packed_alike(key_half, value_half):
            return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, *tensors)):
        return False
    return all(
        x.dtype is query.dtype
        and x.device == query.device
        and 1 <= x.shape[-1] <= MAX_WIDTH
        and (x.stride(-1) == 1 or x.shape[-1] == 1 or not x.numel())
        for x in tensors
    )


def _is_plain(x: object) -> bool:
    """Memory that a kernel can read: no other kind of tensor with data of its own."""
    return type(x) in (Tensor, torch.nn.Parameter)


def _packed_alike(keys: PackedHalf, values: PackedHalf) -> bool:
    if keys.num_blocks != values.num_blocks or keys.num_skipped != values.num_skipped:
        return False
    if keys.side is None or values.side is None or not keys.num_blocks:
        return True
    return not values.side.scheme.rotated and all(
        side.blocks.stride(-1) == 1
        and side.blocks.storage_offset() % 4 == 0
        and all(stride % 4 == 0 for stride in side.blocks.stride()[:-1])
        for side in (keys.side, values.side)
    )
