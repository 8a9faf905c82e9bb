"""The method `fitted`, how its plans are made, and what is found out about samplers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from tests.diffusion.pipelines import PIPELINES, Tiny, by_name
from torch import Tensor

from mnemon.diffusion import attach
from mnemon.diffusion.fitting import Fitter, profiles, psnr, spread
from mnemon.diffusion.methods.fitted import Fitted, History, Plan, load_plan, num_terms
from mnemon.diffusion.recording import record_runs
from mnemon.diffusion.router import Router
from mnemon.diffusion.sampler import Sampler
from mnemon.errors import DiffusionError

# diffusers' DPM-Solver hands numpy a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

STEPS = 6


def run_of(tiny: Tiny, *, batch: int = 2, seed: int = 0) -> Any:
    return lambda pipe: tiny.call(pipe, STEPS, batch, seed)


@pytest.fixture(scope="module")
def dit() -> Any:
    return by_name("dit").build()


@pytest.mark.parametrize("tiny", PIPELINES, ids=lambda tiny: tiny.name)
def test_every_pipeline(tiny: Tiny) -> None:
    """A plan that computes all is exact, one that leaves steps out beats reuse on its own runs."""
    pipe = tiny.build()
    run = run_of(tiny)
    plain = run(pipe)
    fitter = Fitter(pipe, run)
    assert fitter.num_steps == STEPS
    whole = fitter.fit([True] * STEPS)
    assert not whole.corrections.any()
    with attach(pipe, Fitted(plan=whole)) as attached:
        assert torch.equal(run(pipe), plain)
    assert attached.report().computed_share == 1
    plan = fitter.fit(spread(STEPS, 3))
    with attach(pipe, "fitted", plan=plan) as attached:
        made = run(pipe)
        again = run(pipe)
    assert torch.equal(made, again)
    assert attached.report().computed_share == pytest.approx(0.5)
    assert psnr(made, plain) == pytest.approx(plan.psnr, abs=0.5)
    with attach(pipe, "interval", interval=2, level="stack"):
        assert psnr(made, plain) > psnr(run(pipe), plain)
    assert torch.equal(run(pipe), plain)


def test_weights_solve_least_squares(dit: Any) -> None:
    """Hidden states that are a linear function of the terms are predicted without error."""
    generator = torch.Generator().manual_seed(0)
    history = History(3)
    steps = [torch.randn(2, 40, 5, generator=generator, dtype=torch.float64) for _ in range(7)]
    for entered, left in zip(steps[:3], steps[3:6], strict=True):
        history.update(entered, left)
    truth = torch.randn(num_terms(3), 5, generator=generator, dtype=torch.float64)
    target = history.predict(steps[6], truth)
    from mnemon.diffusion.fitting import _solve

    solved = _solve(history, steps[6], target, 1e-12)
    assert torch.allclose(history.predict(steps[6], solved), target, atol=1e-6)
    shrunk = _solve(history, steps[6], target, 1e9)
    assert shrunk.abs().max() < 1e-6  # towards reuse


def test_terms() -> None:
    """Against the formula, written out; a short history has absent terms, in fixed places."""
    history = History(3)
    one, two, entered = (torch.full((1, 2, 3), v) for v in (1.0, 4.0, 16.0))
    history.update(one, 3 * one)  # adds 2
    terms = history.terms(entered)
    assert len(terms) + 1 == num_terms(3)
    values = [None if t is None else float(t.flatten()[0]) for t in terms]
    assert values == [2, None, None, 16, 15, None, None]
    history.update(two, 3 * two)  # adds 8
    values = [None if t is None else float(t.flatten()[0]) for t in history.terms(entered)]
    assert values == [8, 6, None, 16, 12, 3, None]
    assert float(history.base(entered).flatten()[0]) == 24


def reference_run(pipe: Any, scheduler: Any) -> tuple[list[Any], Tensor]:
    pipe.scheduler = scheduler
    tiny = by_name("dit")
    found: list[Tensor] = []
    calls = record_runs(pipe, pipe.transformer, [lambda p: found.append(run_of(tiny)(p))])
    return calls, found[0]


def test_ddim_is_linear() -> None:
    """The coefficients are those of the scheduler's formula, guidance included."""
    pipe = by_name("dit").build()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    calls, final = reference_run(pipe, scheduler)
    sampler = Sampler(calls, final, STEPS)
    assert sorted(sampler._steps) >= list(range(STEPS - 1))
    kept = scheduler.alphas_cumprod.double()
    for index in range(STEPS - 1):
        now, then = (kept[int(scheduler.timesteps[index + i])] for i in (0, 1))
        step = sampler._steps[index]
        assert step.kept == pytest.approx(float((then / now).sqrt()), rel=1e-3)
        factor = float((1 - then).sqrt() - (then * (1 - now) / now).sqrt())
        assert sum(step.now) == pytest.approx(factor, rel=1e-2, abs=1e-3)
        assert sum(map(abs, step.before)) < 1e-2


