"""Retrofitted models against policies that need no training, at equal measured bytes.

    python benchmarks/retrofit.py train --out DIR [--steps 120] [--only dms-4 ...]
    python benchmarks/retrofit.py eval --models DIR [--out benchmarks/results]

`train` retrofits the bundled model by DMC, DMS and DMS with immediate eviction at ratios 2 and 4,
and trains a control as long without compression: one folder each. A run that was interrupted goes
on at its last checkpoint, one that ended is not repeated.

`eval` measures all of them, the plain model, and policies whose bytes are brought to those of DMS,
through the sequential cache; see `retrofit_eval.py`. Writes retrofit.json, .md and .png.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemon.memory.retrofitting import (
    Progress,
    RetrofitOptions,
    Retrofitter,
    calibrate,
    measure,
    save_retrofitted,
)
from mnemon.memory.retrofitting.data import bundled_rows
from mnemon.memory.retrofitting.retrofit import calibration_rows, run_with_checkpoints
from mnemon.zoo import bundled_model_path

RUNS: dict[str, dict[str, Any]] = {
    "dms-4": {"method": "dms", "ratio": 4, "window": 32},
    "dmc-4": {"method": "dmc", "ratio": 4, "factor": 3.0, "pressure": 5.0},
    "dms0-4": {"method": "dms", "ratio": 4, "window": 0, "pressure": 5.0},
    "control": {"method": "none", "ratio": 1},
    "dms-2": {"method": "dms", "ratio": 2, "window": 32},
    "dmc-2": {"method": "dmc", "ratio": 2, "factor": 3.0, "pressure": 5.0},
    "dms0-2": {"method": "dms", "ratio": 2, "window": 0, "pressure": 5.0},
}
COMMON: dict[str, Any] = {"length": 1024, "batch": 2, "rate": 5e-4, "decision_rate": 1e-4}
DONE = "retrofit.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--steps", type=int, default=120)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    train.set_defaults(command=train_all)
    measured = commands.add_parser("eval")
    measured.add_argument("--models", type=Path, required=True)
    measured.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    measured.add_argument("--samples", type=int, default=12)
    measured.add_argument("--windows", type=int, default=4)
    measured.set_defaults(command=evaluate)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.command(given)


def train_all(given: argparse.Namespace) -> None:
    for name in given.only:
        folder: Path = given.out / name
        if (folder / DONE).exists():
            print(f"{name}: there", flush=True)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        one_run(name, folder, steps=given.steps, seed=given.seed)


def one_run(name: str, folder: Path, *, steps: int, seed: int) -> None:
    """Trains one model, or goes on, and writes it."""
    started = time.monotonic()
    options = RetrofitOptions(**COMMON, **RUNS[name], steps=steps, seed=seed)
    plain = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    rows = bundled_rows(tokenizer, options)
    trainer = Retrofitter(model, rows, options)
    log = folder / "log.jsonl"

    def note(progress: Progress) -> None:
        with log.open("a") as file:
            file.write(json.dumps(progress._asdict() | {"s": time.monotonic() - started}) + "\n")
        if progress.step % 10 == 0:
            print(
                f"{name}: step {progress.step} of {steps}, loss {progress.loss:.4f}, ratio "
                f"{progress.measured:.2f} of {progress.ratio:.2f}",
                flush=True,
            )

    checkpoint = folder / "checkpoint.pt"
    run_with_checkpoints(
        trainer, checkpoint, resume=checkpoint.exists(), every_s=60, after_step=note
    )
    trained_s = time.monotonic() - started
    facts: dict[str, Any] = {"steps": steps, "tokens": trainer.num_tokens, "seed": seed}
    facts |= RUNS[name] | COMMON
    if trainer.control is None:
        model.save_pretrained(folder)
    else:
        judged = calibration_rows(rows, options, model, tokenizer, own=True)
        facts["before_calibration"] = measure(model, judged).ratio
        found = calibrate(model, judged, float(options.ratio))
        facts["calibrated"] = found.ratio
        facts["by_head"] = found.by_head
        facts["offset"] = trainer.control.compression.offset
        save_retrofitted(model, folder, facts=facts)
    tokenizer.save_pretrained(folder)
    facts["minutes"] = round(trained_s / 60, 1)
    temporary = folder / f"{DONE}.tmp"
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(temporary, folder / DONE)
    print(f"{name}: {json.dumps(facts)}", flush=True)


def evaluate(given: argparse.Namespace) -> None:
    from retrofit_eval import evaluate_all

    evaluate_all(given.models, given.out, samples=given.samples, num_windows=given.windows)


if __name__ == "__main__":
    main()
