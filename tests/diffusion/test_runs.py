"""Runs, branches, schedulers, errors, copies, threads and compilers around an attached model."""

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo
from diffusers.models.cache_utils import CacheMixin
from tests.diffusion.pipelines import PIPELINES, by_name
from tests.diffusion.toys import NoisyLoop, Replay, Toy, attributes, l2c, router, tiny_dit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mnemon.diffusion import METHODS, Attachment, Method, attach, detach, make_method
from mnemon.errors import DiffusionError, NoSites

STEPS, BATCH = 6, 2
SETTINGS = (
    "interval(interval=2)",
    "interval(interval=2, level=stack)",
    "taylor(order=1, interval=3)",
    "taylor(order=1, interval=3, level=stack)",
    "first_block(threshold=10)",
    "dbcache(threshold=10, back=1, longest=2, order=1)",
    "toca(interval=3, ratio=0.2)",
    "toca(interval=3, ratio=0.2, score=attention)",
    "duca(interval=4, ratio=0.2)",
    "l2c",
)
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def _method(setting: str, model: nn.Module, steps: int = STEPS) -> Method:
    return l2c(model, steps, score=-5.0) if setting == "l2c" else make_method(setting)


@functools.cache
def _fresh(name: str, setting: str, steps: int = STEPS, batch: int = BATCH) -> Tensor:
    """The first run of a pipeline that nobody used before."""
    tiny = by_name(name)
    pipeline = tiny.build()
    with attach(pipeline, _method(setting, pipeline.transformer, steps)):
        return tiny.call(pipeline, steps, batch, 0)


def _dit() -> nn.Module:
    return tiny_dit(dtype=torch.float32)


# -- one run after another ---------------------------------------------------------------------


@each_setting
def test_the_same_seed_gives_the_same_result_four_times(setting: str) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    expected = _fresh("dit", setting)
    with attach(pipeline, _method(setting, pipeline.transformer)) as cached:
        for _ in range(4):
            assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)
    assert cached.report().runs == 4


@each_setting
def test_a_bare_loop_repeats_too(setting: str) -> None:
    model = _dit()
    loop = NoisyLoop(model)
    plain = loop(0)
    with attach(model, _method(setting, model)) as cached:
        first = loop(0)
        assert not torch.equal(first, plain)
        other = loop(1)
        assert torch.equal(loop(0), first)
        assert torch.equal(loop(1), other)
        assert cached.report().runs == 4
    assert torch.equal(loop(0), plain)


@each_setting
def test_batch_of_4_then_of_2(setting: str) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    with attach(pipeline, _method(setting, pipeline.transformer)):
        four = tiny.call(pipeline, STEPS, 4, 0)
        two = tiny.call(pipeline, STEPS, 2, 0)
        assert torch.equal(tiny.call(pipeline, STEPS, 4, 0), four)
    assert torch.equal(four, _fresh("dit", setting, batch=4))
    assert torch.equal(two, _fresh("dit", setting, batch=2))


@each_setting
def test_another_batch_or_resolution_in_a_bare_loop(setting: str) -> None:
    def alone(**shape: int) -> Tensor:
        model = _sized()
        with attach(model, _method(setting, model)):
            return NoisyLoop(model, **shape)(0)

    model = _sized()
    with attach(model, _method(setting, model)):
        for shape in ({"batch": 4}, {"batch": 2}, {"size": 4}, {"size": 8}):
            assert torch.equal(NoisyLoop(model, **shape)(0), alone(**shape))
            with pytest.raises(_Stop):
                NoisyLoop(model, **shape)(1, each=_stop_at(2))


def _sized() -> nn.Module:
    """A DiT that takes any size: its positions are those of the size that comes."""
    model: Any = _dit()
    positions = model.pos_embed.pos_embed

    def patches(x: Tensor) -> Tensor:
        found = model.pos_embed.proj(x).flatten(2).transpose(1, 2)
        return found + positions[:, : found.shape[1]]

    model.pos_embed.forward = patches
    return model


