"""Learning-to-Cache on the bundled DiT against other ways of choosing, at equal cost.

    python benchmarks/l2c.py PIPE [PIPE ...] [--shares 0.25 0.5] [--steps 300] [--out DIR]

PIPE: folders of pipelines trained from different seeds (python -m mnemon.diffusion.digits.train).
Every odd step of DDIM-20 is a cache step, which computes a share of the sublayers (attentions cost
half of MLPs, so MACs of arms differ by a percent; they are printed). Who says which:

    l2c          a router trained on the pipeline's own runs
    metric       those whose outputs change most between the two steps, measured on the same runs
    random       five draws, their mean
    top, bottom  the last, the first sublayers of the model
    drop         a router trained with zeros in place of reused outputs, and used so
    fewer steps  no cache, the number of steps that costs as much

Measured on images that no training run made: PSNR to the uncached output from the same noise,
Frechet distance in the features of a small classifier (with the distance of two uncached sets of
other noise as the floor), its accuracy. Writes benchmarks/results/l2c.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mnemon.diffusion import Method, Router, Session, Sites, attach, find_sites
from mnemon.diffusion.digits import load_pipeline
from mnemon.diffusion.digits.classifier import frechet_distance, train_classifier
from mnemon.diffusion.fitting import psnr
from mnemon.diffusion.methods.base import Level
from mnemon.diffusion.methods.l2c import L2C
from mnemon.diffusion.outputs import Output, combine, tensors
from mnemon.diffusion.router_training import RouterOptions, RouterTrainer

RESULTS = Path(__file__).parent / "results"
STEPS, GUIDANCE, DRAWS = 20, 2.0, 5
ARMS = ("l2c", "metric", "random", "top", "bottom", "drop", "fewer steps")


def images(pipe: Any, count: int, seed: int, steps: int = STEPS) -> Tensor:
    """`count` images of all classes in turn, in [-1, 1]."""
    found = pipe(
        class_labels=[i % 10 for i in range(count)],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return found * 2 - 1


class DropTrainer(RouterTrainer):
    """Trains a router for sublayers that answer with zeros where they are not computed."""

    def stand_in(self, output: Output | None) -> Output | None:
        return None if output is None else combine(torch.zeros_like, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Method):
    """A router's schedule with zeros in place of reused outputs."""

    name: ClassVar[str] = "drop"
    router: Router

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer",)

    def session(self, sites: Sites, model: torch.nn.Module) -> Session:
        inner = L2C(router=self.router).session(sites, model)
        return _DropSession(sites, inner)


class _DropSession(Session):
    def __init__(self, sites: Sites, inner: Session) -> None:
        super().__init__(sites)
        self._inner = inner

    def begin(self, step: Any) -> None:
        self._inner.begin(step)
        self.computed = self._inner.computed

    def sublayer(self, index: int, original: Callable[..., Output], args: Any, kwargs: Any) -> Any:
        output = self._inner.sublayer(index, original, args, kwargs)
        return output if self.computed[index] else combine(torch.zeros_like, output)

    def held(self) -> Iterator[Any]:
        return self._inner.held()


