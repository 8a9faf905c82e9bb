"""llama.cpp's quantized keys and values beside mnemon's: same weights, one decode step, in turns.

    python benchmarks/peers/llama_cpp/compare.py --peer PEER_PYTHON [--contexts 1k,8k,32k]

Runs in mnemon's environment; PEER_PYTHON is the interpreter of the environment that README.md
builds. A random Llama (the 162M shape of `mnemon bench`) is written once, for transformers and as
GGUF, and both sides are checked to predict the same. Then, at each context, all caches hold as many
tokens and take turns at decoding, this process and the peer's one after the other.

Two ratios count, each side against itself: how much slower a step gets from the shortest to the
longest context, and how much slower it is with quantized keys and values than with 16-bit ones.
Writes benchmarks/results/peers_llama_cpp.{json,md}; exits with 3 unless ours is the better
one in every row.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mnemon.cli import bench_run, output
from mnemon.cli.contenders import Contender, contender
from mnemon.cli.environment import environment
from mnemon.errors import RecipeError

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "results"
# What stands beside what: the peer's type of keys and values, our recipe.
PAIRS = (("f16", "dense + attach"), ("q8_0", "int8 + attach"), ("q4_0", "int4 + attach"))
CHECK_TOKENS = 64
SETTLE_S = 0.3  # threads of the side that has just run stop spinning


class Peer:
    """The peer's process."""

    def __init__(self, python: Path, file: Path, capacity: int, threads: int) -> None:
        words = [python, HERE / "worker.py", file]
        words += ["--capacity", capacity, "--threads", threads]
        self._process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: dict[str, str] = self._line()

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def check(model: Any, peer: Peer) -> float:
    """Cosine between the two sides' predictions after the same tokens; ends the run if they differ.

    Raises:
        SystemExit: the two do not hold the same weights.
    """
    ids = bench_run._tokens(model, 1, CHECK_TOKENS)
    with torch.no_grad():
        ours = model(input_ids=ids).logits[0, -1].float()
    theirs = torch.tensor(peer.ask(do="check", tokens=ids[0].tolist()))
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    if cosine < 0.999:
        raise SystemExit(f"the two sides predict differently (cosine {cosine:.4f})")
    return cosine