@each_setting
def test_another_batch_in_mid_run_is_another_run(setting: str) -> None:
    """Nothing else tells so: timesteps go on falling."""
    labels = torch.tensor([3, 10, 17])

    def steps(model: nn.Module, batches: list[int], timesteps: list[int]) -> list[Tensor]:
        noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return [
            model(noise[:n] * t, timestep=torch.full((n,), t), class_labels=labels[:n]).sample
            for n, t in zip(batches, timesteps, strict=True)
        ]

    model, other = _dit(), _dit()
    with attach(model, _method(setting, model)), attach(other, _method(setting, other)):
        found = steps(model, [2, 2, 3, 3, 3, 3], [900, 800, 700, 600, 500, 400])[2:]
        expected = steps(other, [3, 3, 3, 3], [700, 600, 500, 400])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_announcement_lets_go_of_what_was_kept() -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    with attach(pipeline, "interval(interval=3)") as cached:
        tiny.call(pipeline, STEPS, BATCH, 0)
        assert cached.nbytes > 0
        pipeline.scheduler.set_timesteps(3)
        assert cached.nbytes == 0


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
@each_setting
def test_any_number_of_steps(setting: str, steps: int) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    plain = tiny.call(pipeline, steps, BATCH, 0)
    with attach(pipeline, _method(setting, pipeline.transformer, steps)) as cached:
        first = tiny.call(pipeline, steps, BATCH, 0)
        assert torch.equal(tiny.call(pipeline, steps, BATCH, 0), first)
        assert first.isfinite().all()
        assert cached.report().evaluations == 2 * steps
    if steps == 1:
        assert torch.equal(first, plain)
        assert cached.report().computed_share == 1


def test_another_number_of_steps_in_the_next_run() -> None:
    setting = "duca(interval=4, ratio=0.2)"
    tiny = by_name("dit")
    pipeline = tiny.build()
    with attach(pipeline, setting):
        for steps in (6, 9, 3, 1, 6):
            result = tiny.call(pipeline, steps, BATCH, 0)
            assert torch.equal(result, _fresh("dit", setting, steps=steps))


def test_single_steps_in_a_bare_loop_are_computed_each_time() -> None:
    model = _dit()
    plain = [NoisyLoop(model, steps=1)(seed) for seed in range(3)]
    with attach(model, "interval(interval=3)") as cached:
        for seed in (0, 1, 2, 0):
            assert torch.equal(NoisyLoop(model, steps=1)(seed), plain[seed])
    assert cached.report().computed_share == 1


# -- pipelines that share ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "flux-true-cfg", "wan"])
def test_of_two_pipelines_one_is_detached(name: str) -> None:
    setting = "interval(interval=3)"
    tiny = by_name(name)
    one, two = tiny.build(), tiny.build()
    plain, expected = tiny.call(one, STEPS, BATCH, 0), _fresh(name, setting)
    first, second = attach(one, setting), attach(two, setting)
    for pipeline in (one, two):
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)
    first.detach()
    assert torch.equal(tiny.call(one, STEPS, BATCH, 0), plain)
    assert torch.equal(tiny.call(two, STEPS, BATCH, 0), expected)
    with attach(tiny.build(), setting):  # and a new one can be attached
        assert torch.equal(tiny.call(two, STEPS, BATCH, 0), expected)
    second.detach()
    assert torch.equal(tiny.call(two, STEPS, BATCH, 0), plain)


@pytest.mark.parametrize("first_detached", [0, 1])
@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_two_pipelines_share_a_scheduler(name: str, first_detached: int) -> None:
    setting = "taylor(order=1, interval=3)"
    tiny = by_name(name)
    pipelines = [tiny.build(), tiny.build()]
    pipelines[1].scheduler = pipelines[0].scheduler
    plain, expected = tiny.call(pipelines[0], STEPS, BATCH, 0), _fresh(name, setting)
    tiny.call(pipelines[1], STEPS, BATCH, 0)
    before = [attributes(pipeline) for pipeline in pipelines]
    cached = [attach(pipeline, setting) for pipeline in pipelines]
    for _ in range(2):
        for pipeline in pipelines:
            assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)
    assert all(c.report().runs == 2 for c in cached)
    cached[first_detached].detach()
    assert torch.equal(tiny.call(pipelines[first_detached], STEPS, BATCH, 0), plain)
    other = pipelines[1 - first_detached]
    with _fails(other.scheduler, "step", 0, _Stop), pytest.raises(_Stop):
        tiny.call(other, STEPS, BATCH, 5)
    # Only an announcement tells that what follows this first step is another run.
    assert torch.equal(tiny.call(other, STEPS, BATCH, 0), expected)
    cached[1 - first_detached].detach()
    assert [attributes(pipeline) for pipeline in pipelines] == before
    assert torch.equal(tiny.call(pipelines[1 - first_detached], STEPS, BATCH, 0), plain)


def test_two_pipelines_share_a_transformer() -> None:
    setting = "interval(interval=2)"
    tiny = by_name("dit")
    one, two = tiny.build(), tiny.build()
    two.transformer = one.transformer
    two.scheduler = diffusers.DPMSolverMultistepScheduler()
    with _numpy_warns_of_solvers():
        plain = tiny.call(two, STEPS, BATCH, 0)
        with attach(two, setting):
            solver = tiny.call(two, STEPS, BATCH, 0)
        with attach(one, setting):
            with pytest.raises(DiffusionError, match="attached to this DiT"):
                attach(two, setting)
            expected = tiny.call(one, STEPS, BATCH, 0)
            # Nobody announces the runs of the second: they are told apart by their timesteps.
            assert torch.equal(tiny.call(two, STEPS, BATCH, 0), solver)
            assert torch.equal(tiny.call(one, STEPS, BATCH, 0), expected)
            assert torch.equal(tiny.call(two, STEPS, BATCH, 0), solver)
        assert torch.equal(tiny.call(two, STEPS, BATCH, 0), plain)


