"""Neutral settings change no bit, active ones reuse something, and detaching leaves nothing."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.diffusion.pipelines import PIPELINES, Tiny, by_name, compare
from tests.diffusion.toys import attributes, l2c
from torch import Tensor, nn

from mnemon.diffusion import METHODS, Method, attach, make_method
from mnemon.errors import DiffusionError

STEPS, BATCH = 6, 2
TOKENWISE = ("toca", "duca")
Make = Callable[[nn.Module], Method]


def _of(text: str) -> Make:
    return lambda model: make_method(text)


NEUTRAL: dict[str, Make] = {
    "interval": _of("interval(interval=1)"),
    "interval-stack": _of("interval(interval=1, level=stack)"),
    "taylor": _of("taylor(order=2, interval=1)"),
    "taylor-stack": _of("taylor(order=2, interval=1, level=stack)"),
    "first_block": _of("first_block(threshold=0)"),
    "dbcache": _of("dbcache(threshold=0, front=1, back=0)"),
    "dbcache-back": _of("dbcache(threshold=0, front=1, back=1)"),
    "toca": _of("toca(interval=1)"),
    "toca-attention": _of("toca(interval=1, score=attention)"),
    "toca-random": _of("toca(interval=1, score=random)"),
    "duca": _of("duca(interval=1)"),
    "l2c": lambda model: l2c(model, STEPS, score=5.0),
}
ACTIVE: dict[str, Make] = {
    "interval": _of("interval(interval=2)"),
    "interval-stack": _of("interval(interval=2, level=stack)"),
    "taylor": _of("taylor(order=1, interval=2)"),
    "taylor-stack": _of("taylor(order=1, interval=2, level=stack)"),
    "first_block": _of("first_block(threshold=10)"),
    "dbcache": _of("dbcache(threshold=10, longest=2)"),
    "dbcache-back": _of("dbcache(threshold=10, back=1, order=1, warmup=2)"),
    "toca": _of("toca(interval=3, ratio=0.2)"),
    "toca-attention": _of("toca(interval=3, ratio=0.2, score=attention)"),
    "toca-random": _of("toca(interval=3, ratio=0.2, score=random)"),
    "duca": _of("duca(interval=3, ratio=0.2)"),
    "l2c": lambda model: l2c(model, STEPS, score=-5.0),
}


def _served(tiny: Tiny, setting: str) -> bool:
    # Sana's MLP convolves: no token stands alone.
    return not (tiny.name == "sana" and setting.split("-")[0] in TOKENWISE)


def _cases(settings: dict[str, Make]) -> Any:
    return pytest.mark.parametrize(
        ("tiny", "setting"),
        [(t, s) for t in PIPELINES for s in settings if _served(t, s)],
        ids=lambda value: value if isinstance(value, str) else value.name,
    )


def test_every_method_is_here() -> None:
    for settings in (NEUTRAL, ACTIVE):
        assert {name.split("-")[0] for name in settings} == set(METHODS) - {"fitted"}


@functools.cache
def _uncached(name: str) -> Tensor:
    tiny = by_name(name)
    return tiny.call(tiny.build(), STEPS, BATCH, 0)


@_cases(NEUTRAL)
def test_neutral_settings_change_no_bit(tiny: Tiny, setting: str) -> None:
    pipeline = tiny.build()
    with attach(pipeline, NEUTRAL[setting](pipeline.transformer)) as cached:
        assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), _uncached(tiny.name))
    report = cached.report()
    branches = 2 if tiny.guidance == "separate" else 1
    assert (report.runs, report.evaluations) == (1, branches * STEPS)
    assert report.computed_share == 1.0


@_cases(ACTIVE)
def test_active_settings_reuse_repeat_and_leave_nothing(tiny: Tiny, setting: str) -> None:
    pipeline, expected = tiny.build(), _uncached(tiny.name)
    tiny.call(pipeline, 2, BATCH, 0)  # runs leave traces of their own
    before = attributes(pipeline)
    cached = attach(pipeline, ACTIVE[setting](pipeline.transformer))
    first = tiny.call(pipeline, STEPS, BATCH, 0)
    assert 0 < cached.report().computed_share < 1
    assert first.isfinite().all()
    assert compare(expected, first) > 1e-6
    assert compare(expected, first) < 2  # another picture, perhaps, but not another world
    if setting != "l2c":  # which only runs as many steps as it was trained for
        tiny.call(pipeline, 2, BATCH, 1)
    assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), first)
    assert cached.nbytes > 0
    cached.detach()
    assert cached.nbytes == 0
    assert attributes(pipeline) == before
    assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), expected)


@pytest.mark.parametrize("setting", [s for s in NEUTRAL if s.split("-")[0] in TOKENWISE])
def test_what_a_model_cannot_serve_is_refused_and_leaves_nothing(setting: str) -> None:
    tiny = by_name("sana")
    pipeline = tiny.build()
    tiny.call(pipeline, 2, BATCH, 0)
    before = attributes(pipeline)
    with pytest.raises(DiffusionError, match="treat tokens alone"):
        attach(pipeline, NEUTRAL[setting](pipeline.transformer))
    assert attributes(pipeline) == before
    assert torch.equal(tiny.call(pipeline, STEPS, BATCH, 0), _uncached(tiny.name))
