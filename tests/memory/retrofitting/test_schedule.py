"""What each step is asked for, against the formulas."""

from __future__ import annotations

import math

import pytest

from mnemon.errors import LearnedMemoryError
from mnemon.memory.retrofitting.options import RetrofitOptions
from mnemon.memory.retrofitting.schedule import stages_of


def test_dmc_has_three_stages() -> None:
    options = RetrofitOptions(method="dmc", ratio=4, steps=200, neuron_share=0.1, ramp_share=0.6)
    stages = stages_of(options)
    assert stages[:3] == (20, 120, 60)
    for step in range(200):
        setting = stages.at(step)
        ratio = 1 + 3 * min(1, max(0, step - 20) / 120)
        assert setting.neuron_left == pytest.approx(max(0, 1 - step / 20))
        assert setting.compresses == (step >= 20)
        assert setting.ratio == pytest.approx(ratio)
        assert setting.target == pytest.approx(1 - 1 / ratio)
        held = max(0, step - 140) / 60
        fallen = 0.1 + 0.9 * (1 + math.cos(math.pi * held)) / 2
        assert setting.rate == pytest.approx(fallen * min(1, (step + 1) / 10))
    end = stages.at(200)
    assert (end.neuron_left, end.ratio, end.target) == (0, 4, 0.75)
    assert end.rate == pytest.approx(0.1)


def test_dms_with_a_projection_has_no_neuron_to_fade() -> None:
    stages = stages_of(RetrofitOptions(method="dms", ratio=2, steps=100, ramp_share=0.5))
    assert stages[:3] == (0, 50, 50)
    assert [stages.at(step).ratio for step in (0, 25, 50, 99)] == pytest.approx([1, 1.5, 2, 2])
    assert all(stages.at(step).neuron_left == 0 for step in range(100))
    borrowed = RetrofitOptions(method="dms", source="neuron", steps=100, neuron_share=0.2)
    assert stages_of(borrowed)[:3] == (20, 50, 30)


def test_the_control_is_never_asked_to_compress() -> None:
    stages = stages_of(RetrofitOptions(method="none", ratio=4, steps=50))
    for step in range(51):
        assert stages.at(step)[:4] == (0.0, False, 1.0, 0.0)


@pytest.mark.parametrize("ramp_share", [0.0, 1.0])
def test_stages_of_no_length(ramp_share: float) -> None:
    stages = stages_of(
        RetrofitOptions(method="dms", ratio=3, steps=10, neuron_share=0, ramp_share=ramp_share)
    )
    assert stages.at(10).ratio == 3
    assert stages.at(0).ratio == (3 if ramp_share == 0 else 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "h2o"}, "dmc, dms, none"),
        ({"ratio": 0.5}, "ratio of a retrofit is from 1"),
        ({"ratio": math.nan}, "ratio"),
        ({"steps": 0}, "steps"),
        ({"length": 4}, "length"),
        ({"loss": "mse"}, "distill, text, both"),
        ({"neuron_share": 0.6, "ramp_share": 0.6}, "at most 1 together"),
        ({"method": "dmc", "window": 0}, "window"),
        ({"method": "dmc", "source": "projection"}, "neuron"),
    ],
)
def test_options_out_of_range(options: dict[str, object], said: str) -> None:
    with pytest.raises(LearnedMemoryError, match=said):
        RetrofitOptions(**options)  # type: ignore[arg-type]