@contextmanager
def _numpy_warns_of_solvers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        yield


# -- solvers -----------------------------------------------------------------------------------


def _with_scheduler(scheduler: Any) -> Any:
    pipeline = by_name("dit").build()
    pipeline.scheduler = scheduler
    return pipeline


def test_heun_evaluates_twice_and_each_has_its_features() -> None:
    """t0, t1 t1, t2 t2, t3 t3: the first at a timestep follows the first, the second the second."""
    tiny = by_name("dit")
    sources = [None, 0, None, None, 2, 3, None]
    with _numpy_warns_of_solvers():
        pipeline = _with_scheduler(diffusers.HeunDiscreteScheduler())
        with Replay(pipeline.transformer, sources):
            expected = tiny.call(pipeline, 4, BATCH, 0)
        with attach(pipeline, "interval(interval=2)") as cached:
            for _ in range(2):
                assert torch.equal(tiny.call(pipeline, 4, BATCH, 0), expected)
        report = cached.report()
    assert (report.runs, report.evaluations) == (2, 14)
    (tally,) = report.tallies.values()
    assert [set(row) for row in tally.schedule] == [{float(s is None)} for s in sources]


def test_heun_in_a_bare_loop() -> None:
    model = _dit()

    def sample() -> Tensor:
        with _numpy_warns_of_solvers():
            scheduler = diffusers.HeunDiscreteScheduler()
            scheduler.set_timesteps(4)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        for t in scheduler.timesteps:
            out = model(
                scheduler.scale_model_input(x, t),
                timestep=t.expand(2),
                class_labels=torch.tensor([1, 2]),
                return_dict=False,
            )[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    with Replay(model, [None, 0, None, None, 2, 3, None]):
        expected = sample()
    with attach(model, "interval(interval=2)"):
        for _ in range(2):
            assert torch.equal(sample(), expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.DEISMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.KDPM2DiscreteScheduler,
    ],
)
def test_solvers_of_higher_order(scheduler: Any) -> None:
    """One evaluation at a timestep, whatever else the solver keeps."""
    tiny = by_name("dit")
    with _numpy_warns_of_solvers():
        pipeline = _with_scheduler(scheduler())
        with attach(pipeline, "interval(interval=3)") as cached:
            first = tiny.call(pipeline, 7, BATCH, 0)
            assert torch.equal(tiny.call(pipeline, 7, BATCH, 0), first)
        count = cached.report().evaluations // 2
        assert count in (7, 13)  # KDPM2 has a timestep in the middle of each interval
        sources = [None if n % 3 == 0 else n - n % 3 for n in range(count)]
        with Replay(pipeline.transformer, sources):
            assert torch.equal(tiny.call(pipeline, 7, BATCH, 0), first)


# -- branches ----------------------------------------------------------------------------------


class _Named(Toy, CacheMixin):
    """A toy with diffusers' `cache_context`."""


def test_unnamed_branches_never_share() -> None:
    model = Toy().requires_grad_(False)
    # The two branches of one step get the same latents, as guidance does; what they attend to
    # differs. Here the sign of a weight is the text.
    shared = torch.ones(1, 2, dtype=torch.float64)
    with attach(model, "interval(interval=3)") as cached:
        for number in range(6):
            for sign in (-1.0, 1.0):
                for block in model.blocks:
                    block.attn.weight.fill_(0.3 * sign)
                model(shared * (number + 1), torch.tensor([900.0 - 100 * number]))
        assert cached.report().runs == 1
    for block in model.blocks:
        for number, (attention, _) in enumerate(block.received):
            source = number // 6 * 6 + number % 2
            assert attention is block.received[source][0]
        assert len(block.attn.seen) == 4
        signs = [float((a[0, 0]).sign()) for a, _ in block.received]
        assert signs[::2] != signs[1::2]


LATENTS = {"cond": 1.0, "uncond": -7.0}


