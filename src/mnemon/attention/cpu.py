"""The native kernels of a CPU: few query rows against dense or packed keys and values.

The C++ in ``native/`` is compiled once per instruction set (portable, AVX2, AVX-512, with VNNI, and
with BF16) and the best one that the processor runs is taken. Without the extension nothing here is
used and plain torch does the same work; one warning says so.

Work is split over tokens into chunks of 1,024 that are cut by position and joined in order: results
depend neither on the number of threads nor on the other rows of a batch.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.formats import PackedHalf, PackedSide, PackedTensor

__all__ = [
    "MAX_ROWS",
    "decode",
    "decode_part",
    "instruction_sets",
    "is_built",
    "native",
    "pack",
    "release_scratch",
    "serves",
    "serves_packing",
    "serves_unpacking",
    "stream_read",
    "unpack",
]

MAX_ROWS = 32
"""Query rows per sequence and head that the kernels are made for; more are bound by arithmetic."""

_MAX_WIDTH = 1024
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ADDED = {torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_CODES = {"int8": 8, "int4": 4, "int2": 2, "fp8": 9}
_AXES = {"token": 0, "channel": 1}
_NO_SCORES = (0,)
_ADDRESSED = (Tensor, torch.nn.Parameter, PackedTensor)


@functools.cache
def _module() -> ModuleType | None:
    # torch comes first (above): the module then shares its OpenMP threads.
    try:
        from mnemon.attention import _native  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        warnings.warn(
            f"mnemon's native kernels are not there ({error}); attention runs in plain torch, "
            "several times slower over long or packed caches. Install mnemon where a C++ compiler "
            "and CMake are to be had: pip install --no-binary mnemon mnemon",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    module: ModuleType = _native
    return module


def is_built() -> bool:
    """Whether the extension is there; warns once if it is not."""
    return _module() is not None


def native() -> ModuleType:
    """The extension; ask `is_built` first."""
    module = _module()
    assert module is not None, "ask `is_built` first"
    return module


def instruction_sets() -> list[str]:
    """What this build has and this processor runs, best first; empty without the extension."""
    module = _module()
    return [] if module is None else list(module.instruction_sets())


def serves(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Whether `decode` takes these: a CPU, few rows, float dtypes, no gradients to record.

    Addresses are all that the kernels are given, so shapes that do not fit are refused here; torch
    then says what is wrong with them.
    """
    for tensor in (query, keys, values):
        if type(tensor) not in _ADDRESSED:
            return False  # numbers that are not in memory as they seem have no address
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False  # a trace would keep this call's numbers
    batch, heads, num_new, width = query.shape
    held, kv_heads, num_tokens, key_width = keys.shape
    if (
        num_new > MAX_ROWS
        or not batch
        or held != batch
        or key_width != width
        or values.shape[:3] != (batch, kv_heads, num_tokens)
        or not kv_heads
        or heads % kv_heads
        or query.dtype not in _FLOATS
        or keys.dtype not in _FLOATS
        or values.dtype not in _FLOATS
        or query.device.type != "cpu"
        or keys.device.type != "cpu"
        or not 0 < width <= _MAX_WIDTH
        or values.shape[3] > _MAX_WIDTH
    ):
        return False
    if isinstance(keys, PackedTensor):
        if not isinstance(values, PackedTensor) or not _cut_alike(keys.half, values.half):
            return False
    elif isinstance(values, PackedTensor):
        return False
    if torch.is_grad_enabled() and (
        query.requires_grad or keys.requires_grad or values.requires_grad
    ):
        return False
    for added in (mask, bias):
        if added is not None and not _fits(added, (batch, heads, num_new, num_tokens)):
            return False
    if sinks is not None and (
        sinks.numel() != heads
        or sinks.device.type != "cpu"
        or (sinks.requires_grad and torch.is_grad_enabled())
    ):
        return False
    return _module() is not None


