"""Exports against eager: which architectures work on which target, and what a step costs.

    python benchmarks/export.py [--only models | --only steps] [--to onnx ...] [--model llama ...]

`models`: tiny random models of twelve architectures (`--model` takes any of the equality matrix),
exported to every target and compared with the model on a grid of shapes, then 64 greedy tokens of a
padded batch of 3 compared with `generate`.
`steps`: one decode step of the bundled model at several lengths, eager against the exports, in
turns in one process; medians. Writes benchmarks/results/export.{json,md}; exits with 3 if a number
is wrong or a step misses its aim.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import mnemon
import mnemon.export
from mnemon.cli.environment import environment
from mnemon.cli.models import load_model
from mnemon.errors import MnemonError
from mnemon.export.targets import TARGETS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.export.tiny import MAKERS, build
from tests.matrix.architectures import rows

RESULTS = Path(__file__).with_name("results")
AIM = 2.0
CONTEXTS = (32, 128, 512)
ROUNDS, STEPS = 6, 20


def models(
    names: list[str], targets: list[str], rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """One row per architecture and target, added to `rows` and saved as it comes."""
    for name in names:
        for to in targets:
            begin = time.perf_counter()
            row: dict[str, Any] = {"model": name, "to": to}
            try:
                row |= _works(name, to)
            except MnemonError as error:
                row |= {"status": "no", "reason": str(error).splitlines()[0][:200]}
            row["seconds"] = round(time.perf_counter() - begin, 1)
            rows[:] = [one for one in rows if (one["model"], one["to"]) != (name, to)] + [row]
            save()
            print(json.dumps(row), flush=True)


def _build(name: str) -> Any:
    """A tiny model of `tests.export`, or of the equality matrix."""
    if name in MAKERS:
        return build(name)
    torch.manual_seed(0)
    model = rows()[name].build()[0].eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _works(name: str, to: str) -> dict[str, Any]:
    model = _build(name)
    exported = mnemon.export_model(model, to=to)
    most = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(3, min(100, most), (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    if model.config.is_encoder_decoder:
        mask = mask.flip(1)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    same = torch.equal(exported.runner().generate(ids, mask, 64), expected)
    report = exported.report
    return {
        "status": "works" if same and not report.refused else "partly",
        "shapes": len(report.verdicts),
        "right": report.num_right,
        "refused": [str(one.case) for one in report.refused],
        "largest_difference": report.largest_difference,
        "same_64_tokens": same,
    }


def steps(targets: list[str]) -> list[dict[str, Any]]:
    """One row per length and path."""
    loaded = load_model(None, dtype="float32", device="cpu")
    model = loaded.model.eval()
    exports = {to: mnemon.export_model(model, to=to) for to in targets}
    rows = []
    for context in CONTEXTS:
        ids = torch.randint(3, 1000, (1, context))
        paths: dict[str, Callable[[], Any]] = {"eager, DynamicCache": _eager(model, ids)}
        for to, exported in exports.items():
            paths[to] = _exported(exported, ids)
        times: dict[str, list[float]] = {name: [] for name in paths}
        for turn in range(ROUNDS):
            for name in list(paths) if turn % 2 == 0 else list(paths)[::-1]:
                for _ in range(STEPS):
                    begin = time.perf_counter()
                    paths[name]()
                    times[name].append(time.perf_counter() - begin)
        base = statistics.median(times["eager, DynamicCache"])
        for name, taken in times.items():
            middle = statistics.median(taken)
            rows.append({"context": context, "path": name, "ms": 1e3 * middle, "x": base / middle})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _eager(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    mask = torch.ones((1, ids.shape[1] + 1), dtype=torch.int64)
    new = ids[:, :1]
    with torch.no_grad():
        model(ids, past_key_values=cache)

    def step() -> Any:
        with torch.no_grad():
            logits = model(new, attention_mask=mask, past_key_values=cache).logits
            chosen = logits[:, -1].argmax(-1)
        cache.crop(-1)
        return chosen

    return step


def _exported(exported: mnemon.export.Exported, ids: torch.Tensor) -> Callable[[], Any]:
    session = exported.sessions["decoder"]
    empty = exported.form.empty(1, exported.dtype, "cpu")
    _, *past = exported.step(ids, torch.ones_like(ids), empty)
    mask = torch.ones((1, ids.shape[1] + 1), dtype=torch.int64)
    new = ids[:, :1]

    def step() -> Any:
        logits, *_ = exported.step(new, mask, past)
        return session.tensor(logits)[:, -1].argmax(-1)

    return step


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# Exports against eager", ""]
    lines += [f"- {name}: {value}" for name, value in found["environment"].items() if value]
    if found["models"]:
        lines += [
            "",
            "Tiny random models, float32: shapes that give the model's numbers, of those tried; "
            "the largest difference of logits and cache; whether 64 greedy tokens of a padded "
            "batch of 3 are `generate`'s.",
            "",
            "| model | target | works | shapes right | largest difference | 64 tokens | seconds |",
            "|---|---|---|---:|---:|---|---:|",
        ]
        for row in found["models"]:
            if row["status"] == "no":
                lines.append(
                    f"| {row['model']} | {row['to']} | no: {row['reason']} | | | | "
                    f"{row['seconds']} |"
                )
                continue
            lines.append(
                f"| {row['model']} | {row['to']} | {row['status']} | {row['right']} of "
                f"{row['shapes']} | {row['largest_difference']:.1e} | "
                f"{'same' if row['same_64_tokens'] else 'OTHERS'} | {row['seconds']} |"
            )
    if found["steps"]:
        lines += [
            "",
            "One decode step of the bundled model, float32, batch 1; the token chosen included; "
            f"medians of {ROUNDS * STEPS}, paths in turns.",
            "",
            "| tokens held | path | ms | times eager's speed |",
            "|---:|---|---:|---:|",
        ]
        lines += [
            f"| {row['context']} | {row['path']} | {row['ms']:.2f} | {row['x']:.2f} |"
            for row in found["steps"]
        ]
        lines += ["", f"Aim: at least {AIM:g} times for onnx and aoti."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("models", "steps"))
    parser.add_argument("--to", action="append", choices=TARGETS)
    parser.add_argument("--model", action="append", choices=[*MAKERS, *rows()], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    targets = options.to or list(TARGETS)
    target = options.out / "export.json"
    found: dict[str, Any] = {"models": [], "steps": []}
    if target.is_file():  # what is not measured now stays as it was recorded
        found |= {key: json.loads(target.read_text())[key] for key in found}
    found["environment"] = environment() | {"command": "python benchmarks/export.py"}
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        target.write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "export.md").write_text(markdown(found))

    if options.only != "steps":
        if not (options.model or options.to):
            found["models"] = []
        models(options.model or list(MAKERS), targets, found["models"], save)
    if options.only != "models":
        found["steps"] = steps(targets)
    save()
    print(markdown(found))
    wrong = any(row["status"] != "works" for row in found["models"])
    slow = any(row["x"] < AIM for row in found["steps"] if row["path"] in ("onnx", "aoti"))
    raise SystemExit(3 if wrong or slow else 0)


if __name__ == "__main__":
    main()
