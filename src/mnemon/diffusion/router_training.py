"""Trains a Learning-to-Cache router for any pipeline, from its own runs (arXiv 2406.01733).

    record      whole runs without a cache: what the transformer was asked and what it answered
    each step   one recorded run and one pair of steps (full s = 2j, cached m = 2j + 1):
                f_s    every sublayer's output at s
                f~     b f(h_m) + (1 - b) f_s, for every sublayer at m, with gates of m
                L      |answer~ - answer|^2 + lam sum b          b = sigmoid(score)

Only the scores learn. The recorded states are those of the sampler itself, one of its steps apart,
where the paper noises training images and takes a DDIM step: no data, no scheduler, any model.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mnemon.diffusion.attachment import attach
from mnemon.diffusion.clock import Step
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.options import at_least, between
from mnemon.diffusion.outputs import Output, answer_of, combine
from mnemon.diffusion.recording import Call, record_runs
from mnemon.diffusion.router import Router
from mnemon.diffusion.sites import Sites, find_sites
from mnemon.errors import DiffusionError

__all__ = ["RouterOptions", "RouterTrainer", "draw_schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """How a router is trained.

    Args:
        steps: of the optimiser.
        share: of the cache steps' sublayers that should be computed; the weight of the cost term
            follows it. None: `lam` is fixed, and `threshold` decides.
        lam: weight of the cost term, at the beginning if `share` is given.
        threshold: of the router, where no share is asked for.
        learning_rate: of AdamW without decay.
        seed: of the initial scores and of what is drawn.
    """

    steps: int = 400
    share: float | None = 0.5
    lam: float = 1e-4
    threshold: float = 0.5
    learning_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        if self.share is not None:
            between("share", self.share, 0, 1)
        between("lam", self.lam, 0)
        between("threshold", self.threshold, 0, 1)
        between("learning_rate", self.learning_rate, 0)


@dataclass(slots=True)
class _Pass:
    """What the sublayers do in the pass that runs."""

    kept: list[Output | None]
    shares: Tensor | None = None  # b by sublayer; None: compute and keep


@dataclass(frozen=True, slots=True, kw_only=True)
class _Soft(Method):
    name: ClassVar[str] = "soft router"
    state: _Pass

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer",)

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return _SoftSession(sites, self.state)


class _SoftSession(Session):
    def __init__(self, sites: Sites, state: _Pass) -> None:
        super().__init__(sites)
        self._state = state

    def begin(self, step: Step) -> None:
        pass

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        state = self._state
        output = original(*args, **kwargs)
        if state.shares is None:
            state.kept[index] = output
            return output
        share = state.shares[index]
        kept = cast(Output, state.kept[index])
        return combine(lambda now, then: then + share.to(now.dtype) * (now - then), output, kept)

    def held(self) -> Iterator[Any]:
        return iter(())


class RouterTrainer:
    """A training run: recorded calls, scores and the optimiser.

    Args:
        pipe: the pipeline; nothing stays attached to it.
        runs: calibration runs, each takes the pipeline; all of the same number of steps.
        options: see `RouterOptions`.

    Raises:
        DiffusionError: the runs have fewer than two steps, or differ in number.
    """

    def __init__(
        self, pipe: Any, runs: Sequence[Callable[[Any], Any]], options: RouterOptions
    ) -> None:
        model = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
        if not isinstance(model, nn.Module):
            raise DiffusionError(
                f"a {type(pipe).__name__} came; it has no transformer to train for"
            )
        self.options, self._model = options, model
        self.sites = find_sites(model)
        self._calls: dict[tuple[int, int, int], Call] = {
            (c.run, c.branch, c.index): c for c in record_runs(pipe, model, runs)
        }
        counts = {
            max(i for r, b, i in self._calls if (r, b) == place) + 1
            for place in {(r, b) for r, b, _ in self._calls}
        }
        if len(counts) != 1 or min(counts) < 2:
            raise DiffusionError(
                f"runs of {', '.join(map(str, sorted(counts))) or 'no'} steps came; all have to "
                "have the same number, at least 2"
            )
        self.num_steps = counts.pop()
        self._timesteps = tuple(self._calls[0, 0, i].timestep for i in range(self.num_steps))
        self._sources = sorted({(r, b) for r, b, _ in self._calls})
        generator = torch.Generator().manual_seed(options.seed)
        shape = (self.num_steps // 2, len(self.sites.sublayers))
        start = torch.randn(shape, generator=generator).clamp(-5, 5)
        self.scores = nn.Parameter(start.to(next(model.parameters()).device))
        self._optimiser = torch.optim.AdamW(
            [self.scores], lr=options.learning_rate, weight_decay=0.0
        )
        self.lam = options.lam
        self.step = 0
        self.loss = math.nan

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes the run's state, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(
                {
                    "scores": self.scores.detach(),
                    "optimiser": self._optimiser.state_dict(),
                    "step": self.step,
                    "lam": self.lam,
                    "options": json.dumps(self._identity()),
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Goes on from a saved state.

        Raises:
            DiffusionError: none is there, or it is of another run.
        """
        try:
            state = torch.load(path, map_location=self.scores.device, weights_only=True)
            came = json.loads(state["options"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DiffusionError(f"{path}: no checkpoint of a router ({_short(error)})") from None
        except pickle.UnpicklingError:
            raise DiffusionError(f"{path}: no checkpoint of a router, but another file") from None
        expected = self._identity()
        if came != expected or state["scores"].shape != self.scores.shape:
            raise DiffusionError(
                f"{path} is of a run with {came} and {tuple(state['scores'].shape)} scores, this "
                f"one has {expected} and {tuple(self.scores.shape)}; give the same options, or "
                "start anew"
            )
        with torch.no_grad():
            self.scores.copy_(state["scores"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step, self.lam = state["step"], state["lam"]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it."""
        answers = [call.answer.double().abs().mean().item() for call in self._calls.values()]
        # The recorded answers stand for the model, the guidance and the runs.
        recorded = [len(answers), float(f"{sum(answers):.5g}")]
        return {**asdict(self.options), "recorded": recorded}

    # -- training ----------------------------------------------------------------------------------

    def run(self, after_step: Callable[[RouterTrainer], None] | None = None) -> Router:
        """Trains to the last step; what a step draws depends on the seed and the step alone."""
        state = _Pass([None] * len(self.sites.sublayers))
        wanted = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            with attach(self._model, _Soft(state=state)) as attached, torch.enable_grad():
                while self.step < self.options.steps:
                    self._train_step(state, attached.reset)
                    if after_step is not None:
                        after_step(self)
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
        return self.router()

    def _train_step(self, state: _Pass, reset: Callable[[], None]) -> None:
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        # Each pair comes once in as many steps as there are, in an order that changes.
        rows = len(self.scores)
        turn = torch.Generator().manual_seed(options.seed * 7_919 + self.step // rows)
        row = int(torch.randperm(rows, generator=turn)[self.step % rows])
        source = int(torch.randint(len(self._sources), (), generator=generator))
        run, branch = self._sources[source]
        full, cached = (self._calls[run, branch, 2 * row + i] for i in (0, 1))
        reset()
        state.shares = None
        with torch.no_grad():
            self._model(**full.arguments)
        state.kept = [self.stand_in(output) for output in state.kept]
        shares = self.scores[row].sigmoid()
        state.shares = shares
        said = answer_of(self._model(**cached.arguments))
        error = (said.float() - cached.answer.float()).square().mean()
        torch.autograd.backward(error + self.lam * shares.sum())
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        now = float(error.detach())
        self.loss = now if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * now
        if options.share is not None:
            # The cost term weighs more while too much is computed, and less while too little is.
            computed = float(self.scores.detach().sigmoid().mean())
            self.lam *= math.exp(0.2 * (computed - options.share))

    def stand_in(self, output: Output | None) -> Output | None:
        """What a sublayer that is not computed answers with, given its output of the full step."""
        return output

    def router(self) -> Router:
        """The router as trained so far."""
        made = Router(
            scores=self.scores.detach().cpu().clone(),
            threshold=self.options.threshold,
            num_steps=self.num_steps,
            timesteps=self._timesteps,
            model=self.sites.model,
            paths=tuple(s.path for s in self.sites.sublayers),
        )
        return made if self.options.share is None else made.with_share(self.options.share)


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def train(
    pipe: Any,
    runs: Sequence[Callable[[Any], Any]],
    out: Path,
    options: RouterOptions,
    *,
    resume: bool = False,
    checkpoint_s: float = 30.0,
    after_step: Callable[[RouterTrainer], None] | None = None,
) -> Router:
    """Trains, checkpoints beside `out`, and writes the router and a picture of its schedule.

    Args:
        out: the safetensors file; the picture and the checkpoint get its name with ``.png`` and
            ``.checkpoint.pt``. The checkpoint goes away at the end.
        resume: go on from the checkpoint.

    Raises:
        DiffusionError: nothing to resume, or see `RouterTrainer`.
    """
    if out.suffix != ".safetensors":
        raise DiffusionError(
            f"{out} came; the router's file has to end in .safetensors, its picture gets .png"
        )
    trainer = RouterTrainer(pipe, runs, options)
    checkpoint = out.with_suffix(".checkpoint.pt")
    if resume:
        trainer.load(checkpoint)
    saved = time.monotonic()

    def note(running: RouterTrainer) -> None:
        nonlocal saved
        if after_step is not None:
            after_step(running)
        if time.monotonic() - saved > checkpoint_s:
            running.save(checkpoint)
            saved = time.monotonic()

    try:
        router = trainer.run(note)
    except KeyboardInterrupt:
        trainer.save(checkpoint)
        raise
    router.save(out)
    draw_schedule(router, out.with_suffix(".png"))
    checkpoint.unlink(missing_ok=True)
    return router


def draw_schedule(router: Router, path: Path) -> None:
    """A picture of which sublayers run at which step, written whole or not at all."""
    import io

    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from mnemon.files.atomic import write_atomically

    computes = router.computes()
    grid = torch.full((len(router.paths), router.num_steps), 2.0)
    for row, flags in enumerate(computes):
        grid[:, 2 * row + 1] = torch.tensor(flags, dtype=torch.float32)
    height = 1.6 + 0.17 * len(router.paths)
    figure = Figure(figsize=(2.5 + 0.28 * router.num_steps, height), layout="constrained")
    axes = figure.subplots()
    colours = ["#eceff4", "#e08e45", "#3b6ea8"]
    axes.imshow(grid.numpy(), aspect="auto", cmap=ListedColormap(colours), vmin=0, vmax=2)
    axes.set_yticks(range(len(router.paths)), router.paths, fontsize=6)
    axes.set_xticks(range(0, router.num_steps, 1 if router.num_steps <= 25 else 5))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("step")
    share = sum(map(sum, computes)) / router.scores.numel()
    axes.set_title(f"{router.model}: {share:.0%} of cache steps' sublayers computed", fontsize=9)
    labels = ("reused", "computed in a cache step", "full step")
    handles = [Patch(color=c, label=w) for c, w in zip(colours, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    write_atomically(path, lambda writer: writer.write(out.getvalue()))
