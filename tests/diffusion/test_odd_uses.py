"""Uses that once gave other numbers without an error, or a cache that did nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_file
from tests.diffusion.pipelines import by_name
from tests.diffusion.toys import tiny_dit
from torch import Tensor

from mnemon.diffusion import attach, find_sites, load_router
from mnemon.diffusion.diffmoe import install
from mnemon.diffusion.fitting import Fitter, spread
from mnemon.diffusion.methods.fitted import load_plan
from mnemon.errors import DiffusionError

LABELS = torch.tensor([3, 7])


def call(model: Any, time: float, labels: Tensor = LABELS, seed: int = 0) -> Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    times = torch.full((2,), time, dtype=torch.float64)
    with torch.no_grad():
        found: Tensor = model(noise * (1 + time), timestep=times, class_labels=labels).sample
    return found


@pytest.mark.parametrize("skipped", [[2], [0], [1]])
def test_skipped_layers(skipped: list[int]) -> None:
    """A model that runs without some blocks: refused by stretches, right by sublayers."""
    pipe = by_name("sd3").build()
    model = pipe.transformer
    given: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    by_name("sd3").call(pipe, 2, 2, 0)
    hook.remove()
    arguments = {**given[0], "skip_layers": skipped}
    with torch.no_grad():
        plain = model(**arguments)[0]
        for method in ("interval(level=stack)", "taylor(level=stack)", "first_block", "duca"):
            with attach(model, method), pytest.raises(DiffusionError, match="skip_layers"):
                model(**arguments)
        with attach(model, "interval(interval=2)"):
            assert torch.equal(model(**arguments)[0], plain)
            later = {**arguments, "timestep": arguments["timestep"] - 1}
            assert torch.isfinite(model(**later)[0]).all()


def test_a_forward_that_was_replaced() -> None:
    """As offloading hooks do: the cache would be dead, without a word."""
    model = tiny_dit()
    attached = attach(model, "interval")
    call(model, 900)
    model.forward = type(model).forward.__get__(model)
    with pytest.raises(DiffusionError, match="offloading"):
        call(model, 800)
    attached.detach()
    assert torch.isfinite(call(model, 800)).all()


@pytest.mark.parametrize("told", ["1-t", "(1000-t)", "inversion"])
def test_time_that_rises(told: str) -> None:
    model = tiny_dit()
    scheduler = DDIMScheduler()
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    with attach(pipe, "interval(interval=2)") as attached:
        for _ in range(2):
            scheduler.set_timesteps(6)
            times = scheduler.timesteps.tolist()
            if told == "inversion":
                times.reverse()
                for listener in scheduler.set_timesteps.listeners:  # type: ignore[attr-defined]
                    listener("DDIMInverseScheduler", times)
            for time in times:
                call(model, {"1-t": 1 - time / 1000, "(1000-t)": 1000 - time}.get(told, time))
        report = attached.report()
    assert report.runs == 2
    assert report.computed_share == 0.5


def test_the_first_of_two_branches_drops_out() -> None:
    """Guidance for a part of the steps, unnamed branches: the other keeps its own features."""
    free, wanted = torch.tensor([1000, 1000]), LABELS
    alone, model = tiny_dit(), tiny_dit()
    with attach(alone, "interval(interval=3)"):
        expected = [call(alone, time, wanted) for time in (900, 800, 700, 600)]
    with attach(model, "interval(interval=3)"):
        found = []
        for time in (900, 800, 700, 600):
            if time > 750:
                call(model, time, free)
            found.append(call(model, time, wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_prompt_in_mid_run() -> None:
    model, fresh = tiny_dit(), tiny_dit()
    other = torch.tensor([5, 9])
    with attach(model, "interval(interval=3)"):
        call(model, 900)
        found = call(model, 800, other)
    assert torch.equal(found, call(fresh, 800, other))


def test_a_plan_elsewhere() -> None:
    """Another scheduler is refused; a start in the middle is served."""
    tiny = by_name("dit")
    pipe = tiny.build()
    plan = Fitter(pipe, lambda p: tiny.call(p, 6, 2, 0)).fit(spread(6, 3))
    own = pipe.scheduler
    pipe.scheduler = LCMScheduler.from_config(own.config)
    with pytest.raises(DiffusionError, match="fitted for DDIMScheduler, the pipeline has LCM"):
        attach(pipe, "fitted", plan=plan)
    pipe.scheduler = own
    with attach(pipe, "fitted", plan=plan) as attached:
        plain = copy.deepcopy(pipe.transformer)
        own.set_timesteps(6)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        arguments = {"class_labels": LABELS}
        time = own.timesteps[3].expand(2)
        with torch.no_grad():
            found = pipe.transformer(latents, timestep=time, **arguments).sample
            assert torch.equal(found, plain(latents, timestep=time, **arguments).sample)
        assert attached.report().computed_share == 1


def test_diffusers_own_cache_beside_ours() -> None:
    from diffusers import FirstBlockCacheConfig

    model = by_name("flux").build().transformer
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(DiffusionError, match="disable_cache"):
        attach(model, "interval")


def test_experts_are_not_token_wise() -> None:
    model = tiny_dit(dtype=torch.float32)
    assert all(s.per_token for s in find_sites(model).sublayers if s.kind == "mlp")
    install(model, kind="diffmoe", num_experts=2, every=1)
    assert not any(s.per_token for s in find_sites(model).sublayers)
    with pytest.raises(DiffusionError, match="none"):
        attach(model, "toca")


ROUTER = {
    "threshold": 0.5,
    "num_steps": 4,
    "timesteps": [4, 3, 2, 1],
    "model": "M",
    "paths": ["a", "b"],
}
PLAN = {
    "computed": [1, 0],
    "history": 1,
    "model": "M",
    "num_blocks": 3,
    "timesteps": [2, 1],
    "sampler": "",
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("l2c-router", {"threshold": v}) for v in (float("nan"), float("inf"), "x", None, True)),
        *(("l2c-router", {"num_steps": v}) for v in (4.5, float("inf"), 0, -4, "4", 5)),
        *(("l2c-router", {"paths": v}) for v in ("ab", ["a"], [1, 2], {"a": 1})),
        ("l2c-router", {"timesteps": [1, 2]}),
        *(("fitted-plan", {"computed": v}) for v in ("ab", {"a": 1}, ["x", "y"], [0, 1], [])),
        *(("fitted-plan", {"history": v}) for v in (1.9, float("inf"), 0, 2)),
        ("fitted-plan", {"timesteps": [2]}),
        ("fitted-plan", {"num_blocks": float("inf")}),
    ],
)
def test_files_that_lie(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    tensors = {"scores": torch.zeros(2, 2), "weights": torch.zeros(2, 4, 5)}
    tensors["corrections"] = torch.zeros(2, 3)
    path = tmp_path / "file.safetensors"
    read: Any = load_router if kind == "l2c-router" else load_plan
    good = ROUTER if kind == "l2c-router" else PLAN
    for fields in (good, {**good, **change}):
        save_file(tensors, path, {"format": f"mnemon-{kind}", "fields": json.dumps(fields)})
        if fields is good:
            read(path)
        else:
            with pytest.raises(DiffusionError):
                read(path)
    tensors = {name: tensor.to(torch.complex64) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": f"mnemon-{kind}", "fields": json.dumps(good)})
    with pytest.raises(DiffusionError, match="complex64"):
        read(path)


def test_the_next_run_has_the_other_branch_first() -> None:
    """What a branch of the run before was told says nothing about this one."""
    free, wanted = torch.tensor([1000, 1000]), LABELS
    fresh, model = tiny_dit(), tiny_dit()

    def run(of: Any, *branches: Tensor) -> list[Tensor]:
        return [call(of, time, labels) for time in (900, 800, 700) for labels in branches]

    with attach(fresh, "interval(interval=3)") as attached:
        expected = run(fresh, free, wanted)
    with attach(model, "interval(interval=3)") as attached:
        run(model, wanted, free)
        attached.clear_report()
        found = run(model, free, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert attached.report().computed_share == pytest.approx(1 / 3)
