"""One training run of a small DiT: its steps, checkpoints and what it saves."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnemon.diffusion.diffmoe import ranks
from mnemon.diffusion.digits.architecture import Objective, build_pipeline, build_transformer
from mnemon.diffusion.digits.data import NO_CLASS, load_digits
from mnemon.errors import ZooError

if TYPE_CHECKING:
    from diffusers import DiTPipeline

__all__ = ["TrainOptions", "Trainer", "noised"]

LABEL_DROP = 0.1
_BETAS = (1e-4, 0.02)  # of diffusers' DDIMScheduler, linear over 1,000 steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What a run is asked to do."""

    out: Path
    steps: int = 3000
    batch: int = 64
    seed: int = 0
    size: str = "base"
    objective: Objective = "epsilon"
    learning_rate: float = 1e-3
    ema: float = 0.998
    device: str = "auto"
    checkpoint_s: float = 60.0
    experts: int = 0  # what the caller's `prepare` puts in; here only to tell runs apart
    moe: str = "diffmoe"


def noised(
    images: Tensor, objective: Objective, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised images, their timesteps (0 .. 1000) and what the model should say of them.

    "epsilon" is DDPM's: the noise. "flow" is linear: sigma noise + (1 - sigma) image, and the model
    says noise - image, the sign of diffusers' `FlowMatchEulerDiscreteScheduler`.
    """
    batch = len(images)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    if objective == "flow":
        sigma = torch.rand(batch, generator=generator).to(images.device)
        level = sigma.view(-1, 1, 1, 1)
        return level * noise + (1 - level) * images, sigma * 1000, noise - images
    step = torch.randint(1000, (batch,), generator=generator)
    kept = torch.cumprod(1 - torch.linspace(*_BETAS, 1000), 0)[step]
    kept = kept.to(images.device).view(-1, 1, 1, 1)
    return kept.sqrt() * images + (1 - kept).sqrt() * noise, step.to(images.device), noise


class Trainer:
    """A run's state: weights, their moving average, the optimiser and the step.

    Where torch.distributed is initialised, every process takes its own rows of a step's batch and
    gradients are averaged: a run of several processes differs from one of a single process by no
    more than rounding, unless `prepare` put something in that looks across the batch. The first
    process writes the files, all of them read `options.out`.

    Args:
        options: the run.
        prepare: may change the fresh transformer, for instance put experts into it.
        auxiliary: a further loss, asked for after each forward pass.
        write: saves the pipeline of the trained model, by default as diffusers does.

    Raises:
        ZooError: the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        options: TrainOptions,
        *,
        prepare: Callable[[nn.Module], None] | None = None,
        auxiliary: Callable[[nn.Module], Tensor] | None = None,
        write: Callable[[DiTPipeline, Path], None] | None = None,
    ) -> None:
        self.options = options
        self.rank, self.num_ranks = ranks.this_rank(), ranks.num_ranks()
        if options.batch % self.num_ranks:
            raise ZooError(
                f"a batch of {options.batch} came for {self.num_ranks} processes; give a multiple "
                "of their number"
            )
        options.out.mkdir(parents=True, exist_ok=True)
        chosen = options.device
        if chosen == "auto":
            own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.num_ranks > 1 else "cuda"
            chosen = own if torch.cuda.is_available() else "cpu"
        self.device = torch.device(chosen)
        self.model = build_transformer(options.size, seed=options.seed)
        if prepare is not None:
            prepare(self.model)
        self.auxiliary = auxiliary
        self.write = _write if write is None else write
        self.model.to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=0.0
        )
        self.digits = load_digits("train")
        self.step = 0
        self.elapsed_s = 0.0
        self.loss = math.nan  # a moving average, of the noise's prediction alone

    @property
    def checkpoint_path(self) -> Path:
        """Where the run's state is kept."""
        return self.options.out / "checkpoint.pt"

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        temporary = self.checkpoint_path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "average": self.average,
                    "optimiser": self.optimiser.state_dict(),
                    "step": self.step,
                    "elapsed_s": self.elapsed_s,
                    "loss": self.loss,
                    "options": json.dumps(self._identity()),
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint_path)

    def load(self) -> None:
        """Goes on from the checkpoint.

        Raises:
            ZooError: there is none, or it is of a run with other options.
        """
        if not self.checkpoint_path.exists():
            raise ZooError(
                f"no checkpoint.pt to resume in {str(self.options.out)!r}; start without --resume"
            )
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        came, expected = json.loads(state["options"]), self._identity()
        if came != expected:
            raise ZooError(
                f"the checkpoint in {str(self.options.out)!r} is of a run with {came}, this one "
                f"has {expected}; give the same options or another folder"
            )
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.loss = state.get("loss", math.nan)

    def _identity(self) -> dict[str, Any]:
        fields = asdict(self.options)
        if not self.options.experts:
            del fields["experts"], fields["moe"]
        return {k: v for k, v in fields.items() if k not in ("out", "device", "checkpoint_s")}

    def train_step(self) -> float:
        """One optimiser step; what it draws depends on the seed and the step alone."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        rows = torch.randint(len(self.digits.labels), (options.batch,), generator=generator)
        images = self.digits.images[rows].to(self.device)
        labels = self.digits.labels[rows]
        dropped = torch.rand(options.batch, generator=generator) < LABEL_DROP
        labels = labels.masked_fill(dropped, NO_CLASS).to(self.device)
        inputs, steps, target = noised(images, options.objective, generator)
        count = options.batch // self.num_ranks
        own = slice(self.rank * count, (self.rank + 1) * count)
        inputs, steps, target, labels = inputs[own], steps[own], target[own], labels[own]
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate * self._rate()
        said = self.model(inputs, timestep=steps, class_labels=labels).sample
        loss = (said - target).square().mean()
        total = loss if self.auxiliary is None else loss + self.auxiliary(self.model)
        torch.autograd.backward(total)
        ranks.average_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(options.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach(), 1 - keep)
            else:
                self.average[name].copy_(value)
        return ranks.mean_over_ranks(loss.detach()).item()

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        done = self.step / max(1, self.options.steps)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def run(self, *, quiet: bool = False) -> None:
        """Trains to the last step, with a progress bar, and saves the pipeline."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("loss {task.fields[loss]:.4f}"),
        )
        last = saved = time.monotonic()
        first = self.rank == 0
        with Progress(*columns, disable=quiet or not first) as progress:
            name = f"{self.options.size} {self.options.objective} seed {self.options.seed}"
            task = progress.add_task(
                name, total=self.options.steps, completed=self.step, loss=self.loss
            )
            while self.step < self.options.steps:
                loss = self.train_step()
                self.loss = loss if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * loss
                now = time.monotonic()
                self.elapsed_s, last = self.elapsed_s + now - last, now
                progress.update(task, completed=self.step, loss=self.loss)
                if first and now - saved > self.options.checkpoint_s:
                    self.save()
                    saved = time.monotonic()
        if first:
            self.save()
            self.export(self.options.out / "pipeline")

    def averaged(self) -> nn.Module:
        """The model with the moving average of its weights, which is what is sampled from."""
        self.model.load_state_dict(self.average)
        model: nn.Module = self.model
        return model

    def export(self, folder: Path) -> None:
        """Saves a pipeline, its weights in float16; without `write`, for ``from_pretrained``."""
        trained = {k: v.clone() for k, v in self.model.state_dict().items()}
        pipe = build_pipeline(self.averaged(), self.options.objective)
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.half()
        self.write(pipe, folder)
        self.model.float().load_state_dict(trained)
        record = {
            **self._identity(),
            "loss": round(self.loss, 5),
            "minutes": round(self.elapsed_s / 60, 1),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _write(pipe: DiTPipeline, folder: Path) -> None:
    pipe.save_pretrained(os.fspath(folder))