def _received(calls: list[tuple[int, str]], interval: int) -> None:
    """Calls (step, branch) of a toy; each branch gets what its own latest full step returned."""
    model = _Named().requires_grad_(False)
    with attach(model, "interval", interval=interval):
        for step, name in calls:
            latents = torch.full((1, 2), LATENTS[name] * (1 + step), dtype=torch.float64)
            with model.cache_context(name):
                model(latents, torch.tensor([900.0 - 100 * step]))
    for block in model.blocks:
        for name in LATENTS:
            mine = [n for n, (_, branch) in enumerate(calls) if branch == name]
            for count, number in enumerate(mine):
                source = mine[count - count % interval]
                for now, then in zip(block.received[number], block.received[source], strict=True):
                    assert now is then
        assert len({id(attention) for attention, _ in block.received}) == sum(
            -(-sum(branch == name for _, branch in calls) // interval) for name in LATENTS
        )
    # What the first block received comes from its own branch's latents.
    first: Any = model.blocks[0]
    for (_, name), (attention, _) in zip(calls, first.received, strict=True):
        assert attention[0, 0] * LATENTS[name] > 0


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("order", ["kept", "swapped", "uncond first"])
def test_named_branches_never_share(order: str, interval: int) -> None:
    """Even where they have other latents, and where their order changes from step to step."""
    calls = []
    for step in range(6):
        turned = order == "uncond first" or (order == "swapped" and step % 2)
        calls += [(step, name) for name in sorted(LATENTS, reverse=bool(turned))]
    _received(calls, interval)


@pytest.mark.parametrize("interval", [2, 3])
def test_a_branch_that_joins_late_or_pauses_has_its_own_count(interval: int) -> None:
    calls = [(step, "cond") for step in range(6)] + [(step, "uncond") for step in (1, 2, 5)]
    _received(sorted(calls), interval)


SEPARATE = [t for t in PIPELINES if t.guidance == "separate"]


@pytest.mark.parametrize("tiny", SEPARATE, ids=lambda tiny: tiny.name)
def test_separate_guidance_is_what_two_caches_would_do(tiny: Any) -> None:
    pipeline = tiny.build()
    sources = [None, None, 0, 1, 2, 3, None, None, 6, 7, 8, 9]
    with Replay(pipeline.transformer, sources):
        expected = tiny.call(pipeline, STEPS, BATCH, 0)
    with attach(pipeline, "interval(interval=3)"):
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)


def test_two_runs_in_lockstep_keep_to_themselves() -> None:
    """Each is as if it were alone, but that both compute the second step: who is who is unknown."""
    model = _dit()
    loop = NoisyLoop(model)
    expected = []
    for seed in (0, 1):
        with Replay(model, [None, None, 1, None, 3, None]):
            expected.append(loop(seed))
    with attach(model, "interval(interval=2)"):
        for seed, result in enumerate(_lockstep(loop, (0, 1))):
            assert torch.equal(result, expected[seed])
        for seed, result in enumerate(_lockstep(loop, (1, 0))):  # again, the other first
            assert torch.equal(result, expected[1 - seed])


def _lockstep(loop: NoisyLoop, seeds: tuple[int, ...]) -> list[Tensor]:
    noise = [
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    labels = torch.arange(2) * 7 + 3
    for timestep in loop.timesteps:
        for n, x in enumerate(noise):
            times = torch.full((2,), timestep)
            out = loop.model(x, timestep=times, class_labels=labels, return_dict=False)[0]
            noise[n] = x - out / loop.steps
    return noise


# -- errors in mid-run -------------------------------------------------------------------------


class _Stop(Exception):
    pass


def _stop_at(step: int, error: type[BaseException] = _Stop) -> Callable[[int, Tensor], None]:
    def each(number: int, output: Tensor) -> None:
        if number == step:
            raise error

    return each


@contextmanager
def _fails(owner: Any, name: str, call: int, error: type[BaseException]) -> Iterator[None]:
    """The method `name` of `owner` raises in its call number `call`."""
    original, count = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call + 1:
            raise error
        return original(*args, **kwargs)

    wrapper.__wrapped__ = original  # type: ignore[attr-defined]  # pipelines read signatures
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        delattr(owner, name)


@pytest.mark.parametrize(
    ("call", "error"), [(0, _Stop), (1, KeyboardInterrupt), (2, _Stop), (3, KeyboardInterrupt)]
)
@each_setting
def test_an_error_in_a_sublayer(setting: str, call: int, error: type[BaseException]) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    model = pipeline.transformer
    inner = model.transformer_blocks[1].ff.net[2]
    expected = _fresh("dit", setting)
    with attach(pipeline, _method(setting, model)) as cached:
        # What computes it less often than at every step fails in a later run.
        with _fails(inner, "forward", call, error):
            while True:
                try:
                    tiny.call(pipeline, STEPS, BATCH, 5)
                except error:
                    break
        assert cached.nbytes == 0
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)


@pytest.mark.parametrize(
    ("step", "error"), [(0, KeyboardInterrupt), (1, _Stop), (4, KeyboardInterrupt)]
)
@each_setting
def test_an_error_in_the_scheduler(setting: str, step: int, error: type[BaseException]) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    expected = _fresh("dit", setting)
    with attach(pipeline, _method(setting, pipeline.transformer)):
        with _fails(pipeline.scheduler, "step", step, error), pytest.raises(error):
            tiny.call(pipeline, STEPS, BATCH, 5)
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)