def decode(
    query: Tensor,
    keys: Tensor | PackedHalf,
    values: Tensor | PackedHalf,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    threads: int | None = None,
    isa: str = "",
) -> Tensor:
    """Attention of a few rows, each stored byte read once.

    Args:
        query: [batch, heads, new, head_dim], float32, float16 or bfloat16; any strides.
        keys: [batch, kv_heads, tokens, head_dim], dense or packed.
        values: [batch, kv_heads, tokens, value_dim], packed if and only if the keys are.
        mask: bool (True = seen) or numbers added, 4-D, broadcastable to the scores.
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
        causal: row i sees the tokens up to ``length - new + i``.
        softcap: bound on the scores, before mask and bias.
        sinks: one score per head that takes part in the softmax, [heads].
        bias: numbers added to the scores, 4-D, broadcastable.
        window: a row sees only the last `window` tokens up to its own; None: all.
        lengths: tokens that are there, int32 [batch] or [batch, kv_heads]; None: all.
        starts: the first token that is seen, int32 [batch] or [batch, kv_heads]; None: 0.
        threads: None is torch's number.
        isa: one of `instruction_sets`, for tests; empty takes the best.

    Returns:
        [batch, heads, new, value_dim] in the query's dtype; a row that sees nothing is zero.

    Raises:
        CacheError: keys and values of different lengths, or cut into blocks and tail differently;
            lengths or starts of another shape.
    """
    return _run(
        query, keys, values, mask, scale, causal, softcap, sinks, bias, window, lengths, starts,
        threads, isa, False,
    )[0]  # fmt: skip


