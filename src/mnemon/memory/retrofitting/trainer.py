"""One retrofit: its state, its steps, its checkpoints."""

import io
import json
import math
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemon.errors import LearnedMemoryError
from mnemon.files.atomic import write_atomically
from mnemon.hf import compressing as hf
from mnemon.hf.neurons import borrowed_rows
from mnemon.memory.retrofitting import loss as losses
from mnemon.memory.retrofitting.attaching import attach_compression, control_of
from mnemon.memory.retrofitting.attention import PROJECTION
from mnemon.memory.retrofitting.control import Control
from mnemon.memory.retrofitting.data import Batch, Rows
from mnemon.memory.retrofitting.options import RetrofitOptions
from mnemon.memory.retrofitting.schedule import Setting, stages_of

__all__ = ["Progress", "Retrofitter"]

_NEVER = -1e5  # an offset at which nothing is compressed


class Progress(NamedTuple):
    """What one step came to.

    Attributes:
        step: steps done.
        loss: distance to the model as it came, or cross entropy, in nats per token.
        lacking: what the compression lacks of the target.
        ratio: that was asked for.
        measured: tokens per slot by this step's decisions.
        by_head: the same by [layer][kv head]; empty for the control.
    """

    step: int
    loss: float
    lacking: float
    ratio: float
    measured: float
    by_head: tuple[tuple[float, ...], ...]


