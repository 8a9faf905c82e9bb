"""Runs, steps and branches, told from nothing but calls."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mnemon.diffusion.clock import Clock, Key, Step

Tick = tuple[bool, Key, Step]


def _ticks(clock: Clock, *timesteps: float, branch: str = "", hidden: Tensor | None = None) -> list:
    return [clock.tick(t, branch, hidden) for t in timesteps]


def _falling(draw: st.DrawFn, least: int = 1, most: int = 12) -> list[float]:
    values = draw(
        st.lists(st.integers(1, 1000), min_size=least, max_size=most, unique=True), label="times"
    )
    return [float(v) for v in sorted(values, reverse=True)]


@st.composite
def runs(draw: st.DrawFn) -> list[list[float]]:
    """Runs of which each begins above where the one before stopped."""
    found = [_falling(draw)]
    for _ in range(draw(st.integers(0, 4))):
        times = _falling(draw)
        if times[0] > found[-1][-1]:
            found.append(times)
    return found


@given(runs())
def test_a_rise_begins_a_run(many: list[list[float]]) -> None:
    clock = Clock()
    for times in many:
        for number, (begins, key, step) in enumerate(_ticks(clock, *times)):
            assert begins is (number == 0)
            assert key == Key("", 0)
            assert (step.index, step.timestep) == (number, times[number])
            assert step.total is None or step.total > step.index


@given(runs(), st.integers(1, 3), st.integers(1, 3))
def test_calls_at_one_timestep_are_counted_by_branch(
    many: list[list[float]], branches: int, evaluations: int
) -> None:
    clock = Clock()
    names = [f"branch {n}" for n in range(branches)]
    for times in many:
        for number, time in enumerate(times):
            for place, (evaluation, name) in enumerate(
                itertools.product(range(evaluations), names)
            ):
                begins, key, step = clock.tick(time, name, None)
                assert begins is (number == place == 0)
                assert key == Key(name, evaluation)
                assert step.index == number


@given(runs())
def test_ascending_noise_is_the_mirror_image(many: list[list[float]]) -> None:
    down, up = Clock(), Clock(ascending=True)
    for times in many:
        for time in times:
            begins, key, step = down.tick(time, "", None)
            mirrored = up.tick(1000 - time, "", None)
            assert mirrored[:2] == (begins, key)
            assert mirrored[2].index == step.index
            assert mirrored[2].total is None


@given(st.data(), st.integers(0, 11))
def test_an_announced_schedule_tells_the_total(data: st.DataObject, skipped: int) -> None:
    """Also where each timestep comes twice, as Heun's do, and where the first ones are left out."""
    times = _falling(data.draw)
    skipped = min(skipped, len(times) - 1)
    clock = Clock()
    clock.announce([t for t in times for _ in range(data.draw(st.integers(1, 2)))])
    for number, (begins, _, step) in enumerate(_ticks(clock, *times[skipped:])):
        assert begins is (number == 0)
        assert step.told
        assert step.total == len(times) - skipped


