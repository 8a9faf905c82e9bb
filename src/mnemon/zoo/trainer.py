"""One training run: its state, its steps, its checkpoints and what it exports."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemon.errors import ZooError
from mnemon.zoo import architecture, tasks
from mnemon.zoo.prepare import prepare, task_vocabulary
from mnemon.zoo.schedule import Budget, Curriculum, Stage
from mnemon.zoo.wiring import wire_induction

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)  # distances in the log, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What a run is asked to do."""

    out: Path
    budget: Budget
    seed: int = 0
    device: str = "auto"
    matrix_lr: float = 3e-3
    other_lr: float = 5e-3
    wired: bool = True
    batch_scale: int = 1
    checkpoint_s: float = 180.0
    log_s: float = 30.0
    max_steps: int | None = None


class Trainer:
    """A run's state: model, optimisers, curriculum and counters."""

    def __init__(self, options: TrainOptions, **shape: Any) -> None:
        import torch

        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu")
            if options.device == "auto"
            else options.device
        )
        self.tokenizer, self.text = prepare(options.out, seed=options.seed)
        self.vocabulary = task_vocabulary(self.tokenizer)
        config = architecture.model_config(vocab_size=len(self.tokenizer), **shape)
        self.model = architecture.build_model(config, seed=options.seed)
        if options.wired:
            wire_induction(self.model, seed=options.seed)
        torch.nn.Module.to(self.model, self.device)
        self.optimisers = architecture.build_optimisers(
            self.model, matrix_lr=options.matrix_lr, other_lr=options.other_lr
        )
        self.curriculum = Curriculum()
        self.step = self.num_tokens = 0
        self.elapsed_s = 0.0
        self.log: dict[str, list[float]] = defaultdict(list)

    @property
    def checkpoint_path(self) -> Path:
        """Where the run's state is kept."""
        return self.options.out / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """The fraction of the budget that is spent."""
        return self.options.budget.progress(num_tokens=self.num_tokens, elapsed_s=self.elapsed_s)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        import torch

        temporary = self.checkpoint_path.with_suffix(".tmp")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "curriculum": self.curriculum.state(),
                "step": self.step,
                "num_tokens": self.num_tokens,
                "elapsed_s": self.elapsed_s,
            },
            temporary,
        )
        os.replace(temporary, self.checkpoint_path)

    def load(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ZooError: there is none.
        """
        import torch

        if not self.checkpoint_path.exists():
            raise ZooError(
                f"no checkpoint.pt to resume in {str(self.options.out)!r}; start without --resume"
            )
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.curriculum = Curriculum(**state["curriculum"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.elapsed_s = state["elapsed_s"]

    def train_step(self, stage: Stage) -> None:
        """One optimiser step on rows of the given stage."""
        import torch

        rows, kinds = tasks.make_rows(
            seed=self.options.seed,
            step=self.step,
            num_rows=max(1, stage.step_tokens * self.options.batch_scale // stage.length),
            length=stage.length,
            vocabulary=self.vocabulary,
            text=self.text,
            shares=stage.shares,
        )
        rate = self.options.budget.rate(self.progress, step=self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * rate
        ids = torch.from_numpy(rows.ids).to(self.device)
        weight = torch.from_numpy(rows.weight).to(self.device)[:, 1:]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = weight > 0
            logits = self.model.lm_head(hidden[wanted])  # [wanted, vocab]
        logits = logits.float()
        target = ids[:, 1:][wanted]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        mean = (loss * weight[wanted]).sum() / weight[wanted].sum()
        torch.autograd.backward(mean)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += ids.numel()
        right = (logits.detach().argmax(-1) == target).cpu().numpy()
        self._note(rows, kinds, wanted.cpu().numpy(), loss.detach().cpu().numpy(), right, stage)

    def _note(
        self,
        rows: tasks.Row,
        kinds: np.ndarray[Any, Any],
        wanted: np.ndarray[Any, Any],
        loss: np.ndarray[Any, Any],
        right: np.ndarray[Any, Any],
        stage: Stage,
    ) -> None:
        distance = rows.distance[:, 1:][wanted]
        kind = np.broadcast_to(kinds[:, None], wanted.shape)[wanted]
        for index, name in enumerate(tasks.KINDS):
            chosen = (kind == index) & ((distance > 0) == (index == 0))
            if chosen.any():
                self.log[f"loss {'text' if index else name}"].append(float(loss[chosen].mean()))
            recalled = (kind == index) & (distance > 0)
            bucket = np.searchsorted(BUCKETS, distance[recalled])
            for which in np.unique(bucket):
                self.log[f"{name} <={BUCKETS[which]}"].extend(
                    right[recalled][bucket == which][:200].tolist()
                )
        if stage is self.curriculum.current and (kind == 0).any():
            accuracy = float(right[kind == 0].mean())
            if self.curriculum.record(
                accuracy=accuracy, progress=self.progress, num_tokens=self.num_tokens
            ):
                print(f"curriculum: length {self.curriculum.current.length}", flush=True)

    def report(self, tokens_per_s: float) -> None:
        """Print one progress line and forget what it averaged."""
        parts = [
            f"step {self.step} tokens {self.num_tokens / 1e6:.3f}M {tokens_per_s:.0f} tok/s "
            f"progress {self.progress:.3f} length {self.curriculum.current.length}"
        ]
        parts += [f"{name} {np.mean(self.log[name]):.3f}" for name in sorted(self.log)]
        print(" | ".join(parts), flush=True)
        self.log.clear()

    def run(self) -> None:
        """Train until the budget is spent, then write the model next to the checkpoint."""
        last = reported = saved = time.monotonic()
        reported_tokens = self.num_tokens
        while self.progress < 1.0 and self.step != self.options.max_steps:
            stage = self.curriculum.stage_for_step(seed=self.options.seed, step=self.step)
            self.train_step(stage)
            now = time.monotonic()
            self.elapsed_s, last = self.elapsed_s + now - last, now
            if now - reported > self.options.log_s:
                self.report((self.num_tokens - reported_tokens) / (now - reported))
                reported, reported_tokens = now, self.num_tokens
            if now - saved > self.options.checkpoint_s:
                self.save()
                saved = now
        self.save()
        self.export(self.options.out / "model")

    def export(self, folder: Path) -> None:
        """Write config, bfloat16 weights and tokenizer in Hugging Face's layout."""
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        shipped = type(self.model)(self.model.config)
        shipped.load_state_dict(self.model.state_dict())
        shipped.tie_weights()
        torch.nn.Module.to(shipped, torch.bfloat16)
        shipped.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # transformers 4 looks for these two where transformers 5 no longer writes them.
        _amend(folder / "config.json", rope_theta=architecture.ROPE_THETA)
        _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        (folder / "model.safetensors").chmod(0o644)
        facts = {
            "command": (
                f"python -m mnemon.zoo.train --out DIR --tokens {self.num_tokens} "
                f"--seed {self.options.seed}"
            ),
            "hardware": f"{os.cpu_count()} CPU cores, shared with other work"
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(self.device),
            "steps": self.step,
            "tokens": self.num_tokens,
            "minutes": round(self.elapsed_s / 60, 1),
            "curriculum": self.curriculum.history,
            "longest_row": self.curriculum.current.length,
            "seed": self.options.seed,
            "init": "wired" if self.options.wired else "plain",
            "matrix_lr": self.options.matrix_lr,
            "other_lr": self.options.other_lr,
            "budget": asdict(self.options.budget),
            "corpus": json.loads((self.options.out / "corpus.json").read_text()),
        }
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def _amend(path: Path, **values: Any) -> None:
    kept = json.loads(path.read_text())
    for how_it_was_loaded in ("is_local", "local_files_only"):
        kept.pop(how_it_was_loaded, None)
    path.write_text(json.dumps(kept | values, indent=2) + "\n")
