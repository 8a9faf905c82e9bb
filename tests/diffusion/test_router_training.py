"""Training a router: what learns, what is recorded, interruption and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diffusion.pipelines import by_name

from mnemon.diffusion import Router, attach, load_router
from mnemon.diffusion.fitting import psnr
from mnemon.diffusion.recording import record_runs
from mnemon.diffusion.router_training import RouterOptions, RouterTrainer, draw_schedule, train
from mnemon.errors import DiffusionError

STEPS = 6


def run_of(seed: int, name: str = "dit", steps: int = STEPS) -> Any:
    return lambda pipe: by_name(name).call(pipe, steps, 2, seed)


@pytest.fixture
def pipe() -> Any:
    return by_name("dit").build()


OPTIONS = RouterOptions(steps=12, share=0.5, lam=1e-3, learning_rate=0.2)


def test_recorded_calls_are_the_runs(pipe: Any) -> None:
    """Played back, every recorded call gives its recorded answer; two branches are told apart."""
    calls = record_runs(pipe, pipe.transformer, [run_of(0), run_of(1)])
    assert [(c.run, c.branch, c.index) for c in calls] == [
        (run, 0, index) for run in (0, 1) for index in range(STEPS)
    ]
    for call in calls:
        with torch.no_grad():
            assert torch.equal(pipe.transformer(**call.arguments).sample, call.answer)
    apart = by_name("wan").build()
    calls = record_runs(apart, apart.transformer, [run_of(0, "wan")])
    assert {(c.branch, c.index) for c in calls} == {(b, i) for b in (0, 1) for i in range(STEPS)}


@pytest.mark.parametrize("name", ["dit", "sd3", "wan"])
def test_only_the_scores_learn(name: str) -> None:
    pipe = by_name(name).build()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    flags = [p.requires_grad for p in pipe.transformer.parameters()]
    plain = run_of(5, name)(pipe)
    trainer = RouterTrainer(pipe, [run_of(0, name)], OPTIONS)
    start = trainer.scores.detach().clone()
    router = trainer.run()
    assert not torch.equal(trainer.scores, start)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags
    assert torch.equal(run_of(5, name)(pipe), plain)
    assert router.scores.shape == (STEPS // 2, len(trainer.sites.sublayers))
    assert sum(map(sum, router.computes())) == round(0.5 * router.scores.numel())


def test_one_step_is_the_formula(pipe: Any) -> None:
    """Loss and gradient of the first step against a plain loop over the same recorded calls."""
    trainer = RouterTrainer(pipe, [run_of(0)], RouterOptions(steps=1, share=None, lam=0.3))
    start = trainer.scores.detach().clone()
    noted: list[torch.Tensor] = []

    def note(running: RouterTrainer) -> None:
        state = running._optimiser.state[running.scores]
        noted.append(state["exp_avg"] / 0.1)  # AdamW after one step: (1 - 0.9) times the gradient

    trainer.run(note)
    row = next(i for i in range(len(start)) if not torch.equal(trainer.scores[i], start[i]))
    full, cached = (trainer._calls[0, 0, 2 * row + i] for i in (0, 1))
    model, kept = pipe.transformer, []
    modules = [model.get_submodule(s.path) for s in trainer.sites.sublayers]
    hooks = [m.register_forward_hook(lambda _, __, out: kept.append(out)) for m in modules]
    with torch.no_grad():
        model(**full.arguments)
    for hook in hooks:
        hook.remove()
    scores = start.clone().requires_grad_()
    shares = scores[row].sigmoid()

    def mixing(number: int) -> Any:
        return lambda _, __, out: shares[number] * out + (1 - shares[number]) * kept[number]

    hooks = [m.register_forward_hook(mixing(n)) for n, m in enumerate(modules)]
    said = model(**cached.arguments).sample
    for hook in hooks:
        hook.remove()
    loss = (said - cached.answer).square().mean()
    (loss + 0.3 * shares.sum()).backward()
    assert trainer.loss == pytest.approx(loss.item(), rel=1e-5)
    assert scores.grad is not None
    assert torch.allclose(noted[0], scores.grad, atol=1e-6, rtol=1e-4)


def test_trained_beats_its_opposite(pipe: Any) -> None:
    """What the router computes matters more than what it leaves out."""
    options = RouterOptions(steps=90, share=0.5, lam=1e-3, learning_rate=0.1)
    router = RouterTrainer(pipe, [run_of(0), run_of(1)], options).run()
    opposite = Router(
        scores=-router.scores,
        threshold=0.5,
        num_steps=router.num_steps,
        model=router.model,
        paths=router.paths,
    ).with_share(0.5)
    plain = run_of(9)(pipe)
    found = []
    for one in (router, opposite):
        with attach(pipe, "l2c", router=one):
            found.append(psnr(run_of(9)(pipe), plain))
    assert found[0] > found[1]


def test_resumed_is_uninterrupted(pipe: Any, tmp_path: Path) -> None:
    """A run that was stopped and resumed ends with the scores of one that was not."""
    whole = RouterTrainer(pipe, [run_of(0)], OPTIONS)
    whole.run()
    out = tmp_path / "router.safetensors"

    def stop(running: RouterTrainer) -> None:
        if running.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pipe, [run_of(0)], out, OPTIONS, after_step=stop)
    assert not out.exists()
    assert (tmp_path / "router.checkpoint.pt").exists()
    assert "forward" not in vars(pipe.transformer)  # nothing stays attached
    router = train(pipe, [run_of(0)], out, OPTIONS, resume=True)
    assert torch.equal(router.scores, whole.router().scores)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["router.png", "router.safetensors"]
    loaded = load_router(out)
    assert torch.equal(loaded.scores, router.scores)
    assert loaded.computes() == router.computes()


def test_refusals(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(DiffusionError, match="same number"):
        RouterTrainer(pipe, [run_of(0), run_of(0, steps=5)], OPTIONS)
    with pytest.raises(DiffusionError, match="at least 2"):
        RouterTrainer(pipe, [run_of(0, steps=1)], OPTIONS)
    with pytest.raises(DiffusionError, match="no transformer"):
        RouterTrainer(object(), [run_of(0)], OPTIONS)
    trainer = RouterTrainer(pipe, [run_of(0)], OPTIONS)
    with pytest.raises(DiffusionError, match="no checkpoint"):
        trainer.load(tmp_path / "none.pt")
    trainer.save(tmp_path / "c.pt")
    other = RouterTrainer(pipe, [run_of(0)], RouterOptions(steps=13))
    with pytest.raises(DiffusionError, match="same options"):
        other.load(tmp_path / "c.pt")
    with pytest.raises(DiffusionError, match="share=2"):
        RouterOptions(share=2)


def test_picture(tmp_path: Path) -> None:
    router = Router(
        scores=torch.randn(10, 16),
        threshold=0.5,
        num_steps=20,
        model="DiTTransformer2DModel",
        paths=tuple(f"blocks.{i // 2}.{('attn', 'ff')[i % 2]}" for i in range(16)),
    )
    draw_schedule(router, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
