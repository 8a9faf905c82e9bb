"""Decoding from a tier: against the disk's own speed, or on a GPU against that of the bus.

    python benchmarks/offload.py                       # 1 GiB of cache in 512 MiB of memory
    python benchmarks/offload.py --mib 256 --rounds 3 --out results/     # quicker

Disk: a cache twice as large as the memory it is given is filled by hand, then a model decodes.
Bytes read from disk in a step, over its time, are set against the sequential read of a file of as
many bytes in the same directory, past the page cache, the fastest of several sizes and numbers of
threads; both take turns. Records that fit the memory given are not read, and not counted.
On a GPU the host tier is set against copies from pinned memory.
Writes offload.json and offload.md, with date, processor, versions, threads and shapes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mnemon
from mnemon.cli.environment import environment
from mnemon.tiers.segments import SegmentFile, default_directory

LIMIT_DISK, LIMIT_HOST = 0.60, 0.70
READS = ((1 << 20, 2), (4 << 20, 1), (4 << 20, 2), (4 << 20, 4), (16 << 20, 1))
FILLED_AT_ONCE = 4096


def build(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=options.heads * options.head_dim,
        intermediate_size=2 * options.heads * options.head_dim,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, head_dim=options.head_dim,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def fill(cache: mnemon.Cache, model: LlamaForCausalLM, num_tokens: int) -> None:
    """Random keys and values in every layer, as a prompt in chunks would bring them."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    shape = (1, config.num_key_value_heads, FILLED_AT_ONCE, config.head_dim)
    new = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    for start in range(0, num_tokens, FILLED_AT_ONCE):
        piece = new[:, :, : min(FILLED_AT_ONCE, num_tokens - start)]
        for layer in range(config.num_hidden_layers):
            cache.update(piece, piece, layer)


@torch.no_grad()
def step(model: LlamaForCausalLM, cache: mnemon.Cache) -> float:
    """Seconds for one token."""
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    begin = time.perf_counter()
    model(token, past_key_values=cache)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class Reference:
    """A file of the tier's size, read from front to back past the page cache."""

    def __init__(self, directory: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes >> 24 << 24
        self.file = SegmentFile(directory)
        self.file.reserve(self.num_bytes)
        block = mmap.mmap(-1, 16 << 20)
        block.write(os.urandom(16 << 20))
        for offset in range(0, self.num_bytes, 16 << 20):
            self.file.write(offset, memoryview(block))

    def bytes_per_s(self, size: int, threads: int) -> float:
        buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(threads)]
        for buffer in buffers:
            self.file.read(0, buffer)  # pages are there, threads are not yet

        def read(number: int) -> None:
            for offset in range(number * size, self.num_bytes, threads * size):
                self.file.read(offset, buffers[number])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda number: None, range(threads)))
            begin = time.perf_counter()
            list(pool.map(read, range(threads)))
            return self.num_bytes / (time.perf_counter() - begin)


