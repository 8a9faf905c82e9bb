"""What `mnemon bench --kernels` measures: attention of one decode step, against the memory's speed.

One layer, one new token per row. Every format holds the same numbers, in buffers like a cache's
own: grown in place, heads far apart, reserve behind them. Before every timed call a quarter of a
gigabyte is read from one end to the other: that empties the last-level cache, as the rest of a
model does between two calls, and it measures what a streaming read costs at that moment, with the
same threads. The formats take turns, and a figure is a median.
"""

from __future__ import annotations

import gc
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FORMATS", "REFERENCE", "Row", "Run", "Settings", "measure", "num_units"]

REFERENCE = "SDPA, enable_gqa"  # what transformers calls for a cache that grows
FORMATS = ("bf16", "fp32", "int8", "int4", "int2", "fp8")
TORCH_PATHS = (REFERENCE, "SDPA, mask", "grouped torch")
DENSE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

READ_BYTES = 256 * 2**20
CHUNK_TOKENS = 4096
TURN_S = 0.03  # a turn repeats a short call until it took this long,
MOST_CALLS = 16  # but not more often than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Args:
        contexts: tokens held.
        formats: of `FORMATS`.
        heads, kv_heads, head_dim: the layer's shape; `heads` is a multiple of `kv_heads`.
        batch: rows.
        rounds: turns that each path takes.
        device: where; "cpu" or an accelerator.
    """

    contexts: tuple[int, ...]
    formats: tuple[str, ...] = FORMATS
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    rounds: int = 4
    device: str = "cpu"


@dataclass(slots=True, kw_only=True)
class Row:
    """One path at one context.

    Attributes:
        context: tokens held.
        path: a format of ours, or one of torch's paths.
        library: "mnemon" or "torch".
        size_bytes: stored keys and values, scales included.
        call_s: seconds of every call.
        difference: of the output to the reference's, relative, in the Euclidean norm.
        error: why it could not run, or "".
    """

    context: int
    path: str
    library: str
    size_bytes: int = 0
    call_s: list[float] = field(default_factory=list)
    difference: float | None = None
    error: str = ""

    @property
    def median_s(self) -> float | None:
        """Median seconds of a call."""
        return statistics.median(self.call_s) if self.call_s else None


class Run(NamedTuple):
    """Everything measured: rows, and bytes per second of every streaming read."""

    rows: list[Row]
    read_speeds: list[float]


class _Path(NamedTuple):
    """Something to time."""

    call: Callable[[], Tensor]
    size_bytes: int


def measure(settings: Settings, progress: Callable[[str, int], None]) -> Run:
    """Measure all paths at all contexts.

    Args:
        settings: what to measure.
        progress: called with what is being done and the units of work just finished.

    Returns:
        One row per context and path, in that order, and the speed of the reads in between.
    """
    import torch

    reader = _Reader(settings.device)
    rows = []
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(3):
            reader.read()  # the first ones fetch memory
        reader.speeds.clear()
        for context in settings.contexts:
            rows += _at(context, settings, reader, progress)
            gc.collect()
    return Run(rows, reader.speeds)


def num_units(settings: Settings) -> int:
    """Units of work that `measure` reports, for a progress bar."""
    num_paths = len(TORCH_PATHS) + len(settings.formats)
    return len(settings.contexts) * num_paths * (1 + settings.rounds)


def _at(
    context: int, settings: Settings, reader: _Reader, progress: Callable[[str, int], None]
) -> list[Row]:
    import torch

    rows = [Row(context=context, path=name, library="torch") for name in TORCH_PATHS]
    rows += [Row(context=context, path=name, library="mnemon") for name in settings.formats]
    dense = _Dense(context, settings)
    generator = torch.Generator().manual_seed(1)
    shape = (settings.batch, 1, settings.heads, settings.head_dim)
    # As a model hands it over: heads and tokens change places after the projection.
    query = torch.randn(shape, generator=generator).to(settings.device, torch.bfloat16)
    query = query.transpose(1, 2)
    paths: dict[str, _Path] = {}
    calls: dict[str, int] = {}
    expected: Tensor | None = None
    for row in rows:
        progress(f"{context:,} tokens: fill {row.path}", 0)
        try:
            path = _path(row.path, query, dense, settings)
            path.call()
            begin = time.perf_counter()
            found = path.call().float()
            reader.wait()
            took = time.perf_counter() - begin
        except Exception as error:  # what one format cannot do does not stop the others
            if row.path == REFERENCE:
                raise
            row.error = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            progress("", 1)
            continue
        expected = found if expected is None else expected
        row.difference = float((found - expected).norm() / expected.norm())
        row.size_bytes = path.size_bytes
        paths[row.path] = path
        calls[row.path] = max(1, min(MOST_CALLS, int(TURN_S / max(took, 1e-9))))
        progress("", 1)
    running = [row for row in rows if not row.error]
    for turn in range(settings.rounds):
        for row in running if turn % 2 == 0 else running[::-1]:
            progress(f"{context:,} tokens: {row.path}", 0)
            call = paths[row.path].call
            for _ in range(calls[row.path]):
                reader.read()
                begin = time.perf_counter()
                call()
                reader.wait()
                row.call_s.append(time.perf_counter() - begin)
            progress("", 1)
    return rows


class _Reader:
    """Reads a large buffer and notes how fast that went."""

    def __init__(self, device: str) -> None:
        import torch

        self.speeds: list[float] = []
        self._on_cpu = torch.device(device).type == "cpu"
        if self._on_cpu:
            mapping = mmap.mmap(-1, READ_BYTES)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._buffer = torch.frombuffer(mapping, dtype=torch.int64).fill_(1)
        else:
            self._buffer = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
            self._target = torch.empty_like(self._buffer)

    def wait(self) -> None:
        """An accelerator runs ahead of Python: a clock is read only once it is idle."""
        if not self._on_cpu:
            import torch

            torch.accelerator.synchronize()

    def read(self) -> None:
        """One pass over the buffer; a copy on an accelerator, where that is the yardstick."""
        self.wait()
        begin = time.perf_counter()
        size_bytes = READ_BYTES
        if self._on_cpu:
            self._stream()
        else:
            self._target.copy_(self._buffer)
            size_bytes *= 2
        self.wait()
        self.speeds.append(size_bytes / (time.perf_counter() - begin))

    def _stream(self) -> None:
        import torch

        from mnemon.attention import cpu

        threads = torch.get_num_threads()
        if not cpu.is_built():
            self._buffer.sum()
        else:
            cpu.stream_read(self._buffer.data_ptr(), READ_BYTES, threads)


class _Dense:
    """The numbers of one context, made again whenever a path needs them."""

    def __init__(self, context: int, settings: Settings) -> None:
        self.context, self.settings = context, settings

    def chunks(self, side: str) -> Iterator[Tensor]:
        """bfloat16 ``[batch, kv_heads, <= 4096, head_dim]``, the same each time."""
        import torch

        settings = self.settings
        for begin in range(0, self.context, CHUNK_TOKENS):
            generator = torch.Generator().manual_seed(2 * begin + (side == "values"))
            length = min(CHUNK_TOKENS, self.context - begin)
            shape = (settings.batch, settings.kv_heads, length, settings.head_dim)
            made = torch.randn(shape, generator=generator)
            yield made.to(settings.device, torch.bfloat16)

    def grown(self, side: str, dtype: torch.dtype) -> Tensor:
        """As a cache that grows in place holds them."""
        from mnemon.layers.storage import TokenBuffer

        buffer = TokenBuffer()
        for chunk in self.chunks(side):
            buffer.append(chunk.to(dtype))
        live = buffer.live()
        assert live is not None
        return live

    def whole(self, side: str) -> Tensor:
        """As `torch.cat` leaves them, and as a static buffer lies."""
        import torch

        return torch.cat(list(self.chunks(side)), dim=2)

    def packed(self, side: str, code: str) -> Tensor:
        """As a packed cache layer hands them to attention."""
        from mnemon.layers.packed_storage import PackedBuffer
        from mnemon.schemes import PackedFormat

        made = PackedFormat.named(code)
        is_keys = side == "keys"
        buffer = PackedBuffer(
            made.keys if is_keys else made.values, is_keys=is_keys, residual=made.residual
        )
        for chunk in self.chunks(side):
            buffer.append(chunk)
        view = buffer.view()
        assert view is not None
        return view


def _path(name: str, query: Tensor, dense: _Dense, settings: Settings) -> _Path:
    """One thing to time, its buffers filled."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from mnemon.attention import attend
    from mnemon.attention.grouped import fused_attention

    if name == REFERENCE:
        keys, values = dense.whole("keys"), dense.whole("values")
        return _Path(lambda: sdpa(query, keys, values, enable_gqa=True), _nbytes(keys, values))
    if name == "SDPA, mask":
        # transformers with a mask, which a static cache needs: the heads of a group become rows.
        keys, values = dense.whole("keys"), dense.whole("values")
        group = settings.heads // settings.kv_heads
        rows = query.reshape(settings.batch, settings.kv_heads, group, settings.head_dim)
        seen = torch.ones(
            settings.batch, 1, 1, dense.context, dtype=torch.bool, device=settings.device
        )

        def masked() -> Tensor:
            return sdpa(rows, keys, values, attn_mask=seen).reshape(query.shape)

        return _Path(masked, _nbytes(keys, values))
    if name == "grouped torch":
        dtype = torch.bfloat16
        keys, values = dense.grown("keys", dtype), dense.grown("values", dtype)
        return _Path(
            lambda: fused_attention(query, keys, values, None, None), _nbytes(keys, values)
        )
    if name in DENSE_DTYPES:
        dtype = getattr(torch, DENSE_DTYPES[name])
        keys, values = dense.grown("keys", dtype), dense.grown("values", dtype)
        row = query.to(dtype)
        return _Path(lambda: attend(row, keys, values, causal=True), _nbytes(keys, values))
    keys, values = dense.packed("keys", name), dense.packed("values", name)
    return _Path(lambda: attend(query, keys, values, causal=True), _nbytes(keys, values))


def _nbytes(*halves: Any) -> int:
    """Bytes that hold these: of the packed data where they are packed."""
    from mnemon.formats import PackedTensor

    return sum(
        half.half.nbytes if isinstance(half, PackedTensor) else half.nbytes for half in halves
    )