def test_an_error_in_separate_branches() -> None:
    tiny = by_name("flux-true-cfg")
    pipeline = tiny.build()
    setting = "interval(interval=2)"
    with attach(pipeline, setting):
        for step in range(4):  # the first branch ran, the second did not
            inner = pipeline.transformer.x_embedder
            with _fails(inner, "forward", 2 * step + 1, _Stop), pytest.raises(_Stop):
                tiny.call(pipeline, STEPS, BATCH, 5)
            result = tiny.call(pipeline, STEPS, BATCH, 0)
            assert torch.equal(result, _fresh("flux-true-cfg", setting))


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@each_setting
def test_a_bare_loop_that_stops(setting: str, step: int) -> None:
    model, other = _dit(), _dit()
    with attach(other, _method(setting, other)):
        expected = NoisyLoop(other)(0)
    with attach(model, _method(setting, model)):
        with pytest.raises(_Stop):
            NoisyLoop(model)(1, each=_stop_at(step))
        assert torch.equal(NoisyLoop(model)(0), expected)
        assert torch.equal(NoisyLoop(model)(0), expected)


def test_a_bare_loop_that_stops_after_its_first_step() -> None:
    """Nobody can tell a new run from another branch then: its second step is computed, too."""
    model = _dit()
    with Replay(model, [None, None, 1, None, 3, None]):
        careful = NoisyLoop(model)(0)
    with Replay(model, [None, 0, None, 2, None, 4]):
        expected = NoisyLoop(model)(0)
    with attach(model, "interval(interval=2)") as cached:
        for _ in range(2):
            with pytest.raises(_Stop):
                NoisyLoop(model)(1, each=_stop_at(0))
            assert torch.equal(NoisyLoop(model)(0), careful)
            assert torch.equal(NoisyLoop(model)(0), expected)
        with pytest.raises(_Stop):
            NoisyLoop(model)(1, each=_stop_at(0))
        cached.reset()
        assert cached.nbytes == 0
        assert torch.equal(NoisyLoop(model)(0), expected)


@each_setting
def test_no_method_uses_what_a_stopped_first_step_left(setting: str) -> None:
    """The result does not depend on what the stopped run saw."""

    def after(seed: int, **shape: int) -> Tensor:
        model = _sized()
        with attach(model, _method(setting, model)):
            with pytest.raises(_Stop):
                NoisyLoop(model, **shape)(seed, each=_stop_at(0))
            return NoisyLoop(model)(0)

    assert torch.equal(after(1), after(2))
    assert torch.equal(after(0, batch=3), after(1, size=4))


# -- what is refused ---------------------------------------------------------------------------


def test_attaching_twice() -> None:
    pipeline = by_name("dit").build()
    first = attach(pipeline, "interval")
    for target in (pipeline, pipeline.transformer):
        with pytest.raises(DiffusionError, match=r"attached to this DiT.*detach"):
            attach(target, "taylor")
    detach(pipeline)
    assert first.nbytes == 0
    with attach(pipeline.transformer, "taylor"), pytest.raises(DiffusionError, match="attached"):
        attach(pipeline, "interval")
    detach(pipeline)
    detach(pipeline.transformer)
    first.detach()
    attach(pipeline, "interval").detach()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fora", {}, ", ".join(METHODS)),
        ("", {}, ", ".join(METHODS)),
        (3, {}, ", ".join(METHODS)),
        ("interval(", {}, "expected one of"),
        ("interval)x", {}, "expected one of"),
        ("interval(__import__('os'))", {}, "expected one of"),
        ("interval", {"order": 1}, "it has interval, level"),
        ("taylor(orders=1)", {}, "it has order, interval, warmup, level"),
        ("interval(2, stack, 3)", {}, "has 2 options"),
        ("l2c", {}, "router"),
        ("interval", {"interval": 0}, "whole number from 1 on"),
        ("interval", {"interval": 2.0}, "whole number from 1 on"),
        ("interval", {"interval": True}, "whole number"),
        ("interval(interval=two)", {}, "whole number"),
        ("interval", {"level": "block"}, "sublayer, stack"),
        ("taylor", {"order": -1}, "whole number from 0 on"),
        ("taylor", {"warmup": 0}, "whole number from 1 on"),
        ("taylor", {"level": ""}, "sublayer, stack"),
        ("first_block", {"threshold": -0.1}, "a number from 0 on"),
        ("first_block", {"threshold": float("nan")}, "a number from 0 on"),
        ("first_block", {"threshold": "0.1"}, "a number from 0 on"),
        ("dbcache", {"front": 0}, "whole number from 1 on"),
        ("dbcache", {"back": -1}, "whole number from 0 on"),
        ("dbcache", {"longest": 0}, "whole number from 1 on"),
        ("dbcache", {"order": None}, "whole number from 0 on"),
        ("toca", {"ratio": 1.5}, "from 0 to 1"),
        ("toca", {"score": "entropy"}, "value_norm, attention, random"),
        ("duca", {"bonus": -1}, "a number from 0 on"),
        ("duca", {"seed": -1}, "whole number"),
    ],
)
def test_methods_and_options_that_are_refused(
    method: Any, options: dict[str, Any], message: str
) -> None:
    pipeline = by_name("dit").build()
    before = attributes(pipeline)
    with pytest.raises(DiffusionError) as raised:
        attach(pipeline, method, **options)
    assert message in str(raised.value)
    assert attributes(pipeline) == before


