"""What packed formats cost in quality: on the bundled model, and on keys with planted outliers.

    python benchmarks/quality.py [--windows 12] [--samples 34] [--skip-variants] [--out DIR]

Writes benchmarks/results/quality.json and .md. Three measures, all through the cache as it is used:

    bits/byte   held-out text in windows of 2,048 tokens, 64 tokens per forward, so that a token
                reads packed keys and values wherever it looks further back than the residual
    recall      the needle task, fed in chunks of 64 tokens, answers decoded one by one
    planted     attention over random keys of which 4 of 128 dimensions are outliers: relative
                error of the output, for outliers of a constant offset and for outliers of a wide
                spread

Variants of a format (axis of the groups, rotation, size of the groups) are measured on the first
and the last; formats as they are by default, and what transformers' QuantizedCache makes of quanto
and hqq at the same bits, on all.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import mnemon
from mnemon.attention.reference import attention
from mnemon.formats import PackedSide, quantize_blocks
from mnemon.recipe import parse
from mnemon.schemes import CODES, Scheme
from mnemon.zoo import bundled_model_path
from mnemon.zoo.prompts import PromptMaker
from mnemon.zoo.recall import held_out_filler

RESULTS = Path(__file__).parent / "results"
CONTEXT, CHUNK, BATCH = 2048, 64, 6
DISTANCES = (512, 1024, 2048)
FORMATS = ("int8", "fp8", "int4", "int4/int2", "int2")
TARGETS = {"int8": 0.1, "int4": 1.0, "int2": 5.0}  # percent of bits/byte
MakeCache = Callable[[Any], Any]


class Contender(NamedTuple):
    """A cache to be measured.

    Args:
        name: of the row.
        bits: of a code.
        make: a fresh cache from a config.
        attached: whether mnemon's attention reads it.
    """

    name: str
    bits: float
    make: MakeCache
    attached: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=12, help=f"of {CONTEXT} tokens")
    parser.add_argument("--samples", type=int, default=34, help="prompts per distance")
    parser.add_argument("--skip-variants", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = time.monotonic()

    path = bundled_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    filler = held_out_filler()
    windows, num_bytes = held_out_windows(tokenizer, filler, given.windows)
    prompts = make_prompts(tokenizer, filler, given.samples)

    def bits_per_byte(one: Contender) -> float:
        return with_attention(model, one, lambda: nats(model, windows, one.make)) / (
            math.log(2) * num_bytes
        )

    dense = Contender("dense", 16, mnemon.Cache)
    dense_bits = bits_per_byte(dense)
    dense_recall = with_attention(model, dense, lambda: recall(model, prompts, dense.make))
    rows = [row_of(dense, dense_bits, dense_recall, dense_bits, dense_recall)]
    print(shown(rows[-1]), flush=True)
    for one in contenders():
        measured = bits_per_byte(one)
        found = with_attention(model, one, lambda one=one: recall(model, prompts, one.make))
        rows.append(row_of(one, measured, found, dense_bits, dense_recall))
        print(shown(rows[-1]), flush=True)

    variants: list[dict[str, Any]] = []
    if not given.skip_variants:
        few = windows[: max(1, given.windows // 3)]
        few_bytes = len(tokenizer.decode(few[:, 1:].flatten()).encode())

        def few_bits(one: Contender) -> float:
            return with_attention(model, one, lambda: nats(model, few, one.make)) / (
                math.log(2) * few_bytes
            )

        base = few_bits(dense)
        for text in variant_recipes():
            measured = few_bits(
                Contender(text, 0, lambda config, text=text: cache_of(config, text))
            )
            variants.append({"recipe": text, "percent": round(100 * (measured / base - 1), 3)})
            print(variants[-1], flush=True)
    planted = planted_outliers()

    record = {
        "command": "python benchmarks/quality.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "model": path.name,
        "text": {"tokens": windows.numel(), "bytes": num_bytes, "context": CONTEXT},
        "recall": {"distances": DISTANCES, "samples": given.samples},
        "targets_percent": TARGETS,
        "formats": rows,
        "variants": variants,
        "planted": planted,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    table = as_markdown(record)
    (given.out / "quality.md").write_text(table)
    print(table)


# -- what is compared ------------------------------------------------------------------------------


def cache_of(config: Any, recipe: str) -> mnemon.Cache:
    return mnemon.Cache(config, recipe)


def contenders() -> list[Contender]:
    """Our formats by default, and the peers that are installed."""
    found = []
    for name in FORMATS:
        form = parse(name).packed
        assert form is not None
        sides = [side.scheme(64) for side in (form.keys, form.values)]
        bits = sum(8 * scheme.stored_bytes(64, 1) / (64 * 64) for scheme in sides) / 2
        found.append(Contender(name, bits, lambda config, name=name: cache_of(config, name)))
    for backend, package, widths in (
        ("quanto", "optimum-quanto", (4, 2)),
        ("hqq", "hqq", (8, 4, 2)),
        ("fp8", "", (8,)),
    ):
        try:
            if package:
                importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed (pip install 'mnemon[quantized-peers]'): left out")
            continue
        for bits in widths:
            found.append(Contender(f"{backend} {bits} bit", bits, peer(backend, bits), False))
    return found


def peer(backend: str, bits: int) -> MakeCache:
    """transformers' QuantizedCache, groups of 64 as ours and its other defaults."""

    def make(config: Any) -> Any:
        if backend == "fp8":
            return transformers.QuantizedCache(backend="fp8", config=config)
        axis = 0 if backend == "quanto" else 1
        return transformers.QuantizedCache(
            backend=backend, config=config, nbits=bits, axis_key=axis, axis_value=axis,
            q_group_size=64, residual_length=128,
        )  # fmt: skip

    return make


