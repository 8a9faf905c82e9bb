"""Bits per stored number of each format, and what a decode step takes on top of what is stored.

    python benchmarks/kv_memory.py [--tokens 8k] [--format int4 --format int4/int2]

Bits: packed bytes (codes, scales, offsets, factors, padding) over packed numbers, the dense
residual of the newest tokens apart; `all` counts it too.

Peak of a decode step: a cache holds its tokens, and each step appends one token to every layer and
attends to it; a few steps around each one that packs a block, until the memory of the blocks has
had to grow too, are looked at in two ways, each format in a process of its own, and the largest
step counts:

    torch      what tensors take, from the memory events of torch's profiler: exact, sees neither
               what native kernels allocate by themselves nor mapped buffers
    resident   the peak of the process's resident memory, reset before the step, over what was
               resident: sees everything, in whole pages; freed memory and the kernels' scratch
               are given back first, so that a step that reuses them does not look free. `idle` is
               the same for a step that appends nothing and attends to a few tokens: what Python
               and torch fault in anyway

The peak is `stored + max(torch, resident - idle)`; a step that packs nothing (the median) and the
one that makes memory grow have columns of their own. Writes benchmarks/results/kv_memory.{json,md};
exits with 3 if a format misses its aim.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mnemon
import mnemon.recipe
from mnemon.attention import attend, cpu
from mnemon.cli import output
from mnemon.cli.environment import environment
from mnemon.cli.trial import PeakMemory
from mnemon.formats import BLOCK_TOKENS, PackedTensor

RESULTS = Path(__file__).with_name("results")
FORMATS = ("int8", "int4", "int2", "fp8", "int4/int2")
# Most bits per number, scales included.
AIM_BITS = {"int8": 8.6, "int4": 4.6, "int2": 2.8}
AIM_PEAK = 1.02
CHUNK = 1024
TURNS = 24  # blocks that are packed at most until memory grows
AROUND = 3  # steps before and after the one that packs a block
IDLE_STEPS = 9


class Shape(NamedTuple):
    """A model's layers."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {"162M": Shape(8, 16, 4, 64), "7B-type, 4 layers": Shape(4, 32, 8, 128)}


class Held:
    """A cache of random tokens, and steps on it."""

    def __init__(self, shape: Shape, recipe: str, num_tokens: int) -> None:
        from transformers import LlamaConfig

        self.shape, self.recipe = shape, recipe
        config = LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.heads * shape.head_dim,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        self.cache: Any = mnemon.Cache(config, recipe)
        torch.manual_seed(0)
        # Made once: a step's own new token is the model's, not the cache's.
        self.query = torch.randn(1, shape.heads, 1, shape.head_dim).to(torch.bfloat16)
        self.new = [
            torch.randn(1, shape.kv_heads, 1, shape.head_dim).to(torch.bfloat16) for _ in "kv"
        ]
        self.few = torch.randn(1, shape.kv_heads, 16, shape.head_dim).to(torch.bfloat16)
        for begin in range(0, num_tokens, CHUNK):
            length = min(CHUNK, num_tokens - begin)
            for layer in range(shape.layers):
                size = (1, shape.kv_heads, length, shape.head_dim)
                keys, values = (torch.randn(size).to(torch.bfloat16) for _ in "kv")
                self.cache.update(keys, values, layer)

    def append(self) -> None:
        """One token more in every layer."""
        for layer in range(self.shape.layers):
            self.cache.update(*self.new, layer)

    def approach(self) -> None:
        """Append until a few steps before the next block is packed."""
        packed = mnemon.recipe.parse(self.recipe).packed
        if packed is None:
            return
        while True:
            side = self.cache.layers[0].view()[0]
            tail = side.half.tail.shape[2] if isinstance(side, PackedTensor) else side.shape[2]
            if packed.residual + BLOCK_TOKENS - tail == AROUND + 1:
                return
            self.append()

    def place(self) -> int:
        """Where the first layer's packed keys lie."""
        half = self.cache.layers[0].view()[0].half
        return int(half.side.blocks.data_ptr())

    def append_until_packing(self, times: int) -> None:
        """Append until the step that packs for the `times`-th time is the next one."""
        for turn in range(times):
            self.approach()
            for _ in range(AROUND + (turn + 1 < times)):
                self.append()

    def step(self) -> None:
        """One token more in every layer, and attention over all."""
        for layer in range(self.shape.layers):
            keys, values = self.cache.update(*self.new, layer)
            attend(self.query, keys, values, causal=True)

    def idle(self) -> None:
        """As many calls, on 16 tokens."""
        for _ in range(self.shape.layers):
            attend(self.query, self.few, self.few, causal=True)


def bits(held: Held) -> dict[str, float]:
    """Bits per packed number of keys and values together, and per number of all tokens."""
    packed_bytes = packed_numbers = numbers = 0
    for layer in held.cache.layers:
        for side in layer.view():
            numbers += side.numel()
            half = side.half if isinstance(side, PackedTensor) else None
            if half is not None and half.side is not None:
                packed_bytes += half.side.nbytes
                packed_numbers += side.numel() * half.num_packed // half.num_tokens
    return {
        "bits": 8 * packed_bytes / packed_numbers if packed_numbers else 16.0,
        "bits_all": 8 * held.cache.nbytes / numbers,
        "stored_bytes": held.cache.nbytes,
        "reserved_bytes": held.cache.nbytes_reserved,
    }