def test_texts_of_methods() -> None:
    method = make_method("taylor(order=1, interval=3)")
    assert method == make_method("taylor", order=1, interval=3) == make_method("taylor(1, 3)")
    assert str(method) == "taylor(order=1, interval=3, warmup=1, level=sublayer)"
    assert make_method(str(method)) == method
    assert make_method("taylor(order=1)", interval=3) == method
    assert make_method(" taylor ( interval = 3 , order = 1 ) ") == method
    assert make_method("dbcache(longest=none, threshold=1e-2)") == make_method(
        "dbcache", threshold=0.01
    )
    assert make_method(method) is method
    with pytest.raises(DiffusionError, match="to the method itself"):
        make_method(method, order=2)


def test_wrong_objects() -> None:
    class Unet:
        unet = nn.Linear(1, 1)

    with pytest.raises(DiffusionError, match="UNets are not served"):
        attach(Unet(), "interval")
    for wrong in (None, "pipe", 3, object()):
        with pytest.raises(DiffusionError, match="was expected"):
            attach(wrong, "interval")
    with pytest.raises(NoSites, match="ModuleLists"):
        attach(nn.Linear(1, 1), "interval")
    detach(Unet())
    detach(nn.Linear(1, 1))


def test_a_real_unet_pipeline() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(DiffusionError, match=r"DDIMPipeline came.*UNets are not served"):
        attach(pipeline, "interval")


def test_blocks_of_unknown_models_are_refused() -> None:
    model = Toy()
    for method in ("interval(level=stack)", "first_block", "dbcache", "taylor(level=stack)"):
        with pytest.raises(DiffusionError, match="at the level of sublayers"):
            attach(model, method)
    assert not any("mnemon" in name for name in vars(model))


def test_a_model_without_timesteps() -> None:
    class Timeless(Toy):
        def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states

    with pytest.raises(DiffusionError, match="takes hidden_states: none of timestep"):
        attach(Timeless(), "interval")


@pytest.mark.parametrize("text", ["front=4", "front=2, back=1", "front=1, back=2"])
def test_too_many_blocks_in_front_or_at_the_back_are_refused_at_once(text: str) -> None:
    model = _dit()
    with pytest.raises(DiffusionError, match="blocks"):
        attach(model, f"dbcache({text})")


def test_chunked_feed_forward_is_refused_every_time() -> None:
    model: Any = _dit()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(8, 1)
    plain = NoisyLoop(model)(0)
    with attach(model, "interval(interval=2)"):
        for _ in range(3):
            with pytest.raises(DiffusionError, match=r"ff ran 2 times.*chunking"):
                NoisyLoop(model)(0)
    assert torch.equal(NoisyLoop(model)(0), plain)


def test_chunking_that_is_switched_on_later_is_refused_too() -> None:
    model: Any = _dit()
    with attach(model, "interval(interval=2)"):
        NoisyLoop(model)(0)
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(8, 1)
        with pytest.raises(DiffusionError, match=r"ff ran 2 times.*chunking"):
            NoisyLoop(model)(0)


def test_a_call_from_within_is_an_error() -> None:
    model: Any = _dit()
    loop = NoisyLoop(model)
    plain = loop(0)
    handle = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: loop(1) and None)
    with attach(model, "interval(interval=2)"):
        with pytest.raises(DiffusionError, match="from within itself"):
            loop(0)
        handle.remove()
        first = loop(0)
        assert torch.equal(loop(0), first)
    assert torch.equal(loop(0), plain)


