"""One decode step of one layer on a GPU: mnemon's kernels, torch's SDPA, and a copy's bandwidth.

    python benchmarks/gpu_decode.py [--quick] [--tokens 131072] [--batch 8] [--seconds 0.5]

Every path reads the same numbers, all in one run: dense bfloat16 and the packed formats by mnemon's
kernels, and each SDPA backend that takes the shape (keys read once per query head group with
``enable_gqa``, and with the heads of a group folded as rows). Times are medians of CUDA events over
calls in turns, each call reading more than the last-level cache holds. The bandwidth is that of a
device-to-device copy, bytes read and written, measured in the same run.

Without CUDA it says so and writes nothing. Otherwise: benchmarks/results/gpu_decode.{json,md}.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mnemon.attention.triton import decode, pack_blocks
from mnemon.formats import PackedHalf, PackedSide, Scheme

RESULTS = Path(__file__).parent / "results"
HEADS, KV_HEADS, WIDTH = 32, 8, 128
LENGTHS = (1024, 8192, 32768, 131072)
TAIL = 64
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Keys / values of a format as the kernels like them: per-token groups of 64, keys rotated.
FORMATS = {
    "int8": ("int8", "int8"),
    "int4": ("int4", "int4"),
    "int2": ("int2", "int2"),
    "fp8": ("fp8", "fp8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One path at one length."""

    tokens: int
    batch: int
    path: str
    size_bytes: int
    median_ms: float
    minimum_ms: float
    error: float

    @property
    def gb_per_s(self) -> float:
        return self.size_bytes / self.median_ms / 1e6


def event_ms(function: Callable[[], object]) -> float:
    """Milliseconds on the device of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(
    functions: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns, until ``seconds`` each are used."""
    for function in functions.values():
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, function in functions.items():
            times[name].append(event_ms(function))
    return times


def copy_gb_per_s(seconds: float) -> float:
    """Bytes read and written per second by a copy of 4 GiB (less where memory is short)."""
    size = min(4 * 2**30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, seconds)["copy"]
    return 2 * size / statistics.median(times) / 1e6


def packed(dense: Tensor, code: str, is_keys: bool) -> PackedHalf:
    """All but a tail in blocks, a stretch of tokens at a time."""
    scheme = Scheme(code=code, axis="token", group_size=64, rotated=is_keys)
    body = dense.shape[2] - TAIL
    parts = [
        pack_blocks(dense[:, :, start : min(start + 8192, body)], scheme, is_keys)
        for start in range(0, body, 8192)
    ]
    side = PackedSide(
        blocks=torch.cat([blocks for blocks, _ in parts], dim=2),
        factors=torch.cat([factors for _, factors in parts], dim=2),
        scheme=scheme,
        width=dense.shape[-1],
        is_keys=is_keys,
    )
    return PackedHalf(side=side, tail=dense[:, :, body:].contiguous())


