"""Starts the decode kernels: tile sizes, strides, and where parts of the output go."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from mnemon.attention.triton.support import is_interpreting
from mnemon.formats import PackedSide, Scheme, rotate

__all__ = ["DENSE_SPLIT", "PACKED_SPLIT", "Workspace", "dense_parts", "one_output", "packed_parts"]

#: Tokens of a split: enough work to hide a program's start, few enough to fill a GPU early. They
#: are part of the result (rounding), hence no tuning knobs.
DENSE_SPLIT = 512
PACKED_SPLIT = 1024

_SPLITS_AT_ONCE = 32


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Partial outputs, float32.

    Args:
        partial: unnormalised outputs, [batch, kv_heads, rows, splits, value_dim].
        tops: largest score of a split, [batch, kv_heads, rows, splits].
        totals: sum of exp(score - top), the same shape.
    """

    partial: Tensor
    tops: Tensor
    totals: Tensor

    @classmethod
    def of(cls, query: Tensor, num_kv_heads: int, num_splits: int, value_dim: int) -> "Workspace":
        """Room for the splits of a query."""
        batch, num_heads, num_new, _ = query.shape
        shape = (batch, num_kv_heads, num_heads // num_kv_heads * num_new, num_splits)
        tops, totals = query.new_empty((2, *shape), dtype=torch.float32)
        partial = query.new_empty((*shape, value_dim), dtype=torch.float32)
        return cls(partial=partial, tops=tops, totals=totals)


class Tiling(NamedTuple):
    """How a kernel is cut up for one kind of shape."""

    tokens: int
    num_warps: int
    num_stages: int


def dense_tiling(dtype: torch.dtype, width: int) -> Tiling:
    """Keys and values of a tile in flight: 32 KiB per stage where heads are 128 wide."""
    if dtype == torch.float32:
        return Tiling(32, 4, 2)
    return Tiling(64, 4, 2 if width > 128 else 3)


def packed_tiling(
    keys: tuple[Scheme, int], values: tuple[Scheme, int], dtype: torch.dtype, rows: int
) -> Tiling:
    """Two blocks where registers allow: with few bits a block has too few words for four warps."""
    wide = max(keys[1], values[1]) > 128
    small = wide or rows > 16 or min(keys[0].bits, values[0].bits) == 8
    num_warps = 8 if wide and rows > 16 else 4
    return Tiling(64 if small else 128, num_warps, 1 if dtype == torch.float32 else 3)


def block_rows(num_rows: int, dtype: torch.dtype) -> int:
    """Rows of a program: tensor cores take them by eight; float32 has none and needs registers."""
    return min(16 if dtype == torch.float32 else 64, max(8, power_of_two(num_rows)))


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def dense_constants(
    dtype: torch.dtype, head_dim: int, value_dim: int, num_rows: int, page_tokens: int
) -> dict[str, Any]:
    """What the dense kernel is compiled for."""
    import triton.language as tl

    tiling = dense_tiling(dtype, max(head_dim, value_dim))
    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    operand = operands[dtype]
    if dtype == torch.bfloat16 and is_interpreting():
        operand = tl.float32  # the interpreter multiplies bfloat16 as if it were integers
    return {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, power_of_two(head_dim)), "BLOCK_V": max(16, power_of_two(value_dim)),
        "BLOCK_R": block_rows(num_rows, dtype), "BLOCK_N": tiling.tokens, "SPLIT": DENSE_SPLIT,
        "PAGE": page_tokens, "OPERAND": operand,
        "num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def packed_constants(
    dtype: torch.dtype,
    keys: tuple[Scheme, int],
    values: tuple[Scheme, int],
    num_rows: int,
    blocks_per_page: int,
) -> dict[str, Any]:
    """What the packed kernel is compiled for: schemes and widths of both sides."""
    import triton.language as tl

    rows = min(32, block_rows(num_rows, dtype))
    tiling = packed_tiling(keys, values, dtype, rows)
    return {
        "HEAD_DIM": keys[1], "VALUE_DIM": values[1],
        **_side_constants("KEY", *keys), **_side_constants("VALUE", *values),
        "BLOCK_D": max(16, power_of_two(keys[1])),
        "BLOCK_R": rows,
        "BLOCK_N": tiling.tokens, "SPLIT": PACKED_SPLIT, "PER_PAGE": blocks_per_page,
        "OPERAND": tl.float32 if dtype == torch.float32 else tl.float16,
        "num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _side_constants(name: str, scheme: Scheme, width: int) -> dict[str, Any]:
    padded = -(-width // 16) * 16
    channel = scheme.axis == "channel"
    group = padded if channel else min(scheme.group_size, padded)
    words = {"KEY_QUADS": group // 4} if name == "KEY" else {"VALUE_DIMS": group}
    return {
        f"{name}_BITS": scheme.bits, f"{name}_FP8": scheme.code == "fp8",
        f"{name}_CHANNEL": channel, f"{name}_GROUP": group,
        f"{name}_GROUPS": 1 if channel else scheme.num_groups(width),
        **{key: max(16, power_of_two(size)) for key, size in words.items()},
    }  # fmt: skip


def dense_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    space: Workspace,
    num_splits: int,
    page_tokens: int,
    arguments: dict[str, Any],
) -> None:
    """Splits of dense tokens; a contiguous query."""
    from mnemon.attention.triton.dense import dense_splits

    constants = dense_constants(
        query.dtype, keys.shape[-1], values.shape[-1], arguments["num_rows"], page_tokens
    )
    row_blocks = -(-arguments["num_rows"] // constants["BLOCK_R"])
    batch, num_kv_heads, _, all_splits = space.tops.shape
    with device_of(query):
        dense_splits[(num_splits, num_kv_heads * row_blocks, batch)](
            query, keys, values, partial=space.partial, tops=space.tops, totals=space.totals,
            num_splits=all_splits, row_blocks=row_blocks,
            **_strides("keys", keys, "bht"), **_strides("values", values, "bht"),
            **arguments, **constants,
        )  # fmt: skip


def packed_parts(
    query: Tensor,
    keys: PackedSide,
    values: PackedSide,
    space: Workspace,
    num_splits: int,
    blocks_per_page: int,
    arguments: dict[str, Any],
) -> None:
    """Splits of packed blocks; a contiguous query, not rotated."""
    from mnemon.attention.triton.packed import packed_splits

    constants = packed_constants(
        query.dtype, (keys.scheme, keys.width), (values.scheme, values.width),
        arguments["num_rows"], blocks_per_page,
    )  # fmt: skip
    row_blocks = -(-arguments["num_rows"] // constants["BLOCK_R"])
    if keys.scheme.rotated:
        query = rotate(query.to(torch.float32))
    key_words, value_words = keys.blocks.view(torch.int32), values.blocks.view(torch.int32)
    batch, num_kv_heads, _, all_splits = space.tops.shape
    with device_of(query):
        packed_splits[(num_splits, num_kv_heads * row_blocks, batch)](
            query, key_words, keys.blocks.view(torch.float16), keys.factors,
            value_words, values.blocks.view(torch.float16), values.factors,
            partial=space.partial, tops=space.tops, totals=space.totals,
            num_splits=all_splits, row_blocks=row_blocks,
            **_strides("keys", key_words, "bhn"), **_strides("values", value_words, "bhn"),
            **_strides("key_factors", keys.factors, "bhn"),
            **_strides("value_factors", values.factors, "bhn"),
            **arguments, **constants,
        )  # fmt: skip


def one_output(
    query: Tensor, space: Workspace, sinks: Tensor | None, num_new: int, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output in the query's dtype and, where asked for, the lse of the tokens."""
    from mnemon.attention.triton.combine import combine_splits

    batch, num_kv_heads, num_rows, num_splits, value_dim = space.partial.shape
    out = query.new_empty((*query.shape[:-1], value_dim))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32) if with_lse else None
    with device_of(query):
        combine_splits[(num_rows, num_kv_heads, batch)](
            space.partial, space.tops, space.totals,
            None if sinks is None else sinks.contiguous(), out, lse,
            num_splits, num_rows, num_new,
            VALUE_DIM=value_dim, BLOCK_V=power_of_two(value_dim), BLOCK_S=_SPLITS_AT_ONCE,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    """Strides of the leading axes; 0 for one of size 1, whose stride says nothing."""
    return {
        f"{name}_{axis}": 0 if x.shape[number] == 1 else x.stride(number)
        for number, axis in enumerate(axes)
    }


def device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
