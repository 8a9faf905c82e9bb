"""Exporting tiny models with a cache of free length: mnemon's export beside its peers.

    python benchmarks/peers/export/compare.py --onnx-diagnostic PYTHON --optimum PYTHON

Runs in mnemon's environment; PYTHON is the interpreter of the environment that README.md builds for
a peer. Every (peer, model) is exported and run in a process of its own with a time limit, so that a
crash is a result. Each export answers a grid of batch x past x query that it has not seen and is
compared with the model itself, of the peer's own transformers. Writes
benchmarks/results/peers_export.{json,md}; what was measured earlier and is left out by --only or
--models is kept from there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import MODELS, SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_QUERY, SOURCE, TOLERANCE, WINDOW, grid

from mnemon.cli.environment import environment

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "results"
COMMAND = "python benchmarks/peers/export/compare.py --onnx-diagnostic PYTHON --optimum PYTHON"

# Name of the row: whose environment, script, way.
CONTESTANTS = {
    "mnemon, program": ("mnemon", "with_mnemon.py", "program"),
    "mnemon, onnx": ("mnemon", "with_mnemon.py", "onnx"),
    "mnemon, aoti": ("mnemon", "with_mnemon.py", "aoti"),
    "transformers.exporters, program": ("mnemon", "with_transformers.py", "program"),
    "transformers.exporters, onnx": ("mnemon", "with_transformers.py", "onnx"),
    "transformers.exporters, program for generation": (
        "mnemon",
        "with_transformers.py",
        "program-generation",
    ),
    "transformers.exporters, onnx for generation": (
        "mnemon",
        "with_transformers.py",
        "onnx-generation",
    ),
    "onnx-diagnostic, program": ("onnx-diagnostic", "with_onnx_diagnostic.py", "program"),
    "optimum-onnx": ("optimum", "with_optimum.py", "onnx"),
}


def rows(python: Path, script: str, way: str, models: list[str], limit_s: float) -> Iterator[Any]:
    """What a peer's script says of each model, as it is done; an error where it cannot start."""
    words = [python, HERE / script, way, *models, "--limit", limit_s]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    left = dict.fromkeys(models)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("@{"):
                row = json.loads(line[1:])
                left.pop(row["model"])
                yield row
        code = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    for model in left:
        failed = {"exported": False, "seconds": None, "notes": "", "shapes": []}
        why = f"exit code {code}: {last}"[:200]
        yield {"model": model, "error": why, "of": len(grid(model))} | failed


def counts(row: dict[str, Any]) -> tuple[int, int, int]:
    """Right, wrong and refused shapes; all are refused where nothing was exported."""
    found = [shape["status"] for shape in row["shapes"]]
    right, wrong = found.count("right"), found.count("wrong")
    return right, wrong, row["of"] - right - wrong


def cell(row: dict[str, Any]) -> str:
    if not row["exported"]:
        return "no export"
    right, wrong, refused = counts(row)
    return f"{right} / {wrong} / {refused}"


