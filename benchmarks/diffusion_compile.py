"""Caching between denoising steps with compiled sublayers: graph breaks, recompilations, speed-up.

    python benchmarks/diffusion_compile.py [PIPE] [--rounds 5] [--out DIR]

Compiles each sublayer of the DiT in place (for methods at the level of stacks: each block) with
inductor, attaches a method with a static schedule, and times runs of DDIM-20 with and without the
cache in turns, eager and compiled. The speed-up is kept if it is the same on both sides. Writes
benchmarks/results/diffusion_compile.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

from mnemon.diffusion import attach, find_sites
from mnemon.diffusion.digits import bundled_path, load_pipeline

RESULTS = Path(__file__).parent / "results"
# Method, and what is compiled for it.
METHODS = (
    ("interval(interval=2)", "sublayers"),
    ("taylor(order=2, interval=2)", "sublayers"),
    ("interval(interval=2, level=stack)", "blocks"),
    ("taylor(order=2, interval=2, level=stack)", "blocks"),
    ("fitted", "blocks"),
)


def run(pipe: Any, images: int) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    pipe(
        class_labels=[i % 10 for i in range(images)],
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return time.perf_counter() - started


def times(pipe: Any, method: str, images: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds without and with the cache, in turns."""
    plain, cached = [], []
    for _ in range(rounds):
        run(pipe, images)  # what is compiled for this arrangement
        plain.append(run(pipe, images))
        with attach(pipe, method):
            run(pipe, images)
            cached.append(run(pipe, images))
    return plain, cached


def measure(given: argparse.Namespace, method: str, level: str) -> dict[str, Any]:
    """One row: eager and compiled, each on a pipeline of its own."""
    if method == "fitted":
        folder = bundled_path() if given.pipe is None else given.pipe
        method = f"fitted(plan={folder / 'plan-20-10.safetensors'})"
    torch._dynamo.reset()
    counters.clear()
    eager = load_pipeline(given.pipe)
    compiled = load_pipeline(given.pipe)
    sites = find_sites(compiled.transformer)
    paths = [s.path for s in (sites.sublayers if level == "sublayers" else sites.blocks)]
    for path in paths:
        compiled.transformer.get_submodule(path).compile()
    row: dict[str, Any] = {
        "method": method.replace(str(given.pipe or bundled_path()), "PIPE"),
        "compiled": level,
    }
    for name, pipe in (("eager", eager), ("inductor", compiled)):
        plain, cached = times(pipe, method, given.images, given.rounds)
        row[f"{name}_plain_s"], row[f"{name}_cached_s"] = map(statistics.median, (plain, cached))
        row[f"{name}_speed_up"] = row[f"{name}_plain_s"] / row[f"{name}_cached_s"]
    row["graph_breaks"] = sum(counters["graph_break"].values())
    row["graphs"] = counters["stats"]["unique_graphs"]
    row["modules"] = len(paths)
    return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipe", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = [measure(given, method, level) for method, level in METHODS]
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/diffusion_compile.py --images {given.images} "
        f"--rounds {given.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "rows": rows,
    }
    headings = ["method", "compiled", "graph breaks", "graphs / modules", "eager", "inductor"]
    table = Table(*headings, title="speed-up of the cache, medians")
    lines = ["| " + " | ".join(headings) + " |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["method"], row["compiled"], str(row["graph_breaks"])]
        cells.append(f"{row['graphs']} / {row['modules']}")
        for name in ("eager", "inductor"):
            plain, cached = row[f"{name}_plain_s"], row[f"{name}_cached_s"]
            cells.append(f"{plain:.2f} s / {cached:.2f} s = {plain / cached:.2f}x")
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "diffusion_compile.json").write_text(json.dumps(record, indent=1) + "\n")
    note = f"{record['date']}, {record['machine']}, torch {record['torch']}, diffusers "
    note += f"{record['diffusers']}; `{record['command']}`; bundled DiT, DDIM-20, guidance 2."
    page = ["# Caches between denoising steps with compiled sublayers", "", note, "", *lines]
    (given.out / "diffusion_compile.md").write_text("\n".join(page) + "\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
