"""Mixtures of experts against a dense DiT at equal activated multiply-adds, on 8 x 8 digits.

    python benchmarks/diffmoe.py [--steps 1200] [--seeds 3] [--jobs 2] [--work DIR] [--out DIR]

Trains four models per seed by flow matching (dense, token choice, expert choice, DiffMoE; the
bundled DiT's shape of `--size`, experts in every second block, each as wide as the feed-forward it
replaces), all on the same images, noise and order. Writes benchmarks/results/diffmoe.json, .md and
.png. Measured with the moving average of the weights on the 360 held-out images:

    loss        of the flow's prediction in ten bins of noise, with the same noise for all models;
                a batch has one noise level, as in sampling
    capacity    experts per token that DiffMoE takes at each noise level, by both of its rules
    sweep       tau scaled: capacity against loss

A run is kept under --work: one that was interrupted goes on at its last checkpoint, one that ended
is not repeated.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mnemon.diffusion.diffmoe import Rule, cost, recorded_usage, set_rule, set_training
from mnemon.diffusion.digits.architecture import SIZES
from mnemon.diffusion.digits.data import Digits, load_digits
from mnemon.diffusion.digits.train import make_trainer
from mnemon.diffusion.digits.trainer import TrainOptions

RESULTS = Path(__file__).parent / "results"
KINDS = ("dense", "token_choice", "expert_choice", "diffmoe")
NAMES = {
    "dense": "dense",
    "token_choice": "token choice",
    "expert_choice": "expert choice",
    "diffmoe": "DiffMoE, top-k",
    "diffmoe_threshold": "DiffMoE, threshold",
}
BINS = 10
NOISES = 2  # draws of noise per held-out image and bin
SWEPT = 4  # every so many held-out images, one draw of noise, for the sweep
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RULES: tuple[Rule, ...] = ("topk", "threshold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, sharing the cores")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mnemon-diffmoe"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    tasks = [(kind, seed) for seed in range(given.seeds) for kind in KINDS]
    started = time.monotonic()
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(
        given.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    ) as pool:
        futures = {
            pool.submit(one_run, kind, seed, vars(given)): (kind, seed) for kind, seed in tasks
        }
        for future in track(as_completed(futures), "runs", total=len(tasks)):
            runs[futures[future]] = future.result()
    record = {
        "command": " ".join(
            ["python benchmarks/diffmoe.py"]
            + [
                f"--{name} {getattr(given, name)}"
                for name in ("steps", "seeds", "batch", "experts", "size", "jobs")
            ]
        ),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": processor(), "threads": threads, "runs at a time": given.jobs},
        "versions": versions(),
        "size": given.size,
        "steps": given.steps,
        "batch": given.batch,
        "experts": given.experts,
        "seeds": given.seeds,
        "held_out": {
            "images": len(load_digits("held_out").labels),
            "noises": NOISES,
            "every_in_sweep": SWEPT,
        },
        "noise_levels": levels(),
        "models": [model_row(kind, runs, given.seeds) for kind in KINDS],
        "losses": loss_rows(runs, given.seeds),
        "capacity": capacity_rows(runs, given.seeds),
        "sweep": sweep_rows(runs, given.seeds),
        "runs": [runs[task] for task in tasks],
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "diffmoe.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "diffmoe.md").write_text(as_markdown(record))
    draw(record, given.out / "diffmoe.png")
    show(record)


# -- one run ---------------------------------------------------------------------------------------


def one_run(kind: str, seed: int, given: dict[str, Any]) -> dict[str, Any]:
    """Trains and measures one model, or reads what was measured of it before."""
    name = f"{given['size']}-{given['steps']}x{given['batch']}-{given['experts']}-{kind}-{seed}"
    folder: Path = given["work"] / name
    measured = folder / "measured.json"
    if measured.exists():
        found: dict[str, Any] = json.loads(measured.read_text())
        return found
    options = TrainOptions(
        out=folder,
        steps=given["steps"],
        batch=given["batch"],
        seed=seed,
        size=given["size"],
        objective="flow",
        checkpoint_s=20.0,
        experts=0 if kind == "dense" else given["experts"],
        moe="diffmoe" if kind == "dense" else kind,
    )
    trainer = make_trainer(options)
    if trainer.checkpoint_path.exists():
        trainer.load()
    if trainer.step < options.steps:
        trainer.run(quiet=True)
    model = trainer.averaged()
    found = {
        "kind": kind,
        "seed": seed,
        "train_loss": round(trainer.loss, 5),
        "step_ms": round(1e3 * trainer.elapsed_s / trainer.step, 1),
        **cost(model)._asdict(),
        "image_macs": image_macs(model),
    }
    set_training(model, False)
    if kind != "diffmoe":
        found |= by_noise(model, NOISES)
    else:
        found["rules"], found["sweep"] = {}, {}
        for rule in RULES:
            set_rule(model, rule)
            found["rules"][rule] = by_noise(model, NOISES)
            swept = []
            for scale in SCALES:
                set_rule(model, rule, tau_scale=scale)
                at = by_noise(model, 1, every=SWEPT)
                swept.append({"loss": mean(at["loss"]), "capacity": mean(at["capacity"])})
            found["sweep"][rule] = swept
    temporary = measured.with_suffix(".tmp")
    temporary.write_text(json.dumps(found) + "\n")
    os.replace(temporary, measured)
    return found


def levels() -> list[float]:
    """The middles of the bins."""
    return [round((i + 0.5) / BINS, 3) for i in range(BINS)]


@torch.inference_mode()
def by_noise(model: nn.Module, noises: int, every: int = 1) -> dict[str, Any]:
    """Held-out loss, and capacity of the experts, at each noise level."""
    digits = Digits(*(part[::every] for part in load_digits("held_out")))
    generator = torch.Generator().manual_seed(2_503)
    noise = torch.randn(noises, *digits.images.shape, generator=generator)
    losses, capacities, layers = [], [], []
    for level in levels():
        squares = []
        with recorded_usage(model) as calls:
            for drawn in noise:
                inputs = level * drawn + (1 - level) * digits.images
                steps = torch.full((len(inputs),), 1000 * level)
                said = model(inputs, timestep=steps, class_labels=digits.labels).sample
                squares.append((said - (drawn - digits.images)).square().mean().item())
        losses.append(mean(squares))
        if calls[0].usage:
            capacities.append(mean(call.capacity for call in calls))
            layers.append(
                [
                    mean(u.capacity for u in same)
                    for same in zip(*(c.usage for c in calls), strict=True)
                ]
            )
    return {"loss": losses, "capacity": capacities, "layer_capacity": layers}


def image_macs(model: nn.Module) -> int:
    """Multiply-adds of one forward for one image, as torch counts them, at the trained capacity."""
    set_training(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.zeros(8, 1, 8, 8),
            timestep=torch.zeros(8),
            class_labels=torch.zeros(8, dtype=torch.long),
        )
    return int(counter.get_total_flops() / 2 / 8)


# -- over the seeds --------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation."""
    return [round(mean(values), 6), round(stdev(values), 6) if len(values) > 1 else 0.0]