def markdown(found: dict[str, Any]) -> str:
    names = [name for name in CONTESTANTS if name in found["results"]]
    models = [model for model in MODELS if any(model in found["results"][name] for name in names)]
    lines = ["# Exports with a cache of free length, beside their peers", ""]
    lines += [f"- {name}: {value}" for name, value in found["environment"].items() if value]
    lines += [
        f"- shapes: batch 1, 2, 3 x past 0, 1, 7 (14 too for the models with a window of {WINDOW}) "
        f"x query 1, 3; first row padded on the left (encoder-decoder models: the first source "
        f"row of {SOURCE} tokens, at its end)",
        f"- samples, where a peer takes them: batch {SAMPLE_BATCH}, past {SAMPLE_PAST}, query "
        f"{SAMPLE_QUERY}, a mask of ones",
        f"- right: the logits at unpadded positions differ by at most {TOLERANCE:g} of "
        f"max(1, |reference|) from the model itself in the same environment, float32, CPU",
        "- wrong: other numbers without an error; refused: an error, or a process that died",
        "",
        "## In total",
        "",
        "| peer | models exported | right | wrong | refused | of | seconds per export, median |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        each = found["results"][name].values()
        sums = [sum(column) for column in zip(*(counts(row) for row in each), strict=True)]
        took = sorted(row["seconds"] for row in each if row["seconds"] is not None)
        median = f"{took[len(took) // 2]:.1f}" if took else "-"
        exported = f"{sum(row['exported'] for row in each)} of {len(each)}"
        whole = sum(row["of"] for row in each)
        lines.append(f"| {name} | {exported} | {' | '.join(map(str, sums))} | {whole} | {median} |")
    lines += ["", "Models that were not exported count with all their shapes as refused.", ""]
    lines += ["## By model: right / wrong / refused", ""]
    lines += [f"| peer | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for name in names:
        models_of = found["results"][name]
        cells = [cell(models_of[model]) if model in models_of else "-" for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Seconds of the export", ""]
    lines += [f"| peer | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for name in names:
        models_of = found["results"][name]
        took = [models_of.get(model, {}).get("seconds") for model in models]
        cells = ["-" if one is None else f"{one:.1f}" for one in took]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## What was given, what went wrong", ""]
    for name in names:
        models_of = found["results"][name]
        facts = next(iter(models_of.values()))
        used = ", ".join(f"{one} {version}" for one, version in facts.get("versions", {}).items())
        notes = sorted({row["notes"] for row in models_of.values() if row["notes"]})
        lines += [f"### {name}", "", f"- {used}", *(f"- {note}" for note in notes)]
        for model in models:
            if model in models_of:
                lines += troubles(model, models_of[model])
        lines.append("")
    return "\n".join(lines)


def troubles(model: str, row: dict[str, Any]) -> list[str]:
    """A line for a failed export, or for every reason why shapes are not right."""
    if not row["exported"]:
        return [f"- {model}: no export: `{plain(row['error'])}`"]
    reasons: dict[str, list[str]] = {}
    for shape in row["shapes"]:
        if shape["status"] == "refused":
            reasons.setdefault(f"refused: `{plain(shape['why'])}`", []).append(shape["shape"])
        elif shape["status"] == "wrong":
            reasons.setdefault("wrong", []).append(shape["shape"])
    lines = []
    for reason, shapes in reasons.items():
        others = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        lines.append(f"- {model}: {shapes[0]}{others}: {reason}")
    return lines


def plain(text: str) -> str:
    return text.replace("`", "'").replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx-diagnostic", type=Path, help="interpreter of its environment")
    parser.add_argument("--optimum", type=Path, help="interpreter of its environment")
    parser.add_argument("--only", action="append", help="rows whose names begin so; default: all")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one process")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    pythons = {
        "mnemon": Path(sys.executable),
        "onnx-diagnostic": options.onnx_diagnostic,
        "optimum": options.optimum,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "peers_export.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, Any] = earlier.get("results", {})
    lock = threading.Lock()

    def write() -> dict[str, Any]:
        # The reference and mnemon share this environment; the peers' versions stand by their rows.
        found = {"environment": environment() | {"command": COMMAND}, "results": results}
        found["environment"]["torch_threads"] = 1
        file.write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "peers_export.md").write_text(markdown(found))
        return found

    def work(name: str) -> None:
        peer, script, way = CONTESTANTS[name]
        for row in rows(pythons[peer], script, way, options.models.split(","), options.limit):
            with lock:
                held = results.setdefault(name, {})
                held[row["model"]] = row
                results[name] = {each: held[each] for each in MODELS if each in held}
                write()
                print(f"{name}, {row['model']}: {row['error'] or cell(row)}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(work, name)
            for name, (peer, _, _) in CONTESTANTS.items()
            if pythons[peer] is not None
            if not options.only or any(name.startswith(start) for start in options.only)
        ]
        for each in waiting:
            each.result()
    print(markdown(write()))


if __name__ == "__main__":
    main()