def decode_part(
    query: Tensor,
    keys: Tensor | PackedHalf,
    values: Tensor | PackedHalf,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` as one part of several: float32 output, and float32 lse [batch, heads, new]."""
    out, lse = _run(
        query, keys, values, mask, scale, causal, softcap, None, bias, None, lengths, None,
        threads, "", True,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def _run(
    query: Tensor,
    keys: Tensor | PackedHalf,
    values: Tensor | PackedHalf,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    threads: int | None,
    isa: str,
    as_part: bool,
) -> tuple[Tensor, Tensor | None]:
    module = _module()
    assert module is not None, "ask `serves` first"
    batch, heads, num_new, head_dim = query.shape
    if isinstance(keys, PackedTensor):
        keys = keys.half
    if isinstance(values, PackedTensor):
        values = values.half
    if isinstance(keys, PackedHalf):
        assert isinstance(values, PackedHalf)
        if not _cut_alike(keys, values):
            raise CacheError(
                f"{keys.num_blocks} blocks of keys ({keys.num_skipped} tokens skipped) and "
                f"{values.num_blocks} of values ({values.num_skipped}): expected as many"
            )
        dense_keys, dense_values = keys.tail, values.tail
        num_blocks, skipped = keys.num_blocks, keys.num_skipped
        packed = (*_packed(keys.side), *_packed(values.side)) if num_blocks else (0, 0)
    else:
        assert isinstance(values, Tensor)
        dense_keys, dense_values = keys, values
        num_blocks, skipped, packed = 0, 0, (0, 0)
    kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[3]
    if dense_keys.shape[:3] != dense_values.shape[:3]:
        raise CacheError(
            f"keys {tuple(dense_keys.shape)} and values {tuple(dense_values.shape)}: expected one "
            "batch, head count and length"
        )
    if dense_keys.stride(3) != 1:
        dense_keys = dense_keys.contiguous()
    if dense_values.stride(3) != 1:
        dense_values = dense_values.contiguous()
    if query.stride(3) != 1:
        query = query.contiguous()
    # Rows first: the caller wants [batch, new, heads, value_dim] in the end, and gets it uncopied.
    out = query.new_empty(
        (batch, num_new, heads, value_dim), dtype=torch.float32 if as_part else query.dtype
    ).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_new), dtype=torch.float32) if as_part else None
    if not batch or not num_new:
        return out, lse
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
    if lengths is not None:
        lengths = _int32_per_head(lengths, batch, kv_heads)
    if starts is not None:
        starts = _int32_per_head(starts, batch, kv_heads)
    numbers = (
        torch.get_num_threads() if threads is None else threads,
        batch, kv_heads, heads // kv_heads, num_new, head_dim, value_dim,
        query.data_ptr(), *query.stride()[:3], _FLOATS[query.dtype],
        out.data_ptr(), *out.stride()[:3], _FLOATS[out.dtype],
        0 if lse is None else lse.data_ptr(),
        dense_keys.shape[2],
        *_dense(dense_keys), *_dense(dense_values),
        num_blocks, skipped, *packed,
        *(_NO_SCORES if mask is None else _scores(mask)),
        *(_NO_SCORES if bias is None else _scores(bias)),
        0 if sinks is None else sinks.data_ptr(),
        causal, window or 0,
        *_per_head(lengths), *_per_head(starts),
    )  # fmt: skip
    module.attend(numbers, head_dim**-0.5 if scale is None else float(scale), softcap or 0.0, isa)
    return out, lse


def serves_packing(x: Tensor) -> bool:
    """Whether `pack` takes these numbers."""
    return (
        x.device.type == "cpu"
        and x.dtype in _FLOATS
        and 0 < x.shape[-1] <= _MAX_WIDTH
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _module() is not None
    )


def serves_unpacking(side: PackedSide, dtype: torch.dtype) -> bool:
    """Whether `unpack` can write these blocks' numbers in this dtype."""
    return dtype in _FLOATS and side.width <= _MAX_WIDTH and _module() is not None


def pack(x: Tensor, side: PackedSide, *, isa: str = "") -> bool:
    """Quantize `x` ``[batch, kv_heads, 64 * n, width]`` into the blocks and factors of `side`.

    Returns:
        False if a number is not finite; the blocks' bytes then mean nothing.
    """
    module = _module()
    assert module is not None, "ask `serves_packing` first"
    if not x.numel():
        return True
    if x.stride(3) != 1:
        x = x.contiguous()
    done = module.pack(
        (
            torch.get_num_threads(), x.shape[0], x.shape[1], side.num_blocks, side.is_keys,
            *_dense(x), *_packed(side),
        ),
        isa,
    )  # fmt: skip
    return bool(done)


def unpack(
    side: PackedSide, first: int, target: Tensor, *, unrotate: bool = True, isa: str = ""
) -> None:
    """Write the tokens of blocks from `first` on into `target`.

    It is ``[batch, kv_heads, 64 * n, width]`` and may be strided, its last dimension contiguous;
    float32, float16 or bfloat16.
    """
    module = _module()
    assert module is not None, "ask `serves_packing` first"
    if not target.numel():
        return
    batch, kv_heads, num_tokens, _ = target.shape
    module.unpack(
        (
            torch.get_num_threads(), batch, kv_heads, first, num_tokens // 64, side.is_keys,
            unrotate, target.data_ptr(), *target.stride()[:3], _FLOATS[target.dtype],
            *_packed(side),
        ),
        isa,
    )  # fmt: skip


def stream_read(address: int, size_bytes: int, threads: int) -> int | None:
    """Read memory from one end to the other and return a checksum: for measuring bandwidth."""
    module = _module()
    return None if module is None else int(module.stream_read(address, size_bytes, threads))


def release_scratch() -> None:
    """Give back the memory that kernels called from this thread keep between calls."""
    module = _module()
    if module is not None:
        module.release_scratch()


def _cut_alike(keys: PackedHalf, values: PackedHalf) -> bool:
    return keys.num_blocks == values.num_blocks and keys.num_skipped == values.num_skipped


def _fits(added: Tensor, scores: tuple[int, int, int, int]) -> bool:
    """Whether a mask or bias can be read beside scores of this shape."""
    if (
        added.dtype not in _ADDED
        or added.ndim != 4
        or added.device.type != "cpu"
        or (added.requires_grad and torch.is_grad_enabled())
    ):
        return False
    return all(size in (1, full) for size, full in zip(added.shape, scores, strict=True))


def _dense(x: Tensor) -> tuple[int, ...]:
    stride = x.stride()
    return x.data_ptr(), stride[0], stride[1], stride[2], _FLOATS[x.dtype]


def _packed(side: PackedSide | None) -> tuple[int, ...]:
    assert side is not None
    blocks, factors, scheme = side.blocks, side.factors, side.scheme
    return (
        blocks.data_ptr(), *blocks.stride()[:3], factors.data_ptr(), *factors.stride(),
        _CODES[scheme.code], _AXES[scheme.axis], scheme.group_size, side.width, scheme.rotated,
    )  # fmt: skip


def _scores(x: Tensor) -> tuple[int, ...]:
    strides = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return (_ADDED[x.dtype], x.data_ptr(), *strides)


def _int32_per_head(x: Tensor, batch: int, kv_heads: int) -> Tensor:
    if x.shape not in ((batch,), (batch, kv_heads)):
        raise CacheError(
            f"lengths or starts of shape {tuple(x.shape)}: expected [{batch}] or "
            f"[{batch}, {kv_heads}]"
        )
    return x.to(torch.int32)


def _per_head(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0), x.stride(1) if x.ndim == 2 else 0
