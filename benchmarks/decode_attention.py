"""One decode step of one layer: mnemon's attention against what transformers calls, and the floor.

    python benchmarks/decode_attention.py [--quick] [--threads 2] [--seconds 0.5]

Columns, all timed in turns within the same run (median and minimum of each):

    gqa      transformers' "sdpa" function without a mask: what DynamicCache gets (enable_gqa)
    packed   transformers' "sdpa" function with a mask: what StaticCache gets (pack_gqa)
    mnemon   mnemon's function, on the strided view of a buffer with reserve
    mm       candidate: one 2-D product per head (scores rounded to the dtype)
    bmm      candidate: one batched product over the heads
    floor    bytes of keys and values / the bandwidth of a streaming read measured in this run

Writes benchmarks/results/decode_attention.json and .md with date, versions and hardware.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mnemon.hf.attention import attention_forward

RESULTS = Path(__file__).parent / "results"
SHAPES = {"162M: 16 heads / 4 KV / 64": (16, 4, 64), "7B-type: 32 heads / 8 KV / 128": (32, 8, 128)}
LENGTHS = (128, 1024, 4096, 8192, 16384, 32768, 65536)
PATHS = ("gqa", "packed", "mnemon", "mm", "bmm")
COLD_BYTES = 128 * 2**20  # more than a last-level cache holds
RESERVE = 0.25  # share of a buffer that a growing cache keeps free


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in milliseconds."""

    shape: str
    dtype: str
    tokens: int
    size_bytes: int
    median_ms: dict[str, float]
    minimum_ms: dict[str, float]
    floor_ms: float


class Layer(nn.Module):
    """What the functions read of an attention module."""

    is_causal = True

    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


def take_turns(
    functions: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every call, the functions taking turns until ``seconds`` each are used."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def streaming_gb_per_s(seconds: float) -> float:
    """Fastest streaming read of 256 MiB with the threads of this run, GB/s."""
    buffer = torch.ones(64 * 2**20)
    times = take_turns({"read": lambda: buffer.sum()}, seconds)["read"]
    return buffer.nbytes / min(times) / 1e6


def mm_per_head(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Candidate (b): 2-D products on contiguous slices, [kv_heads, group, head_dim]."""
    weights = [
        torch.softmax(torch.mm(q * scale, k.t()), -1, dtype=torch.float32).to(k.dtype)
        for q, k in zip(query, keys, strict=True)
    ]
    return torch.stack([torch.mm(w, v) for w, v in zip(weights, values, strict=True)])


def batched(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Candidate (c): one batched product over the heads, [kv_heads, group, head_dim]."""
    scores = torch.bmm(query * scale, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1, dtype=torch.float32).to(keys.dtype), values)


def measure(label: str, dtype: torch.dtype, num_tokens: int, seconds: float, speed: float) -> Row:
    """One row: the same numbers through every path."""
    num_heads, num_kv_heads, head_dim = SHAPES[label]
    group = num_heads // num_kv_heads
    layer = Layer(group)
    scale = head_dim**-0.5
    capacity = int(num_tokens * (1 + RESERVE))
    query = torch.randn(1, 1, num_heads, head_dim).to(dtype).transpose(1, 2)
    folded = query.reshape(num_kv_heads, group, head_dim)
    mask = torch.ones(1, 1, 1, num_tokens, dtype=torch.bool)
    size_bytes = 2 * num_kv_heads * num_tokens * head_dim * dtype.itemsize

    # A model reads other layers in between, so each call takes the next of several layers: the
    # last-level cache is as cold as it would be, and equally so for every path.
    num_layers = max(1, min(64, COLD_BYTES // size_bytes))
    shape = (1, num_kv_heads, capacity, head_dim)
    strided = [
        [torch.randn(shape).to(dtype)[:, :, :num_tokens] for _ in "kv"] for _ in range(num_layers)
    ]
    whole = [[part.contiguous() for part in layer] for layer in strided]
    turn = {}
    for number, name in enumerate(PATHS):
        layers = whole if name in ("gqa", "packed") else strided
        start = number * num_layers // len(PATHS)  # no path reads what another has just read
        turn[name] = cycle(layers[start:] + layers[:start])

    def transformers_path(name: str, mask: Tensor | None) -> object:
        keys, values = next(turn[name])
        return sdpa_attention_forward(layer, query, keys, values, mask, scaling=scale)

    def mnemon_path() -> object:
        keys, values = next(turn["mnemon"])
        return attention_forward(layer, query, keys, values, None, scaling=scale)

    def candidate(name: str, function: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> object:
        keys, values = next(turn[name])
        return function(folded, keys[0], values[0], scale)

    functions: dict[str, Callable[[], object]] = {
        "gqa": lambda: transformers_path("gqa", None),
        "packed": lambda: transformers_path("packed", mask),
        "mnemon": mnemon_path,
        "mm": lambda: candidate("mm", mm_per_head),
        "bmm": lambda: candidate("bmm", batched),
    }
    times = take_turns(functions, seconds)
    return Row(
        shape=label,
        dtype=str(dtype).removeprefix("torch."),
        tokens=num_tokens,
        size_bytes=size_bytes,
        median_ms={name: statistics.median(values) for name, values in times.items()},
        minimum_ms={name: min(values) for name, values in times.items()},
        floor_ms=size_bytes / speed / 1e6,
    )


def hardware() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or "unknown"


def markdown(record: dict[str, object], rows: list[Row]) -> str:
    """The table, medians with ratios to what transformers calls."""
    lines = ["# One decode step of one layer, attention only", ""]
    lines += [f"- {key}: {value}" for key, value in record.items()]
    for label in SHAPES:
        for dtype in ("bfloat16", "float32"):
            lines += ["", f"## {label}, {dtype} (median ms)", ""]
            lines += [
                f"| tokens | {' | '.join(PATHS)} | floor | gqa/mnemon | packed/mnemon |",
                "|" + "---|" * (len(PATHS) + 4),
            ]
            for row in rows:
                if (row.shape, row.dtype) != (label, dtype):
                    continue
                times = row.median_ms
                cells = [f"{times[name]:.3f}" for name in PATHS]
                ratios = [f"{times[name] / times['mnemon']:.2f}x" for name in ("gqa", "packed")]
                lines.append(
                    f"| {row.tokens:,} | {' | '.join(cells)} | {row.floor_ms:.3f} | "
                    f"{' | '.join(ratios)} |"
                )
    return "\n".join(lines) + "\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="per path and row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    speed = streaming_gb_per_s(1.0)
    rows = []
    for label in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for num_tokens in LENGTHS:
                if arguments.quick and num_tokens > 8192:
                    continue
                rows.append(measure(label, dtype, num_tokens, arguments.seconds, speed))
                times = {name: round(ms, 3) for name, ms in rows[-1].median_ms.items()}
                print(label, rows[-1].dtype, num_tokens, times, f"floor {rows[-1].floor_ms:.3f}")
    record: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": arguments.threads,
        "hardware": hardware(),
        "streaming read": f"{speed:.1f} GB/s",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {**record, "rows": [asdict(row) for row in rows]}
    (arguments.out / "decode_attention.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "decode_attention.md").write_text(markdown(record, rows))


if __name__ == "__main__":
    main()
