"""Memory and time of a decode step of retrofitted models against the model they came from.

    python benchmarks/retrofit_speed.py --models DIR [--tokens 16k] [--batch 1 --batch 16]

DIR holds the folders that `benchmarks/retrofit.py train` wrote. The prompt is held-out text over
and over, once; its cache is repeated for larger batches. Both sides have native attention
(`mnemon.attach`) and their own `mnemon.Cache`; steps of the two alternate in one process, medians
count. `share` is the speed-up over the measured ratio of bytes (the aim is 60%). The step of an
empty cache shows what is not attention. Writes benchmarks/results/retrofit_speed.{json,md}.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemon
from mnemon.cli.environment import environment
from mnemon.memory import load_retrofitted
from mnemon.zoo import bundled_model_path, corpus

RESULTS = Path(__file__).with_name("results")
EMPTY_TOKENS = 8


def tokens(text: str) -> int:
    """``16k`` as a number."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def held_out_ids(count: int) -> torch.Tensor:
    """Held-out text, again from the beginning where it ends, [1, count]."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    _, documents = corpus.split(corpus.load_documents())
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) >= count:
            break
    return torch.tensor(ids * -(-count // len(ids)))[None, :count]


def step_seconds(sides: list[tuple[Any, Any]], ids: torch.Tensor, steps: int) -> list[float]:
    """Median seconds of a step of each side; they take turns."""
    taken: list[list[float]] = [[] for _ in sides]
    for step in range(steps):
        for side, (model, cache) in enumerate(sides):
            one = ids[:, step % ids.shape[1], None]
            begin = time.perf_counter()
            model(one, past_key_values=cache)
            taken[side].append(time.perf_counter() - begin)
    return [statistics.median(times[3:]) for times in taken]


@torch.inference_mode()
def compare(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One retrofitted model against the plain one, at every batch."""
    dtype = getattr(torch, given.dtype)
    plain = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=dtype)
    packing = load_retrofitted(folder, dtype=dtype)
    sides = []
    ids = held_out_ids(given.tokens)
    for model in (plain, packing):
        mnemon.attach(model)
        cache = mnemon.Cache(model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)
        sides.append((model, cache))
    empty = []
    for model, _ in sides:
        cache = mnemon.Cache(model.config)
        model(ids[:, :EMPTY_TOKENS], past_key_values=cache)
        empty.append((model, cache))
    without = step_seconds(empty, ids, given.steps)
    rows = []
    for batch in given.batch:
        forks = []
        for model, cache in sides:
            fork = cache.fork()
            for layer in fork.layers:
                layer.repeat(batch)
            forks.append((model, fork))
        before = [cache.nbytes for _, cache in forks]
        seconds = step_seconds(forks, ids[:, :64].expand(batch, -1), given.steps)
        ratio, speedup = before[0] / before[1], seconds[0] / seconds[1]
        rows.append(
            {
                "model": folder.name, "tokens": given.tokens, "batch": batch, "dtype": given.dtype,
                "plain_bytes": before[0], "bytes": before[1], "ratio": round(ratio, 3),
                "plain_ms": round(1e3 * seconds[0], 3), "ms": round(1e3 * seconds[1], 3),
                "speedup": round(speedup, 3), "share": round(speedup / ratio, 3),
                "empty_plain_ms": round(1e3 * without[0], 3),
                "empty_ms": round(1e3 * without[1], 3),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        del forks
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["dms-2", "dms-4", "dmc-2", "dmc-4"])
    parser.add_argument("--tokens", type=tokens, default=16384)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    given.batch = given.batch or [1, 4, 16]
    rows: list[dict[str, Any]] = []
    for name in given.only:
        rows += compare(given.models / name, given)
        record = {"environment": environment(), "rows": rows}
        (RESULTS / "retrofit_speed.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "retrofit_speed.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# A decode step of retrofitted models\n",
        "`python benchmarks/retrofit_speed.py --models DIR`; the cache's bytes and a step's time "
        "against those of the plain model, both attached; `share` is speed-up over ratio of bytes; "
        "in brackets a step on an empty cache.\n",
        "| model | tokens | batch | MiB, plain | MiB | ratio | ms, plain | ms | speed-up | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['tokens']:,} | {row['batch']} "
            f"| {row['plain_bytes'] / 2**20:.1f} | {row['bytes'] / 2**20:.1f} "
            f"| {row['ratio']:.2f} | {row['plain_ms']:.2f} ({row['empty_plain_ms']:.2f}) "
            f"| {row['ms']:.2f} ({row['empty_ms']:.2f}) | {row['speedup']:.2f}x "
            f"| {row['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