def variant_recipes() -> list[str]:
    """Keys of each format in every way; values as by default. Heads of the model are 64 wide."""
    found = []
    for code in CODES:
        for rotate in ("no", "yes"):
            found += [f"{code}(keys=token, rotate={rotate}, group={n})" for n in (32, 64)]
            found.append(f"{code}(keys=channel, rotate={rotate})")
        found.append(f"{code}(values=channel)")
    return found


# -- the bundled model -----------------------------------------------------------------------------


def with_attention(model: Any, one: Contender, measure: Callable[[], float]) -> float:
    """`measure()` with mnemon's attention where the cache is ours."""
    if not one.attached:
        return measure()
    mnemon.attach(model)
    try:
        return measure()
    finally:
        mnemon.detach(model)


def held_out_windows(tokenizer: Any, text: str, count: int) -> tuple[Tensor, int]:
    """Windows ``[count, CONTEXT]`` of held-out text, ``<|bos|>`` first, and their bytes."""
    ids = tokenizer(text, verbose=False)["input_ids"][: count * (CONTEXT - 1)]
    body = torch.tensor(ids).view(-1, CONTEXT - 1)
    first = torch.full((body.shape[0], 1), int(tokenizer.bos_token_id))
    return torch.cat([first, body], dim=1), len(tokenizer.decode(ids).encode())


@torch.inference_mode()
def nats(model: Any, windows: Tensor, make: MakeCache) -> float:
    """Surprise over all windows, each fed through a fresh cache in chunks."""
    total = 0.0
    for batch in windows.split(BATCH):
        cache = make(model.config)
        for start in range(0, CONTEXT - 1, CHUNK):
            chunk = batch[:, start : min(start + CHUNK, CONTEXT - 1)]
            logits = model(input_ids=chunk, past_key_values=cache, use_cache=True).logits
            target = batch[:, start + 1 : start + 1 + chunk.shape[1]]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), target.flatten(), reduction="sum"
                )
            )
    return total


def make_prompts(tokenizer: Any, filler: str, samples: int) -> dict[int, list[Any]]:
    maker = PromptMaker.build(tokenizer, filler)
    return {
        distance: [maker.make("needle", distance=distance, seed=i) for i in range(samples)]
        for distance in DISTANCES
    }