def losses_of(runs: dict[tuple[str, int], dict[str, Any]], name: str, seed: int) -> list[float]:
    run = runs[name if name in KINDS else "diffmoe", seed]
    if "rules" in run:
        run = run["rules"]["threshold" if name == "diffmoe_threshold" else "topk"]
    found: list[float] = run["loss"]
    return found


def model_row(kind: str, runs: dict[tuple[str, int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    first = runs[kind, 0]
    fields = ("parameters", "activated_parameters", "image_macs", "router_macs", "predictor_macs")
    return {
        "kind": kind,
        **{field: first[field] for field in fields},
        "train_loss": spread([runs[kind, seed]["train_loss"] for seed in range(seeds)]),
        "step_ms": spread([runs[kind, seed]["step_ms"] for seed in range(seeds)]),
    }


def loss_rows(runs: dict[tuple[str, int], dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    found = []
    for name in NAMES:
        every = [losses_of(runs, name, seed) for seed in range(seeds)]
        dense = [losses_of(runs, "dense", seed) for seed in range(seeds)]
        percent = [100 * (mean(a) / mean(b) - 1) for a, b in zip(every, dense, strict=True)]
        row: dict[str, Any] = {"name": name, "mean": spread([mean(one) for one in every])}
        row["percent_of_dense"] = spread(percent)  # seed by seed: the same images and noise
        row["by_noise"] = [spread(at) for at in zip(*every, strict=True)]
        row["by_noise_percent"] = [
            spread([100 * (a[i] / b[i] - 1) for a, b in zip(every, dense, strict=True)])
            for i in range(BINS)
        ]
        found.append(row)
    return found


def capacity_rows(runs: dict[tuple[str, int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in RULES:
        every = [runs["diffmoe", seed]["rules"][rule] for seed in range(seeds)]
        layers = [one["layer_capacity"] for one in every]
        found[rule] = {
            "mean": spread([mean(one["capacity"]) for one in every]),
            "by_noise": [spread([one["capacity"][i] for one in every]) for i in range(BINS)],
            "by_layer_and_noise": [
                [spread([one[i][layer] for one in layers]) for i in range(BINS)]
                for layer in range(len(layers[0][0]))
            ],
        }
    return found


def sweep_rows(runs: dict[tuple[str, int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    return {
        rule: [
            {
                "tau_scale": scale,
                **{
                    field: spread(
                        [runs["diffmoe", s]["sweep"][rule][i][field] for s in range(seeds)]
                    )
                    for field in ("capacity", "loss")
                },
            }
            for i, scale in enumerate(SCALES)
        ]
        for rule in RULES
    }


# -- the record ------------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, columns and cells of what is shown."""
    models = {row["kind"]: row for row in record["models"]}
    capacity = {
        "diffmoe": record["capacity"]["topk"]["mean"],
        "diffmoe_threshold": record["capacity"]["threshold"]["mean"],
    }
    main_rows, noise_rows, noise = [], [], record["noise_levels"]
    for row in record["losses"]:
        name = row["name"]
        of = models[name if name in models else "diffmoe"]
        used = capacity.get(name)
        change = "" if name == "dense" else f"{pm(row['percent_of_dense'], 2, sign=True)}%"
        main_rows.append(
            [
                NAMES[name], f"{of['parameters'] / 1e6:.2f}M",
                f"{of['activated_parameters'] / 1e6:.2f}M", f"{of['image_macs'] / 1e6:.2f}M",
                "1" if used is None else pm(used, 3), pm(row["mean"], 4), change,
                pm(of["step_ms"], 0),
            ]
        )  # fmt: skip
        noise_rows.append([NAMES[name], *(pm(at, 4) for at in row["by_noise"])])
    capacity_cells = []
    for rule in RULES:
        of = record["capacity"][rule]
        capacity_cells.append([f"{rule}, all layers", *(pm(at, 3) for at in of["by_noise"])])
        for i, layer in enumerate(of["by_layer_and_noise"]):
            capacity_cells.append(
                [
                    f"{rule}, layer {i + 1} of {len(of['by_layer_and_noise'])}",
                    *(pm(at, 3) for at in layer),
                ]
            )
    swept = [
        [f"{a['tau_scale']:g}", *(pm(x[f], 4) for x in (a, b) for f in ("capacity", "loss"))]
        for a, b in zip(record["sweep"]["topk"], record["sweep"]["threshold"], strict=True)
    ]
    return [
        (
            "Held-out loss at equal activated multiply-adds",
            ["model", "parameters", "activated", "MACs per image", "capacity in inference",
             "held-out loss", "against dense, same seed", "ms per step"],
            main_rows,
        ),
        ("Held-out loss by noise level (sigma)", ["model", *map(str, noise)], noise_rows),
        ("Capacity that DiffMoE uses by noise level", ["rule", *map(str, noise)], capacity_cells),
        (
            "Threshold sweep",
            ["tau times", "capacity, top-k", "loss, top-k", "capacity, threshold",
             "loss, threshold"],
            swept,
        ),
    ]  # fmt: skip


def pm(value: Sequence[float], digits: int, *, sign: bool = False) -> str:
    return f"{value[0]:{'+' if sign else ''}.{digits}f} ± {value[1]:.{digits}f}"


def show(record: dict[str, Any]) -> None:
    console = Console(width=None if Console().is_terminal else 180)
    for title, columns, rows in tables(record):
        table = Table(title=title)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def as_markdown(record: dict[str, Any]) -> str:
    held, version = record["held_out"], record["versions"]
    lines = [
        "# Mixtures of experts in a diffusion transformer",
        "",
        f"`{record['command']}`, {record['date']}, {record['machine']['processor']}, torch "
        f"{version['torch']}, diffusers {version['diffusers']}. A DiT of size "
        f"`{record['size']}` on 8 x 8 digits, flow matching, {record['steps']:,} steps of "
        f"{record['batch']} images, {record['experts']} experts in every second block, "
        f"{record['seeds']} seeds (mean ± standard deviation). Held-out loss on {held['images']} "
        f"images with {held['noises']} draws of noise at each of {BINS} noise levels, weights "
        f"averaged over training, one noise level per batch; the sweep takes every {SWEPT}th image "
        "and one draw. Multiply-adds at the capacity of "
        "training, router and capacity predictor included; capacity 1 is a dense feed-forward.",
        "",
        "![Loss, capacity and sweep](diffmoe.png)",
    ]
    for title, columns, rows in tables(record):
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |"]
        lines.append("|" + "---|" * len(columns))
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")  # no display is needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    noise = record["noise_levels"]
    colours = ("#444444", "#c2571a", "#2a7f62", "#2f5fb3", "#8ab0ea")
    for row, colour in zip(record["losses"], colours, strict=True):
        y, error = zip(*row["by_noise_percent"], strict=True)
        left.errorbar(noise, y, error, label=NAMES[row["name"]], color=colour, lw=2, capsize=2)
    left.set_title("Held-out loss against dense", loc="left", fontweight="bold")
    left.set_ylabel("percent, lower is better")
    for rule, colour in zip(RULES, colours[3:], strict=True):
        of = record["capacity"][rule]
        y, error = zip(*of["by_noise"], strict=True)
        middle.errorbar(noise, y, error, label=f"{rule}, all layers", color=colour, lw=2, capsize=2)
    styles = ("--", "-.", ":")
    for i, layer in enumerate(record["capacity"]["topk"]["by_layer_and_noise"]):
        middle.plot(
            noise, [at[0] for at in layer], styles[i % 3], color="#999999", label=f"layer {i + 1}"
        )
    middle.axhline(1, color="#444444", lw=0.8)
    middle.set_title("Capacity that DiffMoE uses", loc="left", fontweight="bold")
    middle.set_ylabel("experts per token")
    for axes in (left, middle):
        axes.set_xlabel("noise level (sigma)")
    for rule, colour in zip(RULES, colours[3:], strict=True):
        used = [row["capacity"][0] for row in record["sweep"][rule]]
        loss = [row["loss"][0] for row in record["sweep"][rule]]
        right.plot(used, loss, marker="o", color=colour, label=rule, lw=2)
        for at in (0, SCALES.index(1.0), len(SCALES) - 1):
            right.annotate(
                f"τ × {SCALES[at]:g}",
                (used[at], loss[at]),
                xytext=(4, 4),
                textcoords="offset points",
            )
    right.set_title("τ scaled: capacity against loss", loc="left", fontweight="bold")
    right.set_xlabel("experts per token")
    right.set_ylabel("held-out loss")
    for axes in (left, middle, right):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=144)


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
    for name in ("torch", "diffusers", "scikit-learn"):
        found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