@final
class Retrofitter:
    """A run: the model that learns, the frozen one it follows, the optimiser and a step counter.

    Args:
        model: a causal model of Llama, Qwen2, Qwen3 or Mistral type, as it came; changed in place
            and trained in float32.
        rows: what each step trains with, see `rows_of` and `bundled_rows`.
        options: see `RetrofitOptions`.
        autocast: compute in bfloat16; None does so on an accelerator.

    Raises:
        LearnedMemoryError: another kind of model, or one that compresses already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        options: RetrofitOptions,
        *,
        autocast: bool | None = None,
    ) -> None:
        if control_of(model) is not None:
            raise LearnedMemoryError(
                f"{type(model).__name__} compresses already; a retrofit begins with a plain model."
            )
        layers = hf.compressible_layers(model)  # another kind of model is refused unchanged
        self.options, self.rows, self.model = options, rows, model
        self.stages = stages_of(options)
        self._autocast = model.device.type != "cpu" if autocast is None else autocast
        nn.Module.float(model)
        self._origin = _fingerprint(model)
        self.teacher = None if options.loss == "text" else _frozen(model)
        compression = options.compression()
        self.control: Control | None = None
        self._layers = layers
        if compression is not None:
            self.control = attach_compression(model, compression)
            self.control.generator = torch.Generator(model.device)
        model.eval()  # no dropout: the teacher has none
        self._groups = _groups(model)
        self.optimiser = torch.optim.AdamW(
            [
                {
                    "params": self._groups[0],
                    "base": options.rate,
                    "weight_decay": options.weight_decay,
                },
                {"params": self._groups[1], "base": options.rate, "weight_decay": 0.0},
                {"params": self._groups[2], "base": options.decision_rate, "weight_decay": 0.0},
            ],
            lr=options.rate,
            betas=(0.9, 0.95),
        )
        self.step = 0
        self.num_tokens = 0

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run's state, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "num_tokens": self.num_tokens,
                "identity": json.dumps(self._identity()),
            },
            buffer,
        )
        write_atomically(path, lambda writer: writer.write(buffer.getbuffer()))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved state.

        Raises:
            LearnedMemoryError: none is there, or it is of another run.
        """
        place = Path(path)
        if not place.is_file():
            raise LearnedMemoryError(
                f"{place} is not there: nothing to go on from. Start without resume."
            )
        try:
            state = torch.load(place, map_location=self.model.device, weights_only=True)
            came = json.loads(state["identity"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError,
                pickle.UnpicklingError) as error:  # fmt: skip
            raise LearnedMemoryError(
                f"{place} is no checkpoint of a retrofit ({type(error).__name__}): remove it and "
                f"start without resume."
            ) from error
        expected = self._identity()
        odd = sorted(k for k in {*came, *expected} if came.get(k) != expected.get(k))
        if odd:
            raise LearnedMemoryError(
                f"{place} is of another run: {odd[0]} is {came.get(odd[0])} there and "
                f"{expected.get(odd[0])} here. Give the same model and options, or start anew."
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it."""
        return {**asdict(self.options), "autocast": self._autocast, "model": self._origin}

    # -- training --------------------------------------------------------------------------------

    def run(self, after_step: Callable[[Progress], None] | None = None) -> PreTrainedModel:
        """Train to the last step, and give the model as it is to be used."""
        with torch.enable_grad():
            while self.step < self.options.steps:
                progress = self.train_step()
                if after_step is not None:
                    after_step(progress)
        return self.finish()

    def finish(self) -> PreTrainedModel:
        """The model with decisions as they are in use: without noise, 0 or 1."""
        if self.control is not None:
            self._set(self.stages.at(self.options.steps))
            self.control.relaxed = False
            self.control.records.clear()
            # A generator can neither be copied nor pickled.
            self.control.generator = None
        self.optimiser.zero_grad(set_to_none=True)
        self.model.eval()
        return self.model

    def train_step(self) -> Progress:
        """One step of the optimiser; what it draws depends on the seed and the step alone."""
        setting = self.stages.at(self.step)
        self._set(setting)
        batch = self.rows(self.step)
        ids = batch.ids.to(self.model.device)
        weight = None if batch.weight is None else batch.weight.to(self.model.device)
        loss = self._loss(ids, weight)
        total, lacking, by_head = loss, torch.zeros(()), torch.ones(0, 0)
        if self.control is not None:
            records = [decided for _, decided in sorted(self.control.records.items())]
            lacking = losses.shortfall(losses.mean_decision(records), setting.target)
            total = loss + self.options.pressure * lacking
            by_head = torch.stack([decided.detach().mean(dim=(0, 2)) for decided in records]).cpu()
            self.control.records.clear()
        torch.autograd.backward(total)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * setting.rate
            # Apart: the decisions' gradients are of another size than the weights'.
        torch.nn.utils.clip_grad_norm_([*self._groups[0], *self._groups[1]], 1.0)
        torch.nn.utils.clip_grad_norm_(self._groups[2], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += ids.numel()
        left = 1.0 - float(by_head.mean()) if by_head.numel() else 1.0
        return Progress(
            self.step,
            float(loss.detach()),
            float(lacking.detach()),
            setting.ratio,
            1.0 / max(left, 1e-6),
            tuple(tuple(1.0 / max(1.0 - d, 1e-6) for d in layer) for layer in by_head.tolist()),
        )

    def _loss(self, ids: Tensor, weight: Tensor | None) -> Tensor:
        batch = Batch(ids, weight)
        with self._computing():
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(input_ids=batch.ids, use_cache=False).logits
            logits = self.model(input_ids=batch.ids, use_cache=False).logits
        loss = torch.zeros((), device=ids.device)
        if taught is not None:
            loss = loss + losses.distillation(logits, taught, weight)
        if self.options.loss != "distill":
            loss = loss + losses.next_token(logits, ids, weight)
        return loss

    def _computing(self) -> AbstractContextManager[Any]:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _set(self, setting: Setting) -> None:
        control, compression = self.control, self.options.compression()
        if control is None or compression is None:
            return
        if (
            compression.source == "neuron"
            and self.step == self.stages.neuron
            and self.stages.neuron
        ):
            # Faded from the scores by now, and free to say something else.
            for layer in self._layers:
                for rows in borrowed_rows(layer, compression.method):
                    rows.zero_()
        control.relaxed = True
        control.neuron_left = setting.neuron_left
        offset = compression.offset if setting.compresses else _NEVER
        control.compression = replace(compression, offset=offset)
        assert control.generator is not None
        control.generator.manual_seed(self.options.seed * 1_000_003 + self.step)


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, other weights (embeddings, norms, biases), and what decides."""
    embeddings = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if f".{PROJECTION}." in name:
            groups[2].append(weight)
        else:
            groups[weight.dim() < 2 or id(weight) in embeddings].append(weight)
    return groups[0], groups[1], groups[2]


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    teacher = deepcopy(model)
    teacher.eval()
    for weight in teacher.parameters():
        weight.requires_grad_(False)
    return teacher


def _fingerprint(model: nn.Module) -> str:
    """Which weights a run began with, good enough to tell models apart."""
    sums = [float(weight.detach().double().abs().sum()) for weight in model.parameters()]
    return f"{len(sums)} tensors, {math.fsum(sums):.6e}"