@torch.inference_mode()
def recall(model: Any, prompts: dict[int, list[Any]], make: MakeCache, batch: int = 10) -> float:
    """The share of prompts whose whole answer is decoded."""
    right = total = 0
    for group in prompts.values():
        for first in range(0, len(group), batch):
            some = group[first : first + batch]
            ids = torch.tensor([prompt.input_ids for prompt in some])
            cache = make(model.config)
            for chunk in ids.split(CHUNK, dim=1):
                out = model(
                    input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            decoded = [out.logits[:, -1:].argmax(-1)]
            while len(decoded) < len(some[0].answer_ids):
                out = model(input_ids=decoded[-1], past_key_values=cache, use_cache=True)
                decoded.append(out.logits[:, -1:].argmax(-1))
            answers = torch.cat(decoded, dim=1).tolist()
            right += sum(
                got == list(prompt.answer_ids) for got, prompt in zip(answers, some, strict=True)
            )
            total += len(some)
    return right / total


# -- planted outliers ------------------------------------------------------------------------------


def planted_outliers(width: int = 128, tokens: int = 2048) -> list[dict[str, Any]]:
    """Relative error of attention's output per variant of the keys; values stay exact."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 2, tokens, width, generator=generator)
    values = torch.randn(1, 2, tokens, width, generator=generator)
    query = torch.randn(1, 2, 64, width, generator=generator)
    places = torch.randperm(width, generator=generator)[:4]
    offset, spread = plain.clone(), plain.clone()
    offset[..., places] += 20.0
    spread[..., places] *= 20.0
    # Queries are small where keys are large, as in trained models; the softmax stays soft.
    quiet = query.clone()
    quiet[..., places] *= 0.05
    found = []
    for code in CODES:
        for scheme in _schemes(code):
            row: dict[str, Any] = {
                "code": code,
                "axis": scheme.axis,
                "rotated": scheme.rotated,
                "group": scheme.group_size,
                "bits": round(8 * scheme.stored_bytes(width, 1) / (64 * width), 2),
            }
            for name, keys in (("none", plain), ("offset", offset), ("spread", spread)):
                blocks, factors = quantize_blocks(keys, scheme, is_keys=True)
                side = PackedSide(
                    blocks=blocks, factors=factors, scheme=scheme, width=width, is_keys=True
                )
                right = attention(quiet, keys, values)
                got = attention(quiet, side.numbers(0, side.num_blocks), values)
                row[name] = round(float((got - right).norm() / right.norm()), 4)
            found.append(row)
    return found


def _schemes(code: str) -> Sequence[Scheme]:
    found = []
    for rotated in (False, True):
        for size in (32, 64, 128):
            found.append(Scheme(code=code, axis="token", group_size=size, rotated=rotated))
        found.append(Scheme(code=code, axis="channel", rotated=rotated))
    return found


# -- the record ------------------------------------------------------------------------------------


def row_of(
    one: Contender, measured: float, found: float, dense_bits: float, dense_recall: float
) -> dict[str, Any]:
    return {
        "name": one.name,
        "bits": round(one.bits, 2),
        "bits_per_byte": round(measured, 5),
        "percent": round(100 * (measured / dense_bits - 1), 3),
        "recall": round(found, 4),
        "recall_points": round(100 * (found - dense_recall), 2),
    }


def shown(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:14s} {row['bits_per_byte']:.4f} bits/byte ({row['percent']:+.3f}%)  "
        f"recall {row['recall']:.3f} ({row['recall_points']:+.1f} points)"
    )


def as_markdown(record: dict[str, Any]) -> str:
    text, version = record["text"], record["versions"]
    lines = [
        "# Quality of packed formats",
        "",
        f"`{record['command']}`, {record['date']}, {record['machine']['processor']}, torch "
        f"{version['torch']}, transformers {version['transformers']}. Bundled model "
        f"`{record['model']}`: bits/byte on {text['bytes']:,} bytes of held-out text in windows of "
        f"{text['context']:,} tokens, recall of a needle {DISTANCES[0]:,} to {DISTANCES[-1]:,} "
        f"tokens back ({record['recall']['samples']} prompts per distance), 64 tokens per forward. "
        f'"bits" of ours include scales; of the peers they are the codes\' alone.',
        "",
        "| cache | bits per value | bits/byte | against dense | recall | against dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["formats"]:
        lines.append(
            f"| {row['name']} | {row['bits']:g} | {row['bits_per_byte']:.4f} | "
            f"{row['percent']:+.3f}% | {100 * row['recall']:.1f}% | "
            f"{row['recall_points']:+.1f} points |"
        )
    if record["variants"]:
        lines += ["", "## How keys are grouped (values as by default)", ""]
        lines += ["| recipe | bits/byte against dense |", "|---|---|"]
        lines += [f"| `{row['recipe']}` | {row['percent']:+.3f}% |" for row in record["variants"]]
    lines += [
        "",
        "## Planted outliers",
        "",
        "Random keys, 4 of 128 dimensions far off (`offset`: all tokens by 20; `spread`: 20 times "
        "as wide): relative error of attention's output, only keys quantized.",
        "",
        "| code | axis | group | rotated | bits per value | no outliers | offset | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["planted"]:
        lines.append(
            f"| {row['code']} | {row['axis']} | {row['group'] or 64} | "
            f"{'yes' if row['rotated'] else 'no'} | {row['bits']:g} | {row['none']:.4f} | "
            f"{row['offset']:.4f} | {row['spread']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "optimum-quanto", "hqq"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