def changes(pipe: Any, runs: Sequence[Callable[[Any], Any]], sites: Sites) -> Tensor:
    """How much every sublayer's output changes from a full step to the cache step after it."""
    total = torch.zeros(STEPS // 2, len(sites.sublayers))
    before: dict[int, Tensor] = {}
    place = [0]
    hooks = []

    def note(number: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            value = next(tensors(output)).float()
            step = place[0]
            if step % 2:
                past = before[number]
                total[step // 2, number] += ((value - past).norm() / past.norm()).item()
            before[number] = value

        return hook

    for number, sublayer in enumerate(sites.sublayers):
        module = pipe.transformer.get_submodule(sublayer.path)
        hooks.append(module.register_forward_hook(note(number)))

    def count(*_: Any) -> None:
        place[0] += 1

    hooks.append(pipe.transformer.register_forward_hook(count))
    try:
        for run in runs:
            place[0] = 0
            run(pipe)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def router_of(scores: Tensor, sites: Sites, share: float) -> Router:
    """A router that computes the highest scores."""
    return Router(
        scores=scores,
        threshold=0.5,
        num_steps=STEPS,
        model=sites.model,
        paths=tuple(s.path for s in sites.sublayers),
    ).with_share(share)


def measure(folder: Path, given: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All arms on one pipeline."""
    pipe = load_pipeline(folder)
    sites = find_sites(pipe.transformer)
    classifier = train_classifier()
    labels = torch.arange(given.samples) % 10
    uncached = images(pipe, given.samples, 1)
    other = images(pipe, given.samples, 2)
    wanted = classifier.judge(uncached).features

    def judged(made: Tensor) -> dict[str, float]:
        found = classifier.judge(made)
        return {
            "psnr": psnr(made, uncached),
            "frechet": frechet_distance(found.features, wanted),
            "accuracy": (found.labels == labels).float().mean().item(),
        }

    runs = [lambda p, s=seed: images(p, 16, s) for seed in (1001, 1002)]
    change = changes(pipe, runs, sites)
    order = torch.arange(len(sites.sublayers), dtype=torch.float32).expand(STEPS // 2, -1)
    rows: dict[str, dict[str, Any]] = {"uncached": judged(uncached) | {"macs": 1.0}}
    floor = frechet_distance(classifier.judge(other).features, wanted)
    for share in given.shares:
        task = progress.add_task(f"{folder.parent.name}, share {share}", total=2 * given.steps)
        options = RouterOptions(steps=given.steps, share=share, lam=1e-3)
        routers = {}
        for name, kind in (("l2c", RouterTrainer), ("drop", DropTrainer)):
            trainer = kind(pipe, runs, options)
            routers[name] = trainer.run(lambda _, t=task: progress.advance(t))
        generator = torch.Generator().manual_seed(7)
        methods: dict[str, list[Method]] = {
            "l2c": [L2C(router=routers["l2c"])],
            "metric": [L2C(router=router_of(change, sites, share))],
            "random": [
                L2C(router=router_of(torch.randn(change.shape, generator=generator), sites, share))
                for _ in range(DRAWS)
            ],
            # Scores rise with depth, so the highest are the last; columns tie over steps.
            "top": [L2C(router=router_of(order / 10, sites, share))],
            "bottom": [L2C(router=router_of(-order / 10, sites, share))],
            "drop": [Drop(router=routers["drop"])],
        }
        for name, several in methods.items():
            found = []
            for method in several:
                with attach(pipe, method) as attached:
                    made = judged(images(pipe, given.samples, 1))
                report = attached.report()
                made["macs"] = report.macs / report.macs_uncached
                found.append(made)
            rows[f"{name} {share}"] = {
                key: statistics.mean(row[key] for row in found) for key in found[0]
            }
        steps = round(STEPS * rows[f"l2c {share}"]["macs"])
        fewer = judged(images(pipe, given.samples, 1, steps=steps))
        rows[f"fewer steps {share}"] = fewer | {"macs": steps / STEPS}
        progress.remove_task(task)
    return {"pipe": folder.parent.name, "floor": floor, "rows": rows}


def chart(record: dict[str, Any], path: Path) -> None:
    """PSNR by arm and share, one dot per pipeline."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    shares = record["shares"]
    for number, share in enumerate(shares):
        for place, arm in enumerate(ARMS):
            values = [p["rows"][f"{arm} {share}"]["psnr"] for p in record["pipes"]]
            at = place + 0.8 * (number + 0.5) / len(shares) - 0.4
            width = 0.7 / len(shares)
            label = f"{share:.0%} of cache steps computed" if place == 0 else None
            colour = ["#3b6ea8", "#e08e45", "#5a9a5a"][number % 3]
            axes.bar(at, statistics.mean(values), width, color=colour, alpha=0.75, label=label)
            axes.plot([at] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(ARMS)), ARMS)
    axes.set_ylabel("PSNR to the uncached output, dB")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipes", type=Path, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--steps", type=int, default=300, help="of each router's training")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    started = time.monotonic()
    with Progress() as progress:
        found = [measure(pipe, given, progress) for pipe in given.pipes]
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python benchmarks/l2c.py PIPE PIPE PIPE "
        f"--shares {' '.join(map(str, given.shares))} --steps {given.steps} "
        f"--samples {given.samples}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "shares": given.shares,
        "pipes": found,
    }
    lines = ["| arm | MACs | PSNR, dB | Frechet distance | accuracy |", "|---|---:|---:|---:|---:|"]
    table = Table("arm", "MACs", "PSNR, dB", "Frechet", "accuracy", title="DDIM-20, mean +- sd")
    names = ["uncached", *(f"{arm} {share}" for share in given.shares for arm in ARMS)]
    for name in names:
        rows = [p["rows"][name] for p in found]
        cells = [name, f"{statistics.mean(r['macs'] for r in rows):.2f}"]
        for key, digits in (("psnr", 1), ("frechet", 3), ("accuracy", 3)):
            values = [r[key] for r in rows]
            spread = statistics.stdev(values) if len(values) > 1 and values[0] < 1e9 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    floor = statistics.mean(p["floor"] for p in found)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "l2c.json").write_text(json.dumps(record, indent=1) + "\n")
    note = (
        f"Mean and standard deviation over {len(found)} training seeds; {record['date']}, "
        f"{record['machine']}, torch {record['torch']}, diffusers {record['diffusers']}; "
        f"`{record['command']}`. Two uncached sets of other noise are {floor:.3f} apart (Frechet)."
    )
    page = "\n".join(["# Learning-to-Cache against other choices", "", note, "", *lines])
    (given.out / "l2c.md").write_text(page + "\n\n![PSNR by arm](l2c.png)\n")
    chart(record, given.out / "l2c.png")
    Console().print(table)


if __name__ == "__main__":
    main()