def test_multistep_looks_back_and_noise_is_left_alone() -> None:
    pipe = by_name("dit").build()
    calls, final = reference_run(pipe, DPMSolverMultistepScheduler(solver_order=2))
    found = Sampler(calls, final, STEPS)._steps
    assert any(sum(map(abs, step.before)) > 0.05 for step in found.values())
    calls, final = reference_run(pipe, EulerAncestralDiscreteScheduler())
    found = Sampler(calls, final, STEPS)._steps
    assert len(found) <= 1  # the last step of an ancestral sampler adds no noise


def test_corrections_help(dit: Any) -> None:
    """The same weights without corrections end further from the uncached run."""
    tiny = by_name("dit")
    run = run_of(tiny, batch=8)
    plain = run(dit)
    plan = Fitter(dit, run).fit(spread(STEPS, 3))
    assert plan.corrections[1:].any()
    assert not plan.corrections[0].any()  # nothing came before it
    bare = Plan(
        computed=plan.computed,
        weights=plan.weights,
        corrections=torch.zeros_like(plan.corrections),
        history=plan.history,
        model=plan.model,
        num_blocks=plan.num_blocks,
        timesteps=plan.timesteps,
    )
    results = []
    for one in (plan, bare):
        with attach(dit, "fitted", plan=one):
            results.append(psnr(run(dit), plain))
    assert results[0] > results[1]


def test_search_only_gets_better(dit: Any) -> None:
    fitter = Fitter(dit, run_of(by_name("dit")))
    best = -math.inf
    tried = 0
    for plan, better in fitter.search(3, rounds=1):
        assert sum(plan.computed) == 3
        assert plan.computed[0]
        assert better == (plan.psnr > best)
        best = max(best, plan.psnr)
        tried += 1
    assert tried > 2


@pytest.mark.parametrize(("steps", "count"), [(20, 10), (20, 7), (7, 7), (5, 1)])
def test_spread(steps: int, count: int) -> None:
    found = spread(steps, count)
    assert len(found) == steps
    assert sum(found) == count
    assert found[0]
    with pytest.raises(DiffusionError, match="1 to"):
        spread(steps, steps + 1)


@pytest.mark.parametrize(
    ("steps", "count"), [(20, 10), (20, 7), (20, 14), (50, 17), (6, 1), (4, 4)]
)
def test_profiles(steps: int, count: int) -> None:
    found = profiles(steps, count)
    assert found[0] == spread(steps, count)
    assert len(set(found)) == len(found) <= 13
    for chosen in found[1:]:
        places = [i for i, done in enumerate(chosen) if done] + [steps]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert places[0] == 0
        assert sum(chosen) == count
        assert gaps == sorted(gaps, reverse=True)


def test_psnr() -> None:
    image = torch.rand(2, 1, 8, 8)
    assert math.isinf(psnr(image, image))
    assert psnr(image + 0.02, image) == pytest.approx(40, abs=1e-3)  # 20 log10(2 / 0.02)


def test_files(dit: Any, tmp_path: Path) -> None:
    run = run_of(by_name("dit"))
    plan = Fitter(dit, run).fit(spread(STEPS, 2))
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = load_plan(path)
    assert loaded.computed == plan.computed
    assert torch.equal(loaded.weights, plan.weights)
    assert torch.equal(loaded.corrections, plan.corrections)
    with attach(dit, "fitted", plan=plan):
        made = run(dit)
    with attach(dit, f"fitted(plan={path})"):
        assert torch.equal(run(dit), made)
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DiffusionError, match=r"plan\.safetensors"):
        load_plan(path)
    with pytest.raises(DiffusionError, match="check the path"):
        load_plan(tmp_path / "none")
    router = Router(
        scores=torch.zeros(3, 2),
        threshold=0.5,
        num_steps=6,
        model="M",
        paths=("a", "b"),
    )
    router.save(path)
    with pytest.raises(DiffusionError, match="no mnemon-fitted-plan"):
        load_plan(path)


def test_refusals(dit: Any) -> None:
    run = run_of(by_name("dit"))
    plan = Fitter(dit, run).fit(spread(STEPS, 2))
    with attach(dit, "fitted", plan=plan):
        with pytest.raises(DiffusionError, match="made for 6 steps at the timesteps"):
            by_name("dit").call(dit, 5, 2, 0)
        with pytest.raises(DiffusionError, match="for 6 steps"):
            by_name("dit").call(dit, 9, 2, 0)
        run(dit)  # and goes on
    with pytest.raises(DiffusionError, match="the plan is of a DiT"):
        attach(by_name("sd3").build(), "fitted", plan=plan)
    with pytest.raises(DiffusionError, match="first"):
        Fitter(dit, run).fit([False] * STEPS)
    with pytest.raises(DiffusionError, match="weights of shape"):
        Plan(
            computed=(True, False),
            weights=torch.zeros(2, 5, 4),
            corrections=torch.zeros(2, 3),
            history=3,
            model="M",
            num_blocks=1,
            timesteps=(2.0, 1.0),
        )
