"""transformers' quantized caches beside mnemon's packed one: decoding speed at one context.

    pip install -r benchmarks/peers/quantized/requirements.txt
    python benchmarks/peers/quantized/compare.py [--context 16k] [--shape 162m]

One process, one model with random weights in bfloat16; all caches hold the same tokens and take
turns (`mnemon bench` does the same for any model and context). Writes
benchmarks/results/peers_quantized.{json,md}; exits with 3 below 15 times the speed of either.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mnemon.cli import bench_report, bench_run, output
from mnemon.cli.contenders import Contender, contender
from mnemon.cli.environment import environment

RESULTS = Path(__file__).parent.parent.parent / "results"
PEERS = ("QuantizedCache quanto-4", "QuantizedCache hqq-4")
CACHES = ("DynamicCache", *PEERS, "dense + attach", "int8 + attach", "int4 + attach")
OURS = "int4 + attach"
AIM = 15.0


def rivals(model: Any, names: list[str]) -> list[Contender]:
    """The caches by name.

    Raises:
        RecipeError: a peer is not installed (see requirements.txt), or a recipe does not work.
    """
    return [contender(model, name) for name in names]


def ratios(found: dict[str, Any]) -> dict[str, float | None]:
    """Our tokens per second over each peer's; None where one of the two failed."""
    speed = {row["cache"]: row["tokens_per_s"] for row in found["results"]}
    ours = speed.get(OURS)
    return {
        peer: ours / speed[peer] if ours and speed.get(peer) else None
        for peer in PEERS
        if peer in speed
    }


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Decoding beside transformers' quantized caches", ""]
    lines += [f"- {name}: {value}" for name, value in found["environment"].items() if value]
    lines += [
        f"- model: {found['model']}, {found['dtype']}, batch {found['batch']}; "
        f"{found['rounds']} rounds of {found['steps']} steps, medians",
        "",
        "| cache | ms per token | tokens/s | stored MiB | held MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found["results"]:
        if row["error"]:
            lines.append(f"| {row['cache']} | {row['error']} | | | |")
            continue
        sizes = [f"{row[key] / 2**20:.1f}" for key in ("stored_bytes", "held_bytes")]
        cells = [f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.1f}", *sizes]
        lines.append(f"| {row['cache']} | {' | '.join(cells)} |")
    lines += ["", f"| {OURS} against | times the tokens/s |", "|---|---:|"]
    for peer, ratio in found["ratios"].items():
        lines.append(f"| {peer} | {'-' if ratio is None else f'{ratio:.1f}'} |")
    return "\n".join([*lines, "", f"Aim: at least {AIM:.0f} times.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", default="16k")
    parser.add_argument("--shape", default="162m")
    parser.add_argument("--cache", action="append", help=f"default: {', '.join(CACHES)}")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = bench_run.random_model(options.shape, torch.bfloat16, "cpu")
    settings = bench_run.Settings(
        contexts=(output.parse_count(options.context),),
        rounds=options.rounds,
        steps=options.steps,
        prefill=False,
        check=False,
    )

    def progress(doing: str, units: int) -> None:
        if doing:
            print(doing, flush=True)

    results = bench_run.measure(
        model, rivals(model, options.cache or list(CACHES)), settings, progress
    )
    where = environment() | {"command": "python benchmarks/peers/quantized/compare.py"}
    name = f"random Llama {options.shape}"
    found = bench_report.record(name, model, settings, results, where)
    found["ratios"] = ratios(found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers_quantized.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "peers_quantized.md").write_text(markdown(found))
    print(markdown(found))
    met = found["ratios"] and all(ratio and ratio >= AIM for ratio in found["ratios"].values())
    raise SystemExit(0 if met else 3)


if __name__ == "__main__":
    main()