def measure(model: Any, peer: Peer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of every step, one row per cache and context."""
    rivals: list[Contender] = []
    for _, name in PAIRS if not options.peer_only else ():
        try:
            rivals.append(contender(model, name))
        except RecipeError as error:
            print(f"left out: {name}: {error}")
    room = bench_run.WARM_UP_STEPS + options.rounds * options.steps
    rows = []
    for context in options.contexts:
        print(f"{context:,} tokens", flush=True)
        ids = bench_run._tokens(model, 1, context + room)
        caches = {}
        seconds: dict[str, list[float]] = {}
        for rival in rivals:
            caches[rival.name] = rival.make(context + room)
            with rival.session(model):
                bench_run.fill(model, caches[rival.name], ids, context)
                for i in range(bench_run.WARM_UP_STEPS):
                    bench_run._step(model, caches[rival.name], ids, context + i)
        for kv, _ in PAIRS:
            peer.ask(do="fill", kv=kv, tokens=context)
        for turn in range(options.rounds):
            at = context + bench_run.WARM_UP_STEPS + turn * options.steps
            for rival in rivals if turn % 2 == 0 else rivals[::-1]:
                time.sleep(SETTLE_S)
                with rival.session(model):
                    took = [
                        bench_run._step(model, caches[rival.name], ids, at + i)
                        for i in range(options.steps)
                    ]
                seconds.setdefault(rival.name, []).extend(took)
            for kv, _ in PAIRS if turn % 2 == 0 else PAIRS[::-1]:
                time.sleep(SETTLE_S)
                seconds.setdefault(kv, []).extend(peer.ask(do="steps", kv=kv, count=options.steps))
        for name, took in seconds.items():
            rows.append(
                {
                    "context": context,
                    "side": "mnemon" if name in caches else "llama.cpp",
                    "cache": name,
                    "step_ms": 1e3 * statistics.median(took),
                    "step_ms_min": 1e3 * min(took),
                    "steps_ms": [round(1e3 * value, 3) for value in took],
                }
            )
    return rows


def compare(rows: list[dict[str, Any]], contexts: list[int]) -> list[dict[str, Any]]:
    """The ratios: for each, ours and theirs, and whether ours is the better one."""
    step = {(row["cache"], row["context"]): row["step_ms"] for row in rows}
    found = []

    def add(what: str, theirs: float | None, ours: float | None) -> None:
        better = None if theirs is None or ours is None else ours < theirs
        found.append({"ratio": what, "llama.cpp": theirs, "mnemon": ours, "mnemon_better": better})

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> float | None:
        return step[above] / step[below] if above in step and below in step else None

    first, last = contexts[0], contexts[-1]
    for kv, recipe in PAIRS:
        what = f"{output.format_context(last)} over {output.format_context(first)} tokens"
        add(
            f"{kv} / {recipe}: {what}",
            ratio((kv, last), (kv, first)),
            ratio((recipe, last), (recipe, first)),
        )
    for kv, recipe in PAIRS[1:]:
        for context in contexts:
            add(
                f"{kv} over {PAIRS[0][0]} / {recipe} over {PAIRS[0][1]}: "
                f"{output.format_context(context)} tokens",
                ratio((kv, context), (PAIRS[0][0], context)),
                ratio((recipe, context), (PAIRS[0][1], context)),
            )
    return found


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Decoding beside llama.cpp, the same weights", ""]
    lines += [f"- {name}: {value}" for name, value in found["environment"].items() if value]
    lines += [f"- llama-cpp-python: {found['peer']['version']}; {found['peer']['system']}"]
    lines += [
        f"- weights: {found['weights']} for llama.cpp, bfloat16 for transformers; "
        f"cosine of the predictions {found['cosine']:.6f}",
        f"- {found['rounds']} rounds of {found['steps']} steps, medians",
        "",
        "| keys and values | " + " | ".join(map(output.format_context, found["contexts"])) + " |",
        "|---|" + "---:|" * len(found["contexts"]),
    ]
    step = {(row["cache"], row["context"]): row["step_ms"] for row in found["results"]}
    for side, index in (("llama.cpp", 0), ("mnemon", 1)):
        for pair in PAIRS:
            cells = [
                f"{step[pair[index], context]:.1f} ms" if (pair[index], context) in step else "-"
                for context in found["contexts"]
            ]
            lines.append(f"| {side}, {pair[index]} | {' | '.join(cells)} |")
    lines += ["", "| slowdown (lower is better) | llama.cpp | mnemon |", "|---|---:|---:|"]
    for row in found["ratios"]:
        cells = [
            "-" if row[side] is None else f"{row[side]:.2f}" for side in ("llama.cpp", "mnemon")
        ]
        if row["mnemon_better"] is not None:
            at = 1 if row["mnemon_better"] else 0
            cells[at] = f"**{cells[at]}**"
        lines.append(f"| {row['ratio']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="interpreter with llama_cpp, gguf")
    parser.add_argument("--shape", default="162m")
    parser.add_argument("--contexts", default="1k,8k,32k")
    parser.add_argument("--weights", choices=("bf16", "f16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-only", action="store_true", help="leave mnemon's side out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.contexts = sorted(output.parse_count(word) for word in options.contexts.split(","))
    torch.set_num_threads(options.threads)
    model = bench_run.random_model(options.shape, torch.bfloat16, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.gguf"
        words = [options.peer, HERE / "to_gguf.py", folder, file, "--dtype", options.weights]
        subprocess.run([str(word) for word in words], check=True)
        # Twice the longest context: one is being copied behind the other.
        capacity = 2 * options.contexts[-1] + 1024
        peer = Peer(options.peer, file, capacity, options.threads)
        cosine = check(model, peer)
        rows = measure(model, peer, options)
        peer.close()
    ratios = compare(rows, options.contexts)
    found = {
        "shape": options.shape,
        "weights": options.weights,
        "contexts": options.contexts,
        "rounds": options.rounds,
        "steps": options.steps,
        "cosine": cosine,
        "environment": environment()
        | {"command": "python benchmarks/peers/llama_cpp/compare.py --peer PEER_PYTHON"},
        "peer": peer.about,
        "ratios": ratios,
        "results": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers_llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "peers_llama_cpp.md").write_text(markdown(found))
    print(markdown(found))
    raise SystemExit(0 if all(row["mnemon_better"] for row in ratios) else 3)


if __name__ == "__main__":
    main()