def test_a_call_from_another_thread_is_an_error_and_harms_nobody() -> None:
    model: Any = _dit()
    loop = NoisyLoop(model)
    errors: list[BaseException] = []

    def other() -> None:
        try:
            loop(1)
        except BaseException as error:
            errors.append(error)

    def meddle(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with attach(model, "interval(interval=2)") as cached:
        expected = loop(0)
        handle = model.transformer_blocks[1].register_forward_pre_hook(meddle)
        assert torch.equal(loop(0), expected)
        handle.remove()
        assert torch.equal(loop(0), expected)
    assert len(errors) == STEPS
    assert all(isinstance(e, DiffusionError) for e in errors)
    assert "another thread" in str(errors[0])
    assert cached.report().evaluations == 3 * STEPS


def test_one_thread_after_the_other_is_no_error() -> None:
    model = _dit()
    loop = NoisyLoop(model)
    results: list[Tensor] = []
    with attach(model, "interval(interval=2)"):
        expected = loop(0)
        thread = threading.Thread(target=lambda: results.append(loop(0)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)


# -- copies, files, states ---------------------------------------------------------------------


@each_setting
def test_a_copy_is_a_plain_model(setting: str) -> None:
    model = _dit()
    plain = NoisyLoop(model)(0)
    cached = attach(model, _method(setting, model))
    expected = NoisyLoop(model)(0)
    copied = copy.deepcopy(model)  # in the midst of features
    assert torch.equal(NoisyLoop(copied)(0), plain)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(NoisyLoop(model)(0), expected)
    assert cached.report().evaluations == 2 * STEPS
    cached.detach()
    again = copy.deepcopy(copied)
    again.load_state_dict(model.state_dict())
    with attach(again, _method(setting, again)):  # and can be attached itself
        assert torch.equal(NoisyLoop(again)(0), expected)
    assert torch.equal(NoisyLoop(again)(0), plain)


def test_a_copy_of_a_pipeline() -> None:
    tiny = by_name("flux-true-cfg")
    pipeline = tiny.build()
    plain = tiny.call(pipeline, STEPS, BATCH, 0)
    with attach(pipeline, "interval(interval=2)") as cached:
        copied = copy.deepcopy(pipeline)
        assert torch.equal(tiny.call(copied, STEPS, BATCH, 0), plain)
        assert cached.report().evaluations == 0
        assert not torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), plain)
        assert pickle.dumps(copied.scheduler)


def test_a_copy_keeps_what_others_put_before_the_forward() -> None:
    """As accelerate does: a partial of the module, on the instance."""

    def double(module: nn.Module, *args: Any) -> Tensor:
        return 2 * type(module).forward(module, *args)

    model: Any = _dit()
    inner = model.transformer_blocks[1].ff
    without = NoisyLoop(model)(0)
    inner.forward = functools.partial(double, inner)
    plain = NoisyLoop(model)(0)
    assert not torch.equal(plain, without)
    with attach(model, "interval(interval=2)"):
        copied = copy.deepcopy(model)
    assert torch.equal(NoisyLoop(copied)(0), plain)
    assert copied.transformer_blocks[1].ff.forward.args[0] is copied.transformer_blocks[1].ff
    assert torch.equal(NoisyLoop(model)(0), plain)


@pytest.mark.parametrize("setting", ["interval", "first_block", "duca", "taylor(level=stack)"])
def test_pickling_an_attached_model_is_refused(setting: str) -> None:
    model = _dit()
    with attach(model, setting):
        for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(DiffusionError, match=r"cannot be pickled.*detach"):
                save(model)
    plain = NoisyLoop(model)(0)
    assert torch.equal(NoisyLoop(pickle.loads(pickle.dumps(model)))(0), plain)


def test_the_state_dict_is_the_same(tmp_path: Any) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    plain = tiny.call(pipeline, STEPS, BATCH, 0)
    model = pipeline.transformer
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    with attach(pipeline, "duca"):
        tiny.call(pipeline, STEPS, BATCH, 0)
        assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
        assert [name for name, _ in model.named_modules()] == names
        pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(tiny.call(loaded, STEPS, BATCH, 0), plain)


def test_nothing_keeps_a_detached_model_alive() -> None:
    pipeline = by_name("dit").build()
    scheduler, model = pipeline.scheduler, weakref.ref(pipeline.transformer)
    attach(pipeline, "interval").detach()
    del pipeline
    gc.collect()
    assert model() is None
    assert scheduler is not None


def test_hooks_that_come_later_stay() -> None:
    """Somebody wraps a forward while a cache is attached, and takes it off after the detach."""
    model: Any = _dit()
    plain = NoisyLoop(model)(0)
    inner = model.transformer_blocks[0].ff
    cached = attach(model, "interval(interval=2)")
    expected = NoisyLoop(model)(0)
    calls = []
    ours = inner.forward
    inner.forward = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)
    assert torch.equal(NoisyLoop(model)(0), expected)
    cached.detach()
    assert torch.equal(NoisyLoop(model)(0), plain)
    assert len(calls) == 2 * STEPS
    with attach(model, "interval(interval=2)"):
        assert torch.equal(NoisyLoop(model)(0), expected)
    inner.forward = ours
    assert torch.equal(NoisyLoop(model)(0), plain)


def test_fused_projections_and_hooks_of_torch_work() -> None:
    model: Any = _dit()
    seen: list[int] = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: seen.append(1))
    with attach(model, "interval(interval=2)"):
        first = NoisyLoop(model)(0)
        assert torch.equal(NoisyLoop(model)(0), first)
    assert len(seen) == 2 * STEPS  # hooks of torch are outside: they run on reused outputs, too