def torch_peak(work: Callable[[], None], before: Callable[[], None]) -> int:
    """Most bytes that tensors took at once during `work`, above where they stood.

    The profiler does not count the freeing of what was allocated before it began; so it begins
    early enough, with `before`, to see what `work` frees.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before()
        with record_function("measured"):
            work()
    found = profiler.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in found if e.name() == "measured")
    live = stood = most = 0
    for start, size in sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"):
        live += size
        if start < begin:
            stood = most = live
        else:
            most = max(most, live)
    return most - stood


def resident_peak(work: Callable[[], None]) -> int:
    """How far resident memory rose during `work`."""
    cpu.release_scratch()
    with PeakMemory(torch.device("cpu")) as peak:
        work()
    if peak.bytes is None:
        raise SystemExit("this system does not tell the peak of resident memory")
    return peak.bytes


def measure(name: str, recipe: str, num_tokens: int) -> dict[str, Any]:
    """One format and shape; in a process of its own."""
    with torch.no_grad():
        held = Held(SHAPES[name], recipe, num_tokens)
        found: dict[str, Any] = {"shape": name, "format": recipe, "tokens": num_tokens}
        found |= bits(held)
        for _ in range(AROUND):  # code is loaded, threads exist
            held.step()
            held.idle()
        for _ in range(BLOCK_TOKENS):  # pages behind the newest tokens are there
            held.append()
        idle = sorted(resident_peak(held.idle) for _ in range(IDLE_STEPS))[IDLE_STEPS // 2]
        usual_steps, packing, growing = [], [], 0
        for _ in range(TURNS):
            held.approach()
            place = held.place()
            steps = [resident_peak(held.step) for _ in range(2 * AROUND + 1)]
            usual_steps += steps[:AROUND] + steps[AROUND + 1 :]
            if held.place() == place:
                packing.append(steps[AROUND])
            else:
                growing = steps[AROUND]
                if packing:
                    break
        usual = sorted(usual_steps)[len(usual_steps) // 2]
        resident = max(*usual_steps, *packing, growing)
        held.approach()
        # The step that packs, with the one before it that allocated what it frees.
        # A step that packs a block, after one that did and whose memory it frees.
        profiled = torch_peak(held.step, lambda: held.append_until_packing(2))
        stored = held.cache.nbytes
    extra = max(profiled, resident - idle)
    return found | {
        "step_stored_bytes": stored,
        "step_torch_bytes": profiled,
        "step_resident_bytes": resident,
        "step_idle_bytes": idle,
        "peak_over_stored": (stored + extra) / stored,
        "usual_over_stored": (stored + max(0, usual - idle)) / stored,
        "growing_over_stored": (stored + max(0, growing - idle)) / stored,
    }


def is_met(row: dict[str, Any]) -> bool:
    most = AIM_BITS.get(row["format"])
    return row["peak_over_stored"] <= AIM_PEAK and (most is None or row["bits"] <= most)


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Memory of packed caches", ""]
    lines += [f"- {name}: {value}" for name, value in found["environment"].items() if value]
    lines += [
        f"- {found['tokens']:,} tokens, bfloat16, batch 1",
        "",
        "| shape | format | bits | aim | bits, all | stored MiB | step: torch KiB "
        "| resident KiB | idle KiB | peak over stored | of a step that packs nothing "
        "| that grows |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["results"]:
        aim = AIM_BITS.get(row["format"])
        sizes = [row[f"step_{key}_bytes"] / 1024 for key in ("torch", "resident", "idle")]
        cells = [
            row["shape"],
            row["format"],
            f"{row['bits']:.2f}",
            "-" if aim is None else f"{aim}",
            f"{row['bits_all']:.2f}",
            f"{row['stored_bytes'] / 2**20:.1f}",
            *(f"{size:,.0f}" for size in sizes),
            f"{row['peak_over_stored']:.4f}",
            f"{row['usual_over_stored']:.4f}",
            f"{row['growing_over_stored']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Aim for the peak: at most {AIM_PEAK} of what is stored.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8k")
    parser.add_argument("--format", action="append", help=f"default: {', '.join(FORMATS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "FORMAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_tokens = output.parse_count(options.tokens)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(*options.one, num_tokens)))
        return
    rows = []
    for name in SHAPES:
        for recipe in options.format or FORMATS:
            words = [sys.executable, __file__, *sys.argv[1:], "--one", name, recipe]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, {recipe}: {rows[-1]['bits']:.2f} bits", flush=True)
    found = {
        "tokens": num_tokens,
        "environment": environment() | {"command": "python benchmarks/kv_memory.py"},
        "results": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kv_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "kv_memory.md").write_text(markdown(found))
    print(markdown(found))
    raise SystemExit(0 if all(map(is_met, rows)) else 3)


if __name__ == "__main__":
    main()