def sdpa_paths(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every way to ask SDPA that this device and shape allow."""
    rows = query.reshape(query.shape[0], KV_HEADS, HEADS // KV_HEADS, WIDTH)

    def call(backend: SDPBackend, folded: bool) -> Tensor:
        with sdpa_kernel(backend):
            if folded:
                return F.scaled_dot_product_attention(rows, keys, values).reshape(query.shape)
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    found: dict[str, Callable[[], Tensor]] = {}
    for name, backend in BACKENDS.items():
        for folded in (False, True):
            if name == "math" and not folded:
                continue  # repeats the keys: memory for every query head

            def path(backend: SDPBackend = backend, folded: bool = folded) -> Tensor:
                return call(backend, folded)

            try:
                path()
            except (RuntimeError, torch.cuda.OutOfMemoryError):
                continue
            found[f"sdpa {name}{' folded' if folded else ''}"] = path
    return found


def measure(tokens: int, batch: int, seconds: float) -> list[Row]:
    """Every path at one length; errors against SDPA's math in float32 on the first sequence."""
    shape = (batch, KV_HEADS, tokens, WIDTH)
    query = torch.randn(batch, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    halves = {
        name: (packed(keys, first, True), packed(values, second, False))
        for name, (first, second) in FORMATS.items()
    }
    functions = sdpa_paths(query, keys, values)
    sizes = dict.fromkeys(functions, keys.nbytes + values.nbytes)
    functions["mnemon dense"] = lambda: decode(query, keys, values)
    sizes["mnemon dense"] = keys.nbytes + values.nbytes
    for name, (key_half, value_half) in halves.items():

        def path(key_half: PackedHalf = key_half, value_half: PackedHalf = value_half) -> object:
            return decode(query, key_half, value_half)

        functions[f"mnemon {name}"] = path
        sizes[f"mnemon {name}"] = key_half.nbytes + value_half.nbytes

    rows = query[:1].float().reshape(1, KV_HEADS, HEADS // KV_HEADS, WIDTH)
    expected = {}
    for name in functions:
        pair = halves.get(name.removeprefix("mnemon "))
        numbers = (
            (keys[:1], values[:1])
            if pair is None
            else tuple(
                PackedHalf(
                    side=PackedSide(
                        blocks=half.side.blocks[:1], factors=half.side.factors[:1],
                        scheme=half.side.scheme, width=WIDTH, is_keys=half.side.is_keys,
                    ),
                    tail=half.tail[:1].float(),
                ).dense()
                for half in pair
                if half.side is not None
            )
        )  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(rows, *(x.float() for x in numbers))
        expected[name] = out.reshape(1, HEADS, 1, WIDTH)
    errors = {}
    for name, function in functions.items():
        got = function()
        assert isinstance(got, Tensor)
        errors[name] = float((got[:1].float() - expected[name]).norm() / expected[name].norm())
    times = take_turns(functions, seconds)
    return [
        Row(
            tokens=tokens, batch=batch, path=name, size_bytes=sizes[name],
            median_ms=statistics.median(times[name]), minimum_ms=min(times[name]),
            error=errors[name],
        )
        for name in functions
    ]  # fmt: skip


def markdown(record: dict[str, object], rows: list[Row], copied: float) -> str:
    """The table: share of the copy's bandwidth, and speed against the best SDPA backend."""
    lines = ["# One decode step of one layer on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in record.items()]
    for tokens in sorted({row.tokens for row in rows}):
        own = [row for row in rows if row.tokens == tokens]
        best = min((row.median_ms for row in own if row.path.startswith("sdpa")), default=None)
        lines += ["", f"## {tokens:,} tokens x {own[0].batch} sequences", ""]
        lines += [
            "| path | median ms | GB | GB/s | share of copy | speed / best SDPA | rel. error |",
            "|" + "---|" * 7,
        ]
        for row in own:
            ratio = "" if best is None else f"{best / row.median_ms:.2f}x"
            lines.append(
                f"| {row.path} | {row.median_ms:.3f} | {row.size_bytes / 1e9:.3f} | "
                f"{row.gb_per_s:.0f} | {row.gb_per_s / copied:.0%} | {ratio} | {row.error:.1e} |"
            )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens only")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="per path and length")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured, nothing was written.")
        return
    import triton

    torch.manual_seed(0)
    copied = copy_gb_per_s(arguments.seconds)
    record: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "shape": f"{HEADS} heads / {KV_HEADS} KV / {WIDTH}, bfloat16, batch {arguments.batch}",
        "packed": f"groups of 64, keys rotated, a dense tail of {TAIL} tokens",
        "copy": f"{copied:.0f} GB/s read and written",
    }
    rows = []
    for tokens in arguments.tokens:
        if arguments.quick and tokens > 8192:
            continue
        rows += measure(tokens, arguments.batch, arguments.seconds)
        torch.cuda.empty_cache()
    text = markdown(record, rows, copied)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {**record, "copy_gb_per_s": copied, "rows": [asdict(row) for row in rows]}
    (arguments.out / "gpu_decode.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "gpu_decode.md").write_text(text)


if __name__ == "__main__":
    main()
