"""What one more token costs: time against DynamicCache, and memory while a cache grows.

    python benchmarks/append.py                      # 8k tokens x 8 heads x 128, bfloat16
    python benchmarks/append.py --tokens 2048 --layers 1 --out results/   # quicker

Time: both caches hold the same 8,192 tokens and take turns at appending single tokens to every
layer; medians. Memory: in a fresh process each, a cache grows to the same length, 64 tokens at a
time and one by one at the end; the peak of resident memory above where it stood before is set
against the live bytes at the end.
Writes append.json and append.md, with date, processor, versions and threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig

import mnemon
from mnemon.cli.environment import environment
from mnemon.cli.trial import PeakMemory

BATCH = 1
TURN = 8  # appends in a row, so that the other cache's copy does not make each of them cold
PIECE = 64  # tokens per append while growing to almost the whole length
SINGLE_TOKENS = 128  # and so many at the end one by one
LIMIT_RATIO, LIMIT_PEAK = 100.0, 1.25


def config_for(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        head_dim=options.head_dim,
        hidden_size=options.heads * options.head_dim,
    )


def make(kind: str, options: argparse.Namespace) -> Any:
    config = config_for(options)
    return DynamicCache(config=config) if kind == "DynamicCache" else mnemon.Cache(config)


def tokens(options: argparse.Namespace, length: int) -> torch.Tensor:
    """[batch, heads, length, head_dim]"""
    shape = (BATCH, options.heads, length, options.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def append_once(cache: Any, new: torch.Tensor, num_layers: int) -> float:
    begin = time.perf_counter()
    for layer in range(num_layers):
        cache.update(new, new, layer)
    return (time.perf_counter() - begin) / num_layers


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to append one token to one layer, both caches taking turns."""
    kinds = ("DynamicCache", "mnemon.Cache")
    caches = {kind: make(kind, options) for kind in kinds}
    prompt, new = tokens(options, options.tokens), tokens(options, 1)
    for cache in caches.values():
        for layer in range(options.layers):
            cache.update(prompt, prompt, layer)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.turns + 1):
        for kind in kinds:
            for _ in range(TURN):
                took = append_once(caches[kind], new, options.layers)
                if turn:  # the first turn warms up
                    seconds[kind].append(took)
    same = all(
        torch.equal(theirs.keys, ours.view()[0]) and torch.equal(theirs.values, ours.view()[1])
        for theirs, ours in zip(
            caches["DynamicCache"].layers, caches["mnemon.Cache"].layers, strict=True
        )
    )
    if not same:
        raise SystemExit("the two caches do not hold the same numbers")
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "append_us": {kind: 1e6 * value for kind, value in medians.items()},
        "append_us_min": {kind: 1e6 * min(times) for kind, times in seconds.items()},
        "ratio": medians["DynamicCache"] / medians["mnemon.Cache"],
        "ratio_of_minima": min(seconds["DynamicCache"]) / min(seconds["mnemon.Cache"]),
        "turns": options.turns,
        "appends_per_turn": TURN,
    }


def measure_growth(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory while one cache grows, above where it stood; run in a fresh process."""
    start = options.tokens - SINGLE_TOKENS
    piece, new = tokens(options, PIECE), tokens(options, 1)
    warm = make(kind, options)  # code and thread pools are loaded before memory is read
    for layer in range(options.layers):
        warm.update(piece, piece, layer)
        warm.update(new, new, layer)
    del warm
    with PeakMemory(torch.device("cpu")) as peak:
        cache = make(kind, options)
        # In small pieces: the prompt's own tensors should not count as the cache's memory.
        for _ in range(start // PIECE):
            for layer in range(options.layers):
                cache.update(piece, piece, layer)
        for _ in range(options.tokens - start):
            for layer in range(options.layers):
                cache.update(new, new, layer)
    live = 2 * 2 * BATCH * options.heads * options.head_dim * options.tokens * options.layers
    if peak.bytes is None:
        raise SystemExit("this system does not tell the peak of resident memory")
    return {"live_bytes": live, "peak_bytes": peak.bytes, "peak_over_live": peak.bytes / live}


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    growth = {}
    for kind in ("mnemon.Cache", "DynamicCache"):
        words = [sys.executable, __file__, *options.words, "--growth-of", kind]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        growth[kind] = json.loads(done.stdout)
    return {
        "shape": {
            "tokens": options.tokens,
            "layers": options.layers,
            "key_value_heads": options.heads,
            "head_dim": options.head_dim,
            "dtype": "bfloat16",
            "batch": BATCH,
        },
        "time": measure_time(options),
        "growth": growth,
        "environment": environment() | {"command": "python benchmarks/append.py"},
    }


def markdown(found: dict[str, Any]) -> str:
    shape, times, growth = found["shape"], found["time"], found["growth"]
    lines = [
        "# Appending one token",
        "",
        f"{shape['tokens']:,} tokens x {shape['key_value_heads']} heads x {shape['head_dim']}, "
        f"{shape['dtype']}, {shape['layers']} layers, batch {shape['batch']}.",
        "",
        "| cache | us per token and layer (median) | fastest | peak over live bytes |",
        "|---|---:|---:|---:|",
    ]
    for kind in ("DynamicCache", "mnemon.Cache"):
        lines.append(
            f"| {kind} | {times['append_us'][kind]:,.1f} | {times['append_us_min'][kind]:,.1f} "
            f"| {growth[kind]['peak_over_live']:.2f} |"
        )
    environment = [f"{name}: {value}" for name, value in found["environment"].items() if value]
    lines += [
        "",
        f"Ratio of medians {times['ratio']:,.0f}, of the fastest "
        f"{times['ratio_of_minima']:,.0f} (aim: at least {LIMIT_RATIO:.0f}; memory: at most "
        f"{LIMIT_PEAK} times the live bytes).",
        "",
        "; ".join(environment) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--growth-of", choices=("DynamicCache", "mnemon.Cache"))
    options = parser.parse_args()
    options.words = sys.argv[1:]
    torch.set_num_threads(options.threads)
    if options.growth_of:
        print(json.dumps(measure_growth(options.growth_of, options)))
        return
    found = measure_all(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "append.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "append.md").write_text(markdown(found))
    print(markdown(found))
    passed = (
        found["time"]["ratio"] >= LIMIT_RATIO
        and found["growth"]["mnemon.Cache"]["peak_over_live"] <= LIMIT_PEAK
    )
    raise SystemExit(0 if passed else 3)


if __name__ == "__main__":
    main()