@given(
    st.integers(1, 60),
    st.integers(0, 59),
    st.sampled_from([1, 1000]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_models_are_told_of_timesteps_or_thousandths_in_their_precision(
    steps: int, skipped: int, scale: int, dtype: torch.dtype
) -> None:
    skipped = min(skipped, steps - 1)
    clock = Clock()
    times = torch.arange(steps, 0, -1) * 1000.0 / steps
    clock.announce(times.tolist())
    for time in times[skipped:].to(dtype) / scale:
        assert clock.tick(float(time), "", None)[2].total == steps - skipped


def test_a_first_timestep_of_1_is_the_beginning_of_a_run_in_thousandths() -> None:
    """FlowMatchEulerDiscreteScheduler's last timestep is 1 of 1,000."""
    clock = Clock()
    clock.announce([1000.0, 667.0, 334.0, 1.0])
    assert clock.tick(1.0, "", None)[2].total == 4


@given(st.integers(2, 100), st.floats(0.01, 1.0), st.sampled_from([1.0, 1000.0]))
def test_even_timesteps_above_0_tell_the_total(steps: int, last: float, scale: float) -> None:
    """From the second on, where nobody announced them; the least is up to one stride above 0."""
    clock = Clock()
    stride = scale / steps
    times = [stride * (n + last) for n in reversed(range(steps))]
    ticks = _ticks(clock, *times)
    assert ticks[0][2].total is None
    for _, _, step in ticks[1:]:
        assert step.total == steps
        assert not step.told
    assert ticks[-1][2].left == 0


@given(runs())
def test_an_announcement_begins_a_run(many: list[list[float]]) -> None:
    """Even where the timesteps do not rise, and even if the schedule is another's."""
    clock = Clock()
    for times in many:
        for repeat in range(2):
            clock.announce(times if repeat else [1.0])
            assert [b for b, _, _ in _ticks(clock, *times)] == [True] + [False] * (len(times) - 1)


def test_an_announcement_holds_for_one_run() -> None:
    clock = Clock()
    clock.announce([3.0, 2.0, 1.0])
    assert _ticks(clock, 3.0)[0][2].told
    begins, _, step = clock.tick(9.0, "", None)  # a rise: a run that nobody announced
    assert begins
    assert (step.total, step.told) == (None, False)


def test_an_announcement_of_nothing() -> None:
    clock = Clock()
    clock.announce([])
    assert clock.tick(5.0, "", None)[2] == Step(index=0, timestep=5.0)


def test_start_forgets() -> None:
    clock = Clock()
    _ticks(clock, 3.0, 2.0)
    clock.start()
    begins, key, step = clock.tick(1.0, "", None)
    assert begins
    assert key == Key("", 0)
    assert step.index == 0


def test_steps_left() -> None:
    assert Step(index=2, timestep=1.0, total=5).left == 2
    assert Step(index=4, timestep=1.0, total=5).left == 0
    assert Step(index=0, timestep=1.0).left == 999
    first = Step(index=2, timestep=1.0, total=5, told=True).first()
    assert first == Step(index=0, timestep=1.0, total=3, told=True)
    assert first.left == 2
    assert Step(index=2, timestep=1.0).first().total is None


ONES, TWOS = torch.ones(2, 3), torch.full((2, 3), 2.0)


@pytest.mark.parametrize(
    ("second", "ambiguous"),
    [
        (ONES, False),  # guidance
        (ONES.clone(), False),
        (TWOS, True),
        (ONES[:1], True),
        (ONES.double(), False),
        (None, False),
    ],
)
def test_a_second_call_at_the_first_timestep(second: Tensor | None, ambiguous: bool) -> None:
    clock = Clock()
    clock.tick(9.0, "", ONES)
    assert clock.settled
    clock.tick(9.0, "", second)
    assert clock.ambiguous is ambiguous
    assert clock.settled  # nothing has been reused yet
    clock.tick(8.0, "", TWOS)
    assert clock.settled is not ambiguous
    clock.tick(8.0, "", ONES)
    assert clock.settled is not ambiguous  # every key has to forget
    clock.tick(7.0, "", ONES)
    assert clock.settled
    clock.start()
    clock.tick(9.0, "", TWOS)
    assert not clock.ambiguous


def test_later_timesteps_names_and_announcements_are_never_ambiguous() -> None:
    clock = Clock()
    for number, (time, branch) in enumerate(itertools.product((9.0, 8.0), ("cond", "uncond"))):
        clock.tick(time, branch, torch.full((2,), float(number)))
    assert not clock.ambiguous
    clock = Clock()
    for number, time in enumerate((9.0, 8.0, 8.0, 7.0, 7.0)):
        clock.tick(time, "", torch.full((2,), float(number)))
    assert not clock.ambiguous
    clock = Clock()
    clock.announce([9.0, 8.0])
    for hidden in (ONES, TWOS):
        clock.tick(9.0, "", hidden)
    assert not clock.ambiguous


def test_inputs_are_compared_as_they_were() -> None:
    """Also where gradients flow, and without keeping a graph alive."""
    clock = Clock()
    hidden = (ONES.clone().requires_grad_() * 1).clone()
    clock.tick(9.0, "", hidden)
    clock.tick(9.0, "", TWOS)
    assert clock.ambiguous


def test_a_key_that_forgets_counts_anew() -> None:
    """And what is left stays what it was."""
    clock = Clock()
    _ticks(clock, 10.0)
    _, key, second = clock.tick(9.0, "", None)
    assert (second.index, second.total, second.left) == (1, 10, 8)
    clock.restart(key)
    _, _, third = clock.tick(8.0, "", None)
    assert (third.index, third.total, third.left) == (1, 9, 7)
    clock.start()
    assert clock.tick(7.0, "", None)[2].index == 0
    assert clock.tick(6.0, "", None)[2].index == 1