def measure_disk(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """Speed of decoding and of the disk, in turns."""
    model = build(options, torch.device("cpu"))
    one = mnemon.Cache(model.config, recipe.split(" + ")[0])
    fill(one, model, FILLED_AT_ONCE)
    num_tokens = (options.mib << 20) * FILLED_AT_ONCE // one.nbytes
    del one
    memory = options.mib // 2
    cache = mnemon.Cache(
        model.config, f"{recipe} + disk(memory={memory}MiB, path={options.directory})"
    )
    mnemon.attach(model)
    begin = time.perf_counter()
    fill(cache, model, num_tokens)
    filled = time.perf_counter() - begin
    places = cache.nbytes_by_place()
    reference = Reference(options.directory, places["disk"])
    steps: list[float] = []
    disk: dict[str, list[float]] = {}
    step(model, cache)
    for _ in range(options.rounds):
        for size, threads in READS:
            name = f"{size >> 20} MiB x {threads}"
            disk.setdefault(name, []).append(reference.bytes_per_s(size, threads))
        steps += [step(model, cache) for _ in range(options.steps)]
    mnemon.detach(model)
    medians = {name: statistics.median(found) for name, found in disk.items()}
    fastest = max(medians, key=lambda name: medians[name])
    seconds = statistics.median(steps)
    read = places["disk"]
    return {
        "recipe": recipe,
        "tokens": num_tokens,
        "stored_bytes": cache.nbytes,
        "memory_bytes": memory << 20,
        "bytes_by_place": places,
        "segment_tokens": cache.layers[0].segment_tokens,
        "fill_seconds": filled,
        "step_ms": 1e3 * seconds,
        "step_ms_all": [1e3 * found for found in steps],
        "disk_bytes_per_s": read / seconds,
        "cache_bytes_per_s": cache.nbytes / seconds,
        "sequential_bytes_per_s": medians[fastest],
        "sequential_setting": fastest,
        "sequential_all": medians,
        "share": read / seconds / medians[fastest],
    }


def measure_host(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same for the host tier of a model on a GPU."""
    device = torch.device("cuda")
    model = build(options, device)
    cache = mnemon.Cache(model.config, f"{recipe} + host")
    one = mnemon.Cache(model.config, recipe)
    fill(one, model, FILLED_AT_ONCE)
    num_tokens = (options.mib << 20) * FILLED_AT_ONCE // one.nbytes
    del one
    mnemon.attach(model)
    fill(cache, model, num_tokens)
    places = cache.nbytes_by_place()
    source = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    bus, steps = [], []
    for turn in range(options.rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(16):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        speed = 16 * source.numel() / (time.perf_counter() - begin)
        took = [step(model, cache) for _ in range(options.steps)]
        if turn:
            bus.append(speed)
            steps += took
    mnemon.detach(model)
    seconds, speed = statistics.median(steps), statistics.median(bus)
    return {
        "recipe": f"{recipe} + host",
        "tokens": num_tokens,
        "bytes_by_place": places,
        "step_ms": 1e3 * seconds,
        "host_bytes_per_s": places["host"] / seconds,
        "bus_bytes_per_s": speed,
        "share": places["host"] / seconds / speed,
    }


def markdown(found: dict[str, Any]) -> str:
    shape = found["shape"]
    lines = [
        "# Decoding from a tier",
        "",
        f"{shape['layers']} layers, {shape['heads']} heads on {shape['kv_heads']} key heads x "
        f"{shape['head_dim']}, {shape['dtype']}, batch 1, one token per step; medians.",
        "",
        "| recipe | tokens | cache MiB | memory given MiB | on disk MiB | ms per token "
        "| from disk GB/s | disk, sequential GB/s | share | whole cache GB/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["disk"]:
        lines.append(
            f"| {row['recipe']} + disk | {row['tokens']:,} | {row['stored_bytes'] / 2**20:,.0f} "
            f"| {row['memory_bytes'] / 2**20:,.0f} | {row['bytes_by_place']['disk'] / 2**20:,.0f} "
            f"| {row['step_ms']:,.1f} | {row['disk_bytes_per_s'] / 1e9:.2f} "
            f"| {row['sequential_bytes_per_s'] / 1e9:.2f} ({row['sequential_setting']}) "
            f"| {row['share']:.0%} | {row['cache_bytes_per_s'] / 1e9:.2f} |"
        )
    lines.append("")
    if found["host"]:
        lines += [
            "| recipe | tokens | on the host MiB | ms per token | GB/s | bus GB/s | share |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in found["host"]:
            lines.append(
                f"| {row['recipe']} | {row['tokens']:,} "
                f"| {row['bytes_by_place']['host'] / 2**20:,.0f} | {row['step_ms']:,.1f} "
                f"| {row['host_bytes_per_s'] / 1e9:.2f} | {row['bus_bytes_per_s'] / 1e9:.2f} "
                f"| {row['share']:.0%} |"
            )
    else:
        lines.append("No GPU was there: the host tier against the bus was not measured.")
    told = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    lines += [
        "",
        f"Aims: disk at least {LIMIT_DISK:.0%}, host at least {LIMIT_HOST:.0%}.",
        "",
        "; ".join(told) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="of cache; half of it is memory")
    parser.add_argument("--recipes", nargs="+", default=["dense", "int4"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", default=default_directory())
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryFile(dir=options.directory):
        pass  # a wrong directory is told at once
    names = ("layers", "heads", "kv_heads", "head_dim", "dtype", "threads")
    found: dict[str, Any] = {
        "shape": {name: getattr(options, name) for name in names},
        "disk": [measure_disk(recipe, options) for recipe in options.recipes],
        "host": [],
        "environment": environment() | {"command": "python benchmarks/offload.py"},
    }
    if torch.cuda.is_available():
        found["host"] = [measure_host(recipe, options) for recipe in options.recipes]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "offload.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "offload.md").write_text(markdown(found))
    print(markdown(found))
    passed = all(row["share"] >= LIMIT_DISK for row in found["disk"]) and all(
        row["share"] >= LIMIT_HOST for row in found["host"]
    )
    raise SystemExit(0 if passed else 3)


if __name__ == "__main__":
    main()
