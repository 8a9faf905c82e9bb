"""The second half of `benchmarks/retrofit.py`: everything at equal measured bytes.

Every contender reads prompts in chunks through its cache, then the question alone, and decodes
the answer; a policy never sees the question before it has dropped what it drops. Bytes are
`cache.nbytes` when the prompt has been read (scores that a policy keeps are counted), against those
of the dense cache. A policy's `keep` is set for each length so that its bytes are those of DMS
there.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mnemon
from mnemon.cli.environment import environment
from mnemon.memory import load_retrofitted
from mnemon.zoo import bundled_model_path
from mnemon.zoo.prompts import PromptMaker, RecallPrompt
from mnemon.zoo.recall import held_out_filler, wilson_interval

TASKS = {"needle": (256, 512, 1024, 2048), "pairs": (256, 1024)}
CONTEXT = 3072
CHUNK = 128
QUESTION_TOKENS = {"needle": 4, "pairs": 2}  # "\n @ key key" and "key key"
POLICIES = {
    "sinks + window": "sinks(4) + window({keep})",
    "random": "random(keep={keep})",
    "H2O": "h2o(keep={keep})",
    "TOVA": "tova(keep={keep})",
}
RETROFITS = {"DMS": "dms", "DMC": "dmc", "DMS, immediate": "dms0"}
RATIOS = (4, 2)


class Contender(NamedTuple):
    """One row of the table."""

    name: str
    ratio: int  # asked for
    folder: str | None  # of a trained model; None: the plain one
    recipe: str | None  # with {keep}; None: what the model's config says


def contenders() -> list[Contender]:
    found = [Contender("plain", 1, None, None), Contender("control", 1, "control", None)]
    for ratio in RATIOS:
        found += [Contender(n, ratio, f"{f}-{ratio}", None) for n, f in RETROFITS.items()]
        found += [Contender(n, ratio, None, recipe) for n, recipe in POLICIES.items()]
    return found


def evaluate_all(models: Path, out: Path, *, samples: int, num_windows: int) -> None:
    """Measures all contenders, each once, and writes the record."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    filler = held_out_filler()
    maker = PromptMaker.build(tokenizer, filler)
    texts = windows(tokenizer, filler, num_windows)
    prompts = {
        (task, distance): [maker.make(task, distance=distance, seed=s) for s in range(samples)]
        for task, distances in TASKS.items()
        for distance in distances
    }
    kept = models / "eval"
    kept.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for contender in contenders():
        name = f"{contender.name}-{contender.ratio}-{samples}-{num_windows}"
        path = kept / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not path.exists():
            started = time.monotonic()
            if (
                contender.folder is not None
                and not (models / contender.folder / "retrofit.json").exists()
            ):
                print(f"{contender.name} at {contender.ratio}: not trained", flush=True)
                continue
            reference = next(
                (r for r in rows if r["name"] == "DMS" and r["ratio"] == contender.ratio), None
            )
            if contender.recipe is not None and reference is None:
                print(f"{contender.name} at {contender.ratio}: no DMS to match", flush=True)
                continue
            row = one_row(contender, models, tokenizer, prompts, texts, reference)
            row["seconds"] = round(time.monotonic() - started, 1)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(row) + "\n")
            os.replace(temporary, path)
        rows.append(json.loads(path.read_text()))
        row = rows[-1]
        print(f"{row['name']:16} {row['ratio']}: {row['bits_per_byte']:.4f} bits per byte at "
              f"{row['text_ratio']:.2f}, " + ", ".join(
                  f"{p['task']} {p['distance']}: {p['correct']}/{p['samples']} ({p['ratio']:.2f})"
                  for p in row["recall"]) + f", {row['seconds']} s", flush=True)  # fmt: skip
    record = {
        "command": f"python benchmarks/retrofit.py eval --models DIR --samples {samples} "
        f"--windows {num_windows}",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {k: v for k, v in environment().items() if k not in {"command", "date"}},
        "context": CONTEXT,
        "chunk": CHUNK,
        "samples": samples,
        "windows": num_windows,
        "training": {
            f"{name}": json.loads((models / name / "retrofit.json").read_text())
            for name in sorted({c.folder for c in contenders() if c.folder})
            if (models / name / "retrofit.json").exists()
        },
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "retrofit.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "retrofit.md").write_text(as_markdown(record))
    draw(record, out / "retrofit.png")


# -- one contender ---------------------------------------------------------------------------------


def one_row(
    contender: Contender,
    models: Path,
    tokenizer: Any,
    prompts: dict[tuple[str, int], list[RecallPrompt]],
    texts: list[Tensor],
    reference: dict[str, Any] | None,
) -> dict[str, Any]:
    plain = bundled_model_path()
    if contender.folder is None or contender.folder == "control":
        source = plain if contender.folder is None else models / contender.folder
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    else:
        model = load_retrofitted(models / contender.folder, dtype=torch.float32)
    if contender.recipe is not None:
        mnemon.attach(model)
    wanted = {} if reference is None else ratios_of(reference)

    def cache_for(place: tuple[str, int], num_tokens: int) -> tuple[Callable[[], Any], str]:
        if contender.recipe is None:
            return (lambda: mnemon.Cache(model.config)), ""
        recipe = matched(contender.recipe, num_tokens, wanted[place])
        return (lambda: mnemon.Cache(model.config, recipe)), recipe

    make, recipe = cache_for(("text", 0), CONTEXT - 1)
    nats, num_bytes, stored, dense = 0.0, 0, 0, 0
    for ids in texts:
        cache = make()
        nats += text_nats(model, ids, cache)
        num_bytes += len(tokenizer.decode(ids[0, 1:]).encode())
        stored += cache.nbytes
        dense += dense_bytes(model, ids.shape[1] - 1)
    row: dict[str, Any] = {
        "name": contender.name,
        "ratio": contender.ratio,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "text_ratio": dense / stored,
        "text_bytes": num_bytes,
        "text_recipe": recipe,
        "recall": [],
    }
    for (task, distance), some in prompts.items():
        make, recipe = cache_for((task, distance), len(some[0].input_ids))
        correct, ratio = answered(model, some, make, QUESTION_TOKENS[task])
        low, high = wilson_interval(correct, len(some))
        row["recall"].append(
            {
                "task": task, "distance": distance, "correct": correct, "samples": len(some),
                "low": low, "high": high, "ratio": ratio, "recipe": recipe,
            }
        )  # fmt: skip
    return row


def ratios_of(row: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Measured ratios by place."""
    found = {(point["task"], point["distance"]): point["ratio"] for point in row["recall"]}
    return {**found, ("text", 0): row["text_ratio"]}


def dense_bytes(model: Any, num_tokens: int, rows: int = 1) -> int:
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(rows * num_tokens * numbers * 4)


@torch.inference_mode()
def text_nats(model: Any, ids: Tensor, cache: Any) -> float:
    nats = 0.0
    for start in range(0, ids.shape[1] - 1, CHUNK):
        chunk = ids[:, start : min(start + CHUNK, ids.shape[1] - 1)]
        logits = model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0]
        target = ids[0, start + 1 : start + 1 + chunk.shape[1]]
        nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    return nats


@torch.inference_mode()
def answered(
    model: Any, prompts: list[RecallPrompt], make: Callable[[], Any], question: int
) -> tuple[int, float]:
    """How many answers are right in full, and the measured ratio once the prompts were read."""
    correct, stored, dense = 0, 0, 0
    for first in range(0, len(prompts), 4):
        batch = prompts[first : first + 4]
        ids = torch.tensor([prompt.input_ids for prompt in batch])
        cache = make()
        for piece in pieces(ids, question):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        stored += cache.nbytes
        dense += dense_bytes(model, ids.shape[1], len(batch))
        decoded: list[Tensor] = []
        for _ in batch[0].answer_ids:
            token = out.logits[:, -1:].argmax(-1)
            decoded.append(token)
            if len(decoded) < len(batch[0].answer_ids):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
        got = torch.cat(decoded, dim=1).tolist()
        correct += sum(one == prompt.answer_ids for one, prompt in zip(got, batch, strict=True))
    return correct, dense / stored


def pieces(ids: Tensor, question: int) -> Iterator[Tensor]:
    """Chunks of a prompt, the question by itself."""
    yield from ids[:, :-question].split(CHUNK, dim=1)
    yield ids[:, -question:]


def matched(recipe: str, num_tokens: int, ratio: float) -> str:
    """The recipe whose bytes after `num_tokens` are nearest to the ratio's.

    Bytes of a policy depend on shapes alone, so a model of one small layer stands in.
    """
    low, high = 0.001, 1.0
    best, gap = recipe.format(keep=1.0), math.inf
    for _ in range(9):
        keep = round((low + high) / 2, 4)
        found = recipe.format(keep=keep)
        came = bytes_ratio(found, num_tokens)
        if abs(came / ratio - 1) < gap:
            best, gap = found, abs(came / ratio - 1)
        low, high = (low, keep) if came < ratio else (keep, high)
    return best


@torch.inference_mode()
def bytes_ratio(recipe: str, num_tokens: int) -> float:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=64,
        )
    ).eval()  # fmt: skip
    mnemon.attach(model)
    cache = mnemon.Cache(model.config, recipe)
    for piece in torch.zeros(1, num_tokens, dtype=torch.int64).split(CHUNK, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return dense_bytes(model, num_tokens) / cache.nbytes


def windows(tokenizer: Any, text: str, count: int) -> list[Tensor]:
    """Pieces of held-out text, evenly spread, each opened by the first token."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    gap = (len(ids) - CONTEXT) // count
    return [
        torch.tensor([[tokenizer.bos_token_id, *ids[start : start + CONTEXT - 1]]])
        for start in range(0, gap * count, gap)
    ]


# -- the record ------------------------------------------------------------------------------------


def as_markdown(record: dict[str, Any]) -> str:
    env = record["environment"]
    some = next(iter(record["training"].values()))
    places = [(p["task"], p["distance"]) for p in record["rows"][0]["recall"]]
    lines = [
        "# Retrofitted models against policies without training, at equal measured bytes",
        "",
        f"`{record['command']}`, {record['date']}, {env['processor']}, {env['torch_threads']} "
        f"thread, torch {env['torch']}, transformers {env['transformers']}, float32.",
        "",
        f"The bundled model; each retrofit and the control saw {some['steps']} steps, "
        f"{some['tokens']:,} tokens, by distillation from the frozen plain model. Bits per byte of "
        f"{record['windows']} pieces of held-out text of {record['context']} tokens; recall of "
        f"{record['samples']} prompts each, all of the answer right, 95% Wilson interval in "
        f"brackets; everything through the sequential cache in chunks of {record['chunk']} tokens, "
        f"the question by itself. `x` is dense bytes over measured bytes when the text or prompt "
        f"has been read. Policies are set to the bytes of DMS at every length.",
        "",
        "![Recall by distance, bits per byte by ratio](retrofit.png)",
        "",
        "| asked | | text x | bits per byte | " + " | ".join(f"{t} {d}" for t, d in places) + " |",
        "|---|---|---|---|" + "---|" * len(places),
    ]
    for row in record["rows"]:
        cells = [
            f"{p['correct'] / p['samples']:.2f} [{p['low']:.2f}, {p['high']:.2f}] x{p['ratio']:.2f}"
            for p in row["recall"]
        ]
        lines.append(
            f"| {row['ratio']} | {row['name']} | {row['text_ratio']:.2f} | "
            f"{row['bits_per_byte']:.4f} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "## Training",
        "",
        "| | window | minutes | ratio before the offset was set | after, on training text | offset "
        "| by layer and head |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in record["training"].items():
        if "calibrated" not in facts:
            lines.append(f"| {name} | | {facts['minutes']} | | | | |")
            continue
        heads = "; ".join(", ".join(f"{r:.1f}" for r in layer) for layer in facts["by_head"])
        lines.append(
            f"| {name} | {facts.get('window', 12)} | {facts['minutes']} | "
            f"{facts['before_calibration']:.2f} | {facts['calibrated']:.2f} | "
            f"{facts['offset']:.2f} | {heads} |"
        )
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Recall against distance at each ratio, and bits per byte against the measured ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["name"] for row in record["rows"]))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, ratio in zip(axes, RATIOS, strict=False):
        for row in record["rows"]:
            if row["ratio"] not in (1, ratio):
                continue
            points = [p for p in row["recall"] if p["task"] == "needle"]
            # A little apart, or equal curves hide one another.
            share = [
                p["correct"] / p["samples"] + 0.008 * (names.index(row["name"]) - 4) for p in points
            ]
            style = "-" if row["name"] in RETROFITS else "--"
            axis.plot(
                range(len(points)), share, style, marker="o", ms=4,
                color=colours[row["name"]], label=row["name"],
            )  # fmt: skip
        axis.set(xlabel="distance, tokens", title=f"needles, asked ratio {ratio}")
        axis.set_xticks(range(len(TASKS["needle"])), [str(d) for d in TASKS["needle"]])
        axis.set(ylim=(-0.06, 1.06), ylabel="recalled in full (curves a little apart)")
    for name in names:
        rows = sorted((r for r in record["rows"] if r["name"] == name), key=lambda r: r["ratio"])
        style = "-" if name in RETROFITS else "--"
        axes[2].plot([r["text_ratio"] for r in rows], [r["bits_per_byte"] for r in rows], style,
                     marker="o", ms=4, color=colours[name], label=name)  # fmt: skip
    axes[2].set(xlabel="dense bytes over measured bytes", ylabel="bits per byte, held-out text",
                title="text")  # fmt: skip
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=140)