def test_gradients() -> None:
    model = _dit().requires_grad_(True)
    with attach(model, "interval(interval=2)"):
        loss = NoisyLoop(model)(0).square().mean()
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with Replay(model, [None, 0, None, 2, None, 4]):
        NoisyLoop(model)(0).square().mean().backward()
    assert len(found) > 20
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


# -- compilers ---------------------------------------------------------------------------------

STATIC = {
    "interval(interval=3)": "sublayer",
    "taylor(order=1, interval=3)": "sublayer",
    "l2c": "sublayer",
    "interval(interval=3, level=stack)": "block",
    "taylor(order=1, interval=3, level=stack)": "block",
}


def _compile(model: nn.Module, level: str) -> None:
    from mnemon.diffusion import find_sites

    sites = find_sites(model)
    for site in sites.sublayers if level == "sublayer" else sites.blocks:
        model.get_submodule(site.path).compile(backend="eager")


def _uncompile(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("_compiled_call_impl", None)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("setting", STATIC)
def test_compiled_in_place(setting: str, compiled_first: bool) -> None:
    """No graph breaks, nothing compiled again after the first run, and the eager results."""
    steps = 8
    model = tiny_dit(layers=1 if STATIC[setting] == "sublayer" else 2, dtype=torch.float32)
    loop = NoisyLoop(model, steps=steps)
    plain = loop(0)
    with attach(model, _method(setting, model, steps)):
        expected = loop(0)
    if compiled_first:
        _compile(model, STATIC[setting])
    cached: Attachment = attach(model, _method(setting, model, steps))
    if not compiled_first:
        _compile(model, STATIC[setting])
    assert torch.equal(loop(0), expected)
    frames = counters["stats"]["unique_graphs"]
    assert frames > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(loop(0), expected)
    assert counters["stats"]["unique_graphs"] == frames
    assert not counters["graph_break"]
    cached.detach()
    assert torch.equal(loop(0), plain)
    assert not counters["graph_break"]
    _uncompile(model)
    assert torch.equal(loop(0), plain)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("setting", ["interval(interval=2)", "first_block(threshold=10)", "duca"])
def test_a_compiled_whole_gives_the_same(setting: str) -> None:
    """Graphs break here; the results are still those of a plain model."""
    model = tiny_dit(layers=2, dtype=torch.float32)
    plain = NoisyLoop(model)(0)
    with attach(model, setting):
        expected = NoisyLoop(model)(0)
    wrapped = torch.compile(model, backend="eager")
    before = {name: id(value) for name, value in vars(model).items()}
    with attach(wrapped, setting) as cached:
        for _ in range(2):
            assert torch.equal(NoisyLoop(wrapped)(0), expected)
        assert cached.report().evaluations == 2 * STEPS
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert torch.equal(NoisyLoop(wrapped)(0), plain)
    assert torch.equal(NoisyLoop(model)(0), plain)


# -- the rest ----------------------------------------------------------------------------------


def test_a_router_as_a_file(tmp_path: Any) -> None:
    model = _dit()
    router(model, STEPS, score=-5.0).save(tmp_path / "router.safetensors")
    with attach(model, "l2c", router=tmp_path / "router.safetensors"):
        first = NoisyLoop(model)(0)
    with attach(model, f"l2c(router={tmp_path / 'router.safetensors'})"):
        assert torch.equal(NoisyLoop(model)(0), first)


def test_two_transformers_of_one_pipeline() -> None:
    """As Wan 2.2 has them: one for the noisy timesteps, one for the rest."""

    class Pair:
        def __init__(self) -> None:
            self.transformer, self.transformer_2 = tiny_dit(seed=0), tiny_dit(seed=1)
            self.scheduler = diffusers.DDIMScheduler()

    pair = Pair()

    def sample() -> Tensor:
        pair.scheduler.set_timesteps(8)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
        labels = torch.tensor([1, 2])
        for number, t in enumerate(pair.scheduler.timesteps):
            model = pair.transformer if number < 3 else pair.transformer_2
            x = x - model(x, timestep=t.expand(2), class_labels=labels, return_dict=False)[0] / 8
        return x

    plain = sample()
    first = Replay(pair.transformer, [None, 0, None])
    with first, Replay(pair.transformer_2, [None, 0, None, 2, None]):
        expected = sample()
    with attach(pair, "interval(interval=2)") as cached:
        assert torch.equal(sample(), expected)
        assert torch.equal(sample(), expected)
        report = cached.report()
    assert set(report.tallies) == {"transformer", "transformer_2"}
    assert (report.evaluations, report.computed_share) == (16, 5 / 8)
    assert torch.equal(sample(), plain)
