"""What the papers say of each method, against plain loops in float64."""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.diffusion import pipelines
from tests.diffusion.pipelines import PIPELINES, by_name
from tests.diffusion.plain import PlainDBCache, PlainTokens, dit_forward, emphasised, sample
from tests.diffusion.toys import NoisyLoop, Replay, Toy, router, tiny_dit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mnemon.diffusion import Attachment, Router, attach, find_sites, load_router
from mnemon.diffusion.methods.scores import (
    AttentionTap,
    attention_received,
    emphasise,
    value_norm_score,
)
from mnemon.diffusion.methods.taylor import Series
from mnemon.diffusion.methods.toca import StepKind, kind_of_step, next_interval, token_ratio
from mnemon.diffusion.outputs import nbytes
from mnemon.errors import DiffusionError

TOKENS, BATCH, CHANNELS, LAYERS = 16, 2, 16, 3


def _schedule(cached: Attachment) -> list[tuple[float, ...]]:
    (tally,) = cached.report().tallies.values()
    return tally.schedule


def _session(cached: Attachment) -> Any:
    (model,) = cached._models
    (session,) = model._sessions.values()
    return session


@contextmanager
def _calls(modules: list[nn.Module]) -> Iterator[list[int]]:
    """How often each of them is called."""
    counts = [0] * len(modules)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    handles = [m.register_forward_hook(count(n)) for n, m in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


# -- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_interval_reuses_ungated_outputs(interval: int) -> None:
    model = tiny_dit()
    with Replay(model, [None if n % interval == 0 else n - n % interval for n in range(8)]):
        expected = NoisyLoop(model, steps=8)(0)
    with attach(model, "interval", interval=interval) as cached:
        assert torch.equal(NoisyLoop(model, steps=8)(0), expected)
    assert _schedule(cached) == [(float(n % interval == 0),) * 6 for n in range(8)]


def test_interval_gates_are_those_of_the_current_step() -> None:
    """A block, recomputed by hand from what its sublayers returned the step before."""
    model: Any = tiny_dit()
    stored: list[dict[str, Tensor]] = []
    blocks: list[tuple[Any, Any, Tensor]] = []

    def keep(block: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        blocks.append((args, kwargs, output))

    replay = Replay(model, [None])
    loop = NoisyLoop(model, steps=1)
    with replay:
        loop(0)
        stored = replay.outputs
    handles = [b.register_forward_hook(keep, with_kwargs=True) for b in model.transformer_blocks]
    with attach(model, "interval(interval=2)"):
        NoisyLoop(model, steps=2)(0)
    for handle in handles:
        handle.remove()
    assert loop.timesteps[0] == NoisyLoop(model, steps=2).timesteps[0]
    for number, block in enumerate(model.transformer_blocks):
        (hidden, *rest), kwargs, output = blocks[LAYERS + number]
        assert not rest
        timestep, labels = kwargs["timestep"], kwargs["class_labels"]
        attention, mlp = (
            stored[0][f"transformer_blocks.{number}.{name}"] for name in ("attn1", "ff")
        )
        gates = {}
        for when in (timestep, torch.full_like(timestep, loop.timesteps[0])):
            _, gate, _, _, gate_mlp = block.norm1(hidden, when, labels, hidden_dtype=hidden.dtype)
            middle = gate[:, None] * attention + hidden
            gates[int(when[0])] = gate_mlp[:, None] * mlp + middle
        old, new = gates[loop.timesteps[0]], gates[int(timestep[0])]
        assert torch.equal(output, new)
        assert (output - old).abs().max() > 1e-3


def test_interval_of_stacks_adds_what_was_added() -> None:
    model: Any = tiny_dit()
    kept: list[Tensor] = []

    def run(hidden: Tensor, blocks: Any, timestep: Tensor, labels: Tensor) -> Tensor:
        if len(kept) % 3:
            kept.append(kept[-1])
            return hidden + kept[-1]
        left = hidden
        for block in blocks:
            left = block(left, timestep=timestep, class_labels=labels)
        kept.append(left - hidden)
        return left

    loop = NoisyLoop(model, steps=8)
    expected = sample(model, loop.timesteps, run)
    norms = [block.norm1 for block in model.transformer_blocks]
    with attach(model, "interval(interval=3, level=stack)"), _calls(norms) as counts:
        assert torch.equal(loop(0), expected)
    assert counts == [3, 3, 3]


def test_the_plain_forward_is_the_models() -> None:
    model: Any = tiny_dit()
    loop = NoisyLoop(model)
    from tests.diffusion.plain import every_block

    assert torch.equal(sample(model, loop.timesteps, every_block), loop(0))
    assert dit_forward is not None


# -- series ------------------------------------------------------------------------------------


def _polynomial(coefficients: list[float], at: float) -> Tensor:
    value = sum(w * at**n for n, w in enumerate(coefficients))
    return torch.tensor([value, -2.0 * value], dtype=torch.float64)


@given(
    st.integers(0, 1),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_series_continue_constants_and_lines_exactly(
    order: int, coefficients: list[float], interval: int, ahead: int
) -> None:
    coefficients = coefficients[: order + 1]
    series = Series(order)
    for n in range(order + 1):
        series.update(n * interval, _polynomial(coefficients, n * interval))
    at = order * interval + ahead
    torch.testing.assert_close(series.at(at), _polynomial(coefficients, at), rtol=0, atol=1e-10)


@given(
    st.integers(0, 4),
    st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 7),
)
def test_series_are_the_papers(
    order: int, coefficients: list[float], interval: int, ahead: int, updates: int
) -> None:
    """TaylorSeer, eq. 5 and 6: k-th backward differences over N^k, times x^k / k!."""
    series = Series(order)
    values = [_polynomial(coefficients, n * interval) for n in range(updates)]
    for n, value in enumerate(values):
        series.update(n * interval, value)
    expected = torch.zeros(2).double()
    for k in range(min(order, updates - 1) + 1):
        difference = sum(
            (-1) ** j * math.comb(k, j) * values[updates - 1 - j] for j in range(k + 1)
        )
        expected += difference / interval**k * ahead**k / math.factorial(k)
    found = series.at((updates - 1) * interval + ahead)
    scale = max(1.0, max(float(v.abs().max()) for v in values))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale)


def test_a_second_order_series_lags_as_the_paper_has_it() -> None:
    """Backward differences are slopes half a stride ago: on a x^2 it lacks a N x."""
    series = Series(2)
    for n in range(3):
        series.update(3 * n, _polynomial([0, 0, 0.5], 3 * n))
    lacks = _polynomial([0, 0, 0.5], 8) - series.at(8)
    torch.testing.assert_close(lacks, 0.5 * 3 * 2 * torch.tensor([1.0, -2.0]).double())


def test_series_keep_tuples_and_none() -> None:
    series = Series(1)
    series.update(0, (torch.zeros(1), None))
    series.update(2, (torch.ones(1), None))
    first, second = series.at(4)
    assert float(first) == 2.0
    assert second is None


class _Curve(nn.Module):
    """A sublayer whose output is a polynomial of the step."""

    def __init__(self, coefficients: list[float]) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.step = 0
        self.computed: list[int] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.computed.append(self.step)
        return _polynomial(self.coefficients, self.step).expand_as(hidden_states)


@pytest.mark.parametrize(("order", "warmup"), [(0, 1), (1, 1), (1, 2), (1, 3), (0, 3)])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_taylor_is_exact_on_lines_once_it_knows_them(
    order: int, warmup: int, interval: int
) -> None:
    model: Any = Toy().requires_grad_(False)
    curves = [_Curve([1.0, 0.5][: order + 1]) for _ in range(4)]
    for n, block in enumerate(model.blocks):
        block.attn, block.ff = curves[2 * n : 2 * n + 2]
    with attach(model, "taylor", order=order, interval=interval, warmup=warmup):
        for step in range(14):
            for curve in curves:
                curve.step = step
            model(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([900.0 - 10 * step]))
    computed = sorted({*range(warmup), *range(warmup - 1, 14, interval)})
    assert all(curve.computed == computed for curve in curves)
    known = computed[order]
    for block in model.blocks:
        for step, (attention, mlp) in enumerate(block.received):
            exact = _polynomial([1.0, 0.5][: order + 1], step)
            if step >= known or step in computed:
                torch.testing.assert_close(attention[0], exact, rtol=1e-12, atol=0)
                torch.testing.assert_close(mlp[0], exact, rtol=1e-12, atol=0)


def test_taylor_of_order_0_is_interval() -> None:
    model = tiny_dit()
    for level in ("sublayer", "stack"):
        with attach(model, "interval", interval=3, level=level):
            expected = NoisyLoop(model, steps=8)(0)
        with attach(model, "taylor", order=0, interval=3, level=level):
            assert torch.equal(NoisyLoop(model, steps=8)(0), expected)


# -- front blocks ------------------------------------------------------------------------------


def _thresholds(front: int) -> list[float]:
    """Below, among and above the changes of an uncached run."""
    plain = PlainDBCache(threshold=0, front=front)
    model = tiny_dit(layers=5)
    sample(model, NoisyLoop(model, steps=12).timesteps, plain)
    changes = sorted(plain.changes)
    return [changes[0] / 2, changes[3] * 1.01, changes[-3] * 1.01, changes[-1] * 1.2, 100.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"back": 1},
        {"back": 2, "front": 2},
        {"warmup": 4},
        {"longest": 1},
        {"longest": 2, "back": 1},
        {"longest": 3, "warmup": 3, "front": 3},
    ],
    ids=str,
)
def test_dbcache_decides_as_a_plain_loop(options: dict[str, int]) -> None:
    model: Any = tiny_dit(layers=5)
    loop = NoisyLoop(model, steps=12)
    front, back = options.get("front", 1), options.get("back", 0)
    norms = [block.norm1 for block in model.transformer_blocks]
    seen = set()
    for threshold in _thresholds(front):
        plain = PlainDBCache(threshold=threshold, **options)
        expected = sample(model, loop.timesteps, plain)
        with attach(model, "dbcache", threshold=threshold, **options) as cached:
            with _calls(norms) as counts:
                assert torch.equal(loop(0), expected)
        ran = [
            [1.0 if i < front or i >= 5 - back or not skip else 0.0 for i in range(5)]
            for skip in plain.decisions
        ]
        assert _schedule(cached) == [tuple(v for v in row for _ in "af") for row in ran]
        columns = [int(sum(row[i] for row in ran)) for i in range(5)]
        assert counts == columns  # the back blocks really run
        seen.add(tuple(plain.decisions))
    assert len(seen) >= 3


def test_first_block_is_dbcache_with_one_block() -> None:
    model = tiny_dit(layers=5)
    loop = NoisyLoop(model, steps=12)
    for threshold in _thresholds(1):
        plain = PlainDBCache(threshold=threshold)
        expected = sample(model, loop.timesteps, plain)
        with attach(model, "first_block", threshold=threshold) as cached:
            assert torch.equal(loop(0), expected)
        skipped = [row[-1] == 0 for row in _schedule(cached)]
        assert skipped == plain.decisions


def test_dbcache_continues_the_middle_by_a_series() -> None:
    model: Any = tiny_dit()
    kept = Series(1)
    step = 0

    def run(hidden: Tensor, blocks: Any, timestep: Tensor, labels: Tensor) -> Tensor:
        nonlocal step
        first = blocks[0](hidden, timestep=timestep, class_labels=labels)
        if step > 1 and step % 2:
            left = first + kept.at(step)
        else:
            left = first
            for block in blocks[1:]:
                left = block(left, timestep=timestep, class_labels=labels)
            kept.update(step, left - first)
        step += 1
        return left

    loop = NoisyLoop(model, steps=8)
    expected = sample(model, loop.timesteps, run)
    with attach(model, "dbcache(threshold=100, warmup=3, longest=1, order=1)"):
        assert torch.equal(loop(0), expected)


def test_changes_that_are_no_number_are_computed() -> None:
    model: Any = tiny_dit()
    with attach(model, "first_block(threshold=100)") as cached:
        NoisyLoop(model)(0, each=lambda number, out: out.fill_(float("nan")))
    assert cached.report().computed_share == 1


# -- learned schedules -------------------------------------------------------------------------


def _learned(model: nn.Module, steps: int, seed: int = 0, threshold: float = 0.5) -> Router:
    plain = router(model, steps, score=0.0, threshold=threshold)
    scores = torch.randn(plain.scores.shape, generator=torch.Generator().manual_seed(seed))
    return Router(
        scores=scores,
        threshold=threshold,
        num_steps=steps,
        model=plain.model,
        paths=plain.paths,
    )


@pytest.mark.parametrize("steps", [6, 7])
def test_l2c_that_computes_nothing_repeats_the_full_step(steps: int) -> None:
    """Under current gates; the last of an odd number of steps is a full one."""
    model = tiny_dit()
    with Replay(model, [None if n % 2 == 0 else n - 1 for n in range(steps)]):
        expected = NoisyLoop(model, steps=steps)(0)
    with attach(model, "l2c", router=router(model, steps, score=-5.0)) as cached:
        assert torch.equal(NoisyLoop(model, steps=steps)(0), expected)
    assert _schedule(cached) == [(float(n % 2 == 0),) * 6 for n in range(steps)]


@pytest.mark.parametrize("steps", [6, 7])
def test_l2c_computes_what_the_router_says(steps: int) -> None:
    model = tiny_dit()
    learned = _learned(model, steps)
    rows = (learned.scores.double() > 0).tolist()
    sources: list[Any] = []
    for n in range(steps):
        row = rows[n // 2] if n % 2 else [True] * 6
        sources.append({p: None if c else n - 1 for p, c in zip(learned.paths, row, strict=True)})
    with Replay(model, sources):
        expected = NoisyLoop(model, steps=steps)(0)
    with attach(model, "l2c", router=learned) as cached:
        assert torch.equal(NoisyLoop(model, steps=steps)(0), expected)
    expected_schedule = [tuple(float(v is None) for v in source.values()) for source in sources]
    assert _schedule(cached) == expected_schedule
    assert len(set(expected_schedule)) > 2


def test_l2c_thresholds() -> None:
    model = tiny_dit()
    plain = NoisyLoop(model)(0)
    learned = _learned(model, 6)
    before: set[tuple[int, int]] | None = None
    sizes = []
    for threshold in (-0.1, 0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5):
        with attach(model, "l2c", router=learned, threshold=threshold) as cached:
            result = NoisyLoop(model)(0)
        schedule = _schedule(cached)
        computed = {(n, i) for n in (1, 3, 5) for i in range(6) if schedule[n][i]}
        assert all(all(schedule[n]) for n in (0, 2, 4))
        assert before is None or computed <= before
        before = computed
        sizes.append(len(computed))
        assert torch.equal(result, plain) is (len(computed) == 18)
    assert sizes[0] == sizes[1] == 18
    assert sizes[-1] == sizes[-2] == 0
    assert len(set(sizes)) >= 5


@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_share_sets_the_threshold(seed: int, share: float) -> None:
    learned = _learned(_MODEL, 7, seed).with_share(share)
    assert sum(map(sum, learned.computes())) == round(share * 18)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equal_scores_are_computed_together(share: float) -> None:
    computed = router(_MODEL, 6, score=0.3).with_share(share).computes()
    assert computed == [[share > 0] * 6] * 3


_MODEL = tiny_dit()


def test_l2c_of_another_number_of_steps() -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    with attach(pipeline, "l2c", router=router(pipeline.transformer, 6, score=0.0)):
        tiny.call(pipeline, 6, 1, 0)
        for steps in (5, 7, 12):
            with pytest.raises(DiffusionError, match=f"trained for 6 steps, this run has {steps}"):
                tiny.call(pipeline, steps, 1, 0)
        tiny.call(pipeline, 6, 1, 0)
    model = tiny_dit()
    with attach(model, "l2c", router=router(model, 6, score=0.0)):
        with pytest.raises(DiffusionError, match="trained for 6 steps, this run has more than 6"):
            NoisyLoop(model, steps=7)(0)
        NoisyLoop(model, steps=6)(0)


def test_l2c_over_uneven_timesteps_that_nobody_announced() -> None:
    """How many steps there will be cannot be told from them, and is not guessed at."""

    class Uneven(NoisyLoop):
        @property
        def timesteps(self) -> list[int]:
            return [1000, 960, 900, 800, 640, 400]

    model = tiny_dit()
    with Replay(model, [None, 0, None, 2, None, 4]):
        expected = Uneven(model)(0)
    with attach(model, "l2c", router=router(model, 6, score=-5.0)):
        assert torch.equal(Uneven(model)(0), expected)


def test_l2c_of_another_model() -> None:
    for other, name in ((tiny_dit(layers=2), "DiT"), (Toy(), "Toy")):
        with pytest.raises(DiffusionError, match=rf"router is of a {name}.*6 sublayers|4 subl"):
            attach(tiny_dit(), "l2c", router=router(other, 6, score=0.0))


# -- routers as files --------------------------------------------------------------------------


def test_a_router_comes_back(tmp_path: Path) -> None:
    learned = _learned(_MODEL, 7, threshold=0.37)
    learned.save(tmp_path / "r.safetensors")
    loaded = load_router(str(tmp_path / "r.safetensors"))
    assert torch.equal(loaded.scores, learned.scores)
    for name in ("threshold", "num_steps", "model", "paths"):
        assert getattr(loaded, name) == getattr(learned, name)
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]
    assert "7 steps" in str(loaded)


def test_every_cut_of_a_routers_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    _learned(_MODEL, 6).save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DiffusionError, match=r"r\.safetensors"):
            load_router(path)
    path.write_bytes(whole)
    load_router(path)


def test_flipped_bytes_of_a_routers_file_are_never_another_error(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    _learned(_MODEL, 6).save(path)
    whole = bytearray(path.read_bytes())
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x15
        path.write_bytes(damaged)
        try:
            load_router(path)
        except DiffusionError:
            refused += 1
    assert refused > len(whole) / 4


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(DiffusionError, match="cannot be read"):
        load_router(path)
    with pytest.raises(DiffusionError, match="cannot be read"):
        load_router(tmp_path)
    path.write_text("no safetensors file at all")
    with pytest.raises(DiffusionError, match="cannot be read"):
        load_router(path)
    scores = {"scores": torch.zeros(3, 6)}
    good = {"threshold": 0.5, "num_steps": 6, "model": "M", "paths": list("abcdef")}
    right = {"format": "mnemon-l2c-router", "fields": json.dumps(good)}
    save_file(scores, path, metadata=right)
    assert load_router(path).num_steps == 6
    for tensors, metadata, message in (
        (scores, None, "no mnemon-l2c-router"),
        (scores, right | {"format": "mnemon-plan"}, "no mnemon-l2c-router"),
        ({"weights": scores["scores"]}, right, "no mnemon-l2c-router"),
        (scores, right | {"fields": "{"}, "damaged"),
        (scores, right | {"fields": "[]"}, "damaged"),
        (scores, {"format": right["format"]}, "damaged"),
        (scores, right | {"fields": "{}"}, "should be"),
        (scores, right | {"fields": json.dumps(good | {"num_steps": "x"})}, "should be"),
        (scores, right | {"fields": json.dumps(good | {"paths": None})}, "should be"),
        (scores, right | {"fields": json.dumps(good | {"num_steps": 8})}, "8 steps and 6 subl"),
        ({"scores": torch.zeros(3, 6).log()}, right, "finite"),
        ({"scores": torch.zeros(18)}, right, "shape"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(DiffusionError, match=message) as raised:
            load_router(path)
        assert str(path) in str(raised.value)


# -- token-wise: schedules ---------------------------------------------------------------------

COUNTS = {3: (20, 22, 8), 4: (17, 22, 11)}


@pytest.mark.parametrize("interval", COUNTS)
def test_duca_counts_of_the_paper(interval: int) -> None:
    kinds: Counter[StepKind] = Counter()
    now = 0
    for left in range(49, -1, -1):
        kind = kind_of_step(left, now or 1, first=left == 49, aggressive=True)
        if kind is StepKind.FULL:
            now = next_interval(interval, left, 50)
        kinds[kind] += 1
    assert tuple(kinds[kind] for kind in StepKind) == COUNTS[interval]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("interval", COUNTS)
def test_duca_counts_in_a_run(interval: int, announced: bool) -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    model: Any = pipeline.transformer if announced else tiny_dit()
    kinds: Counter[str] = Counter()
    norms = [block.norm1 for block in model.transformer_blocks]
    with attach(pipeline if announced else model, "duca", interval=interval, ratio=0.5) as cached:
        with _calls(norms) as counts:
            if announced:
                tiny.call(pipeline, 50, 1, 0)
            else:
                NoisyLoop(model, steps=50)(0)
        for row in _schedule(cached):
            kinds["full" if all(v == 1 for v in row) else "some" if any(row) else "none"] += 1
    full, conservative, aggressive = COUNTS[interval]
    if not announced:  # the first step does not know of the others, and its interval is constant
        assert abs(kinds["full"] - full) <= 1
        return
    assert kinds["full"] == full
    assert counts[1:] == [full + conservative] * 2
    assert 50 - counts[1] == aggressive
    # Early steps compute no token: (3 - 4 left / total) is below 0.
    assert kinds["none"] >= aggressive
    assert kinds.total() == 50


@given(st.integers(1, 8), st.integers(1, 200), st.floats(0, 1), st.booleans())
def test_the_plain_schedule_is_the_same(
    interval: int, steps: int, ratio: float, aggressive: bool
) -> None:
    plain = PlainTokens(steps, interval, ratio, 0.8, "random", aggressive)
    now = 1
    for left in range(steps - 1, -1, -1):
        kind = kind_of_step(left, now, first=left == steps - 1, aggressive=aggressive)
        assert kind.value == plain.kind(left)
        plain.kinds.append(kind.value)
        if kind is StepKind.FULL:
            now = next_interval(interval, left, steps, forced=ratio > 0)
            plain.now = max(1, plain.next_interval(left))
            assert now == plain.now
        for layer in range(4):
            assert token_ratio(ratio, left, steps, layer, 4) == plain.share(left, layer, 4)


# -- token-wise: scores ------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(0, 99))
def test_value_norms(batch: int, heads: int, tokens: int, seed: int) -> None:
    values = torch.randn(batch, tokens, heads * 3, generator=torch.Generator().manual_seed(seed))
    norms = sum(part.double().norm(dim=-1) for part in values.chunk(heads, -1))
    expected = 1 - norms / norms.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(
        value_norm_score(values, heads).double(), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("rows", [5, 256, 300])
@pytest.mark.parametrize("mask", ["none", "bool", "row", "added", "heads"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_received(rows: int, mask: str, scale: float | None) -> None:
    noise = torch.Generator().manual_seed(rows)
    q = torch.randn(2, 3, rows, 4, generator=noise)
    k = torch.randn(2, 3, 9, 4, generator=noise)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "bool": torch.rand(2, 1, rows, 9, generator=noise) > 0.3,
        "row": torch.tensor([True] * 6 + [False] * 3).expand(2, 1, 1, 9),
        "added": torch.randn(rows, 9, generator=noise),
        "heads": torch.randn(2, 3, 1, 9, generator=noise),
    }
    given_mask = masks[mask]
    if mask == "bool":
        given_mask[..., 0] = True  # type: ignore[index]
    logits = q.double() @ k.double().transpose(-1, -2) * (0.5 if scale is None else scale)
    if given_mask is not None:
        added = given_mask
        if given_mask.dtype == torch.bool:
            added = torch.zeros(given_mask.shape).masked_fill(~given_mask, -math.inf)
        logits = logits + added
    received = logits.softmax(-1).mean(1).sum(1)
    expected = received / received.norm(dim=-1, keepdim=True)
    found = attention_received(q, k, mask=given_mask, scale=scale)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    if mask == "row":
        assert (found[:, 6:] == 0).all()


@given(st.integers(1, 70), st.floats(0, 2), st.integers(0, 99))
def test_bonuses(tokens: int, bonus: float, seed: int) -> None:
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)).double()
    side = math.isqrt(tokens)
    found = emphasise(scores, bonus)
    for before, after in zip(scores.tolist(), found.tolist(), strict=True):
        if side * side == tokens and side % 2 == 0:
            expected = emphasised(before, side, bonus)
        else:
            expected = list(before)
            for start in range(0, tokens - 3, 4):
                best = max(range(start, start + 4), key=before.__getitem__)
                expected[best] *= 1 + bonus
        assert after == pytest.approx(expected, rel=1e-12)


# -- token-wise: runs --------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["value_norm", "attention"])
@pytest.mark.parametrize(("name", "interval"), [("toca", 3), ("toca", 4), ("duca", 4), ("duca", 6)])
def test_token_wise_runs_are_a_plain_loops(name: str, interval: int, score: str) -> None:
    """Kinds of steps, tokens chosen, counters, gates and outputs."""
    steps, ratio = 20, 0.15
    tiny_scheduler = _Announced(steps)
    model: Any = tiny_dit()
    pipe = _Pipe(model, tiny_scheduler)
    bonus = 0.6 if name == "toca" else 0.8
    plain = PlainTokens(steps, interval, ratio, bonus, score, name == "duca")
    loop = NoisyLoop(model, steps=steps)
    expected = sample(model, loop.timesteps, plain)
    ages: list[dict[int, Tensor]] = []
    with attach(pipe, name, interval=interval, ratio=ratio, score=score) as cached:
        tiny_scheduler.set_timesteps()
        fresh = torch.zeros(BATCH, TOKENS)
        found = loop(
            0,
            each=lambda *_: ages.append(
                {n: _session(cached)._ages.get(2 * n + 1, fresh) for n in range(LAYERS)}
            ),
        )
        schedule = _schedule(cached)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert Counter(plain.kinds).keys() >= {"full", "conservative"}
    assert name == "toca" or "aggressive" in plain.kinds
    some = 0
    for kind, row, chosen in zip(plain.kinds, schedule, plain.chosen, strict=True):
        if kind == "full":
            assert row == (1.0,) * 6
        elif kind == "aggressive":
            assert row == (0.0,) * 6
        else:
            counts = [int(c.sum()) / (BATCH * TOKENS) for c in chosen.values()]
            assert row == tuple(v for c in counts for v in (0.0, c))
            some += sum(counts) > 0
    assert some >= 3
    for layer, expected_ages in plain.ages.items():
        torch.testing.assert_close(ages[-1][layer].double(), expected_ages)
    # A token's counter is zero exactly where the step computed it, and one more elsewhere.
    for step, (kind, chosen) in enumerate(zip(plain.kinds, plain.chosen, strict=True)):
        if kind == "conservative":
            for layer, mask in chosen.items():
                now, before = ages[step][layer], ages[step - 1][layer]
                assert torch.equal(now == 0, mask)
                assert torch.equal(now[~mask], before[~mask] + 1)


class _Announced:
    """A scheduler that only announces NoisyLoop's timesteps."""

    def __init__(self, steps: int) -> None:
        self.timesteps = torch.tensor(NoisyLoop(_MODEL, steps=steps).timesteps)

    def set_timesteps(self) -> None:
        pass


class _Pipe:
    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler


@pytest.mark.parametrize("name", ["dit", "pixart-sigma", "sd3", "flux", "wan", "cogvideox"])
def test_the_mlps_get_as_many_tokens_as_the_paper_says(name: str) -> None:
    steps, ratio, interval = 12, 0.25, 4
    tiny = by_name(name)
    pipeline = tiny.build()
    model = pipeline.transformer
    sites = find_sites(model)
    lengths: dict[str, list[int]] = {}
    whole: dict[str, int] = {}

    def inner(path: str) -> nn.Module:
        module = model.get_submodule(path)
        return module if isinstance(module, nn.Linear) else next(iter(module.modules()))

    def watch(path: str) -> Callable[..., Any]:
        original = type(inner(path)).forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            lengths.setdefault(path, []).append(hidden.shape[1])
            return original(inner(path), *args, **kwargs)

        return forward

    mlps = [s for s in sites.sublayers if s.per_token]
    for sublayer in mlps:
        inner(sublayer.path).forward = watch(sublayer.path)
    with attach(pipeline, "toca", interval=interval, ratio=ratio, score="random"):
        tiny.call(pipeline, steps, 1, 0)
    blocks = len(sites.blocks)
    fewer = 0
    for sublayer in mlps:
        whole[sublayer.path] = tokens = max(lengths[sublayer.path])
        expected, now = [], 1
        for left in range(steps - 1, -1, -1):
            kind = kind_of_step(left, now, first=left == steps - 1, aggressive=False)
            if kind is StepKind.FULL:
                now = next_interval(interval, left, steps)
                expected.append(tokens)
                continue
            layer = 0.8 + 0.4 * sublayer.block / (blocks - 1)
            share = min(1, max(0, ratio * (3 - 4 * left / steps) * layer * 2.5))
            if int(share * tokens):
                expected.append(int(share * tokens))
                fewer += int(share * tokens) < tokens
        branches = 2 if tiny.guidance == "separate" else 1
        assert lengths[sublayer.path] == [length for length in expected for _ in range(branches)]
    assert fewer >= len(mlps)


def test_conservative_steps_without_tokens_are_foras() -> None:
    model = tiny_dit()
    for name in ("toca", "duca"):
        # Of two steps between full ones, at 1 and 2 steps before the next, DuCa's second is
        # aggressive; with an interval of 2 all are conservative.
        scheduler = _Announced(9)
        with attach(_Pipe(model, scheduler), name, interval=2, ratio=0):
            scheduler.set_timesteps()
            found = NoisyLoop(model, steps=9)(0)
        with Replay(model, [None if n % 2 == 0 else n - 1 for n in range(9)]):
            assert torch.equal(found, NoisyLoop(model, steps=9)(0))


def test_random_tokens_are_those_of_every_half_and_branch() -> None:
    tiny = by_name("dit")
    pipeline = tiny.build()
    chosen: list[Tensor] = []
    original = torch.Tensor.topk

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            found = func(*args, **(kwargs or {}))
            if func is original:
                chosen.append(found.indices)
            return found

    with attach(pipeline, "toca(interval=4, ratio=0.3, score=random)"), Watch():
        tiny.call(pipeline, 10, 2, 0)
    assert len(chosen) > 5
    for indices in chosen:
        assert indices.shape[0] == 4
        assert (indices == indices[:1]).all()
    assert len({tuple(i[0].tolist()) for i in chosen if i.shape[1] == chosen[-1].shape[1]}) > 1
    tiny = by_name("flux-true-cfg")
    pipeline = tiny.build()
    chosen.clear()
    with attach(pipeline, "toca(interval=4, ratio=0.1, score=random)") as cached, Watch():
        tiny.call(pipeline, 10, 1, 0)
    rows = _schedule(cached)
    chunk, by_step = 0, []
    for row in rows:
        count = sum(0 < share < 1 for share in row)
        by_step.append([c[0].tolist() for c in chosen[chunk : chunk + count]])
        chunk += count
    assert sum(map(len, by_step)) == len(chosen) > 10
    assert by_step[::2] == by_step[1::2]


def test_seeds_of_random_scores() -> None:
    model = tiny_dit()
    results = []
    for seed in (0, 1, 0):
        with attach(model, "toca", interval=4, ratio=0.3, score="random", seed=seed):
            results.append(NoisyLoop(model, steps=10)(0))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def _without_vae(tiny: Any) -> Any:
    """The pipeline; a DiT's images are its latents."""
    pipeline = tiny.build()
    if tiny.name == "dit":
        pipeline.vae.decode = lambda latents: type("Decoded", (), {"sample": latents})
    return pipeline


_PLACES: dict[str, dict[str, slice]] = {
    # name -> where the tokens of an MLP are among those of its attention
    "sd3": {"ff": slice(0, 16), "ff_context": slice(16, None)},
    "flux": {"ff": slice(6, None), "ff_context": slice(0, 6), "proj_mlp": slice(None)},
    "qwen-image": {"img_mlp": slice(-16, None), "txt_mlp": slice(0, -16)},
    "lumina2": {"feed_forward": slice(None)},  # grouped: one head of keys for two of queries
    "pixart-sigma": {"ff": slice(None)},
    "wan": {"ffn": slice(None)},
    "dit": {"ff": slice(None)},
    "ltx": {"ff": slice(None)},
    "hunyuan-dit": {"ff": slice(None)},
    "cogvideox": {"ff": slice(None)},
}


class _Maps(TorchFunctionMode):
    """All attention maps inside it, whole and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            call = dict(zip(names, args, strict=False)) | kwargs
            q, k, mask = call["query"].double(), call["key"].double(), call.get("attn_mask")
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scale = call.get("scale") or 1 / math.sqrt(q.shape[-1])
            logits = q @ k.transpose(-1, -2) * scale
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -math.inf)
            elif mask is not None:
                logits = logits + mask
            self.maps.append(logits.softmax(-1))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", _PLACES)
def test_attention_scores_are_those_of_the_whole_map(name: str) -> None:
    tiny = by_name(name)
    pipeline = _without_vae(tiny)
    sites = find_sites(pipeline.transformer)
    with attach(pipeline, "toca(interval=9, score=attention)") as cached, _Maps() as maps:
        tiny.call(pipeline, 1, BATCH, 0)
        sessions = list(cached._models[0]._sessions.values())
    found = maps.maps
    # Attentions in the order in which they ran: refiners first, then those of the blocks.
    own = [s for s in sites.sublayers if s.kind != "mlp"]
    found = found[-len(own) :]
    scores = sessions[-1]._scores
    checked = 0
    for number, sublayer in enumerate(sites.sublayers):
        if not sublayer.per_token:
            continue
        first = next(
            n for n, s in enumerate(own) if s.block == sublayer.block and s.kind == "attention"
        )
        received = found[first].mean(1).sum(1)
        expected = received / received.norm(dim=-1, keepdim=True)
        part = expected[:, _PLACES[name][sublayer.path.rsplit(".", 1)[-1]]]
        torch.testing.assert_close(scores[number].double(), part, rtol=0, atol=2e-6)
        assert part.std() > 1e-5
        checked += 1
    assert checked == len(scores) == sum(s.per_token for s in sites.sublayers)


def test_the_tap_sees_every_form_of_call() -> None:
    seen: list[Any] = []
    q = torch.randn(1, 1, 2, 4)
    with AttentionTap(lambda *call: seen.append(call)):
        nn.functional.scaled_dot_product_attention(q, q, q)
        nn.functional.scaled_dot_product_attention(q, key=q, value=q, attn_mask=None, scale=2.0)
    nn.functional.scaled_dot_product_attention(q, q, q)
    assert [call[3:] for call in seen] == [(None, None), (None, 2.0)]


# -- what is saved -----------------------------------------------------------------------------

EMBEDDERS = (
    BATCH * TOKENS * 4 * 4 * CHANNELS  # patches of 2 x 2 x 4
    + BATCH * (256 * CHANNELS + CHANNELS * CHANNELS)  # the timestep, for the final layer
)
FINAL = BATCH * CHANNELS * 2 * CHANNELS + BATCH * TOKENS * CHANNELS * 16


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    batch, heads, rows, dim = q
    return 2 * batch * heads * rows * k[2] * (dim + v[3])


def _flops(call: Callable[[], Any]) -> int:
    # torch has no formula for the attention that it runs on a CPU.
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu: _attention_flops})
    with counter:
        call()
    return counter.get_total_flops()


METHODS: dict[str, Callable[[nn.Module, int], dict[str, Any]]] = {
    "interval": lambda m, n: {"interval": 3},
    "interval stack": lambda m, n: {"interval": 3, "level": "stack"},
    "taylor stack": lambda m, n: {"interval": 3, "level": "stack"},
    "l2c": lambda m, n: {"router": _learned(m, n)},
    "first_block": lambda m, n: {"threshold": 1.0},
    "dbcache": lambda m, n: {"threshold": 1.0, "back": 1, "longest": 2},
    "toca": lambda m, n: {"interval": 4, "ratio": 0.3},
    "duca": lambda m, n: {"interval": 4, "ratio": 0.3},
}


@functools.cache
def _flops_uncached(name: str, steps: int) -> int:
    tiny = by_name(name)
    pipeline = _without_vae(tiny)
    return _flops(lambda: tiny.call(pipeline, steps, 1, 0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("dit", method) for method in METHODS),
        *(("hunyuan-dit", method) for method in ("dbcache", "duca")),
        *(("flux", method) for method in ("interval stack", "l2c", "toca")),
    ],
)
def test_macs_are_what_torch_counts_in_a_run(name: str, method: str) -> None:
    steps = 6
    tiny = by_name(name)
    pipeline = _without_vae(tiny)
    transformer = pipeline.transformer
    whole = _flops_uncached(name, steps)
    options = METHODS[method](transformer, steps)
    with attach(pipeline, method.split()[0], **options) as cached:
        spent = _flops(lambda: tiny.call(pipeline, steps, 1, 0))
        report = cached.report()
        assert report.macs is not None
        assert 2 * report.macs_uncached == whole
        # What is left of a token-wise share is rounded to whole numbers once in a report.
        assert abs(2 * report.macs - spent) <= 2
        assert spent < whole


@pytest.mark.parametrize("tiny", PIPELINES, ids=lambda tiny: tiny.name)
def test_macs_of_every_pipeline(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiny.name == "lumina2":
        # It cuts prompts by their masks: of two branches, the first one's length is counted.
        same = torch.tensor([[1, 1, 1, 1, 1, 0]])
        masks = {f"{p}prompt_attention_mask": same for p in ("", "negative_")}
        monkeypatch.setattr(pipelines, "_masks", lambda batch: masks)
    pipeline = _without_vae(tiny)
    whole = _flops_uncached(tiny.name, 2)
    with attach(pipeline, "interval(interval=2)") as cached:
        spent = _flops(lambda: tiny.call(pipeline, 2, 1, 0))
        report = cached.report()
    assert (2 * report.macs, 2 * report.macs_uncached) == (spent, whole)


def test_an_aggressive_step_costs_embedders_and_final_layer() -> None:
    steps = 10
    scheduler = _Announced(steps)
    model: Any = tiny_dit()
    loop = NoisyLoop(model, steps=steps)
    counts: list[int] = []

    def watch(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result: Any = None

            def call() -> None:
                nonlocal result
                result = original(*args, **kwargs)

            counts.append(_flops(call) // 2)
            return result

        return forward

    plain = PlainTokens(steps, 6, 0.2, 0.8, "value_norm", True)
    sample(model, loop.timesteps, plain)
    with attach(_Pipe(model, scheduler), "duca(interval=6, ratio=0.2)") as cached:
        scheduler.set_timesteps()
        model.forward = watch(model, model.forward)
        loop(0)
        del model.forward
        report = cached.report()
    aggressive = [c for c, kind in zip(counts, plain.kinds, strict=True) if kind == "aggressive"]
    assert len(aggressive) >= 2
    assert aggressive == [EMBEDDERS + FINAL] * len(aggressive)
    assert abs(report.macs - sum(counts)) <= 1


def test_macs_skipped_are_those_of_the_sublayers_by_hand() -> None:
    model = tiny_dit()
    hidden = BATCH * TOKENS * CHANNELS
    attention = 4 * hidden * CHANNELS + 2 * BATCH * TOKENS * TOKENS * CHANNELS
    mlp = 2 * hidden * 4 * CHANNELS
    learned = _learned(model, 6)
    skipped = 0
    for row in (learned.scores.double().sigmoid() > 0.5).tolist():
        for index, computed in enumerate(row):
            skipped += 0 if computed else (attention, mlp)[index % 2]
    with attach(model, "l2c", router=learned) as cached:
        NoisyLoop(model)(0)
        report = cached.report()
    assert report.macs_uncached - report.macs == skipped > 0


def test_macs_add_up_over_shapes() -> None:
    model = tiny_dit()
    with attach(model, "interval(interval=2)") as cached:
        NoisyLoop(model, batch=2)(0)
        one = cached.report()
        first, whole = one.macs, one.macs_uncached
        NoisyLoop(model, batch=4)(0)
        report = cached.report()
        assert (report.macs, report.macs_uncached) == (3 * first, 3 * whole)
        cached.clear_report()
        assert cached.report().macs == 0
        NoisyLoop(model, batch=2)(0)
        assert cached.report().macs == first


def test_counting_changes_nothing() -> None:
    model = tiny_dit()
    with attach(model, "interval(interval=2)") as cached:
        expected = NoisyLoop(model)(0)
        held = cached.nbytes
        assert cached.report().macs
        assert cached.nbytes == held
        assert cached.report().evaluations == 6
        assert torch.equal(NoisyLoop(model)(0), expected)
    assert all(p.device.type == "cpu" for p in model.parameters())


# -- what is kept ------------------------------------------------------------------------------

FEATURE = BATCH * TOKENS * CHANNELS * 8  # bytes of one output, float64
SCORES = BATCH * TOKENS * 4  # bytes of one row of scores or counters, float32


@pytest.mark.parametrize(
    ("method", "after"),
    [
        # bytes after each of 4 steps
        ("interval(interval=1)", [0, 0, 0, 0]),
        ("interval(interval=2)", [6 * FEATURE] * 4),
        ("interval(interval=2, level=stack)", [FEATURE] * 4),
        ("taylor(order=1, interval=1)", [0, 0, 0, 0]),
        ("taylor(order=0, interval=2)", [6 * FEATURE] * 4),
        ("taylor(order=1, interval=2)", [6 * FEATURE] * 2 + [12 * FEATURE] * 2),
        ("taylor(order=2, interval=2, warmup=3)", [6 * FEATURE * n for n in (1, 2, 3, 3)]),
        ("taylor(order=1, interval=2, level=stack)", [FEATURE] * 2 + [2 * FEATURE] * 2),
        ("first_block(threshold=9)", [2 * FEATURE] * 4),
        ("first_block(threshold=0)", [FEATURE] * 4),
        ("dbcache(threshold=9, order=1, longest=1)", [2 * FEATURE] * 2 + [3 * FEATURE] * 2),
        ("toca(interval=2, ratio=0.3)", None),
        ("toca(interval=1)", [0, 0, 0, 0]),
    ],
)
def test_bytes_held(method: str, after: list[int] | None) -> None:
    model = tiny_dit()
    found: list[int] = []
    with attach(model, method) as cached:
        assert cached.nbytes == 0
        NoisyLoop(model, steps=4)(0, each=lambda *_: found.append(cached.nbytes))
        if after is None:  # outputs and scores of MLPs, and counters once tokens age
            base = 6 * FEATURE + 3 * SCORES
            assert found[0] == base
            assert base + 3 * SCORES in found
            after = found
        assert found == after
        assert cached.report().peak_bytes == max(after)
        cached.reset()
        assert cached.nbytes == 0
        NoisyLoop(model, steps=4)(0)
        assert cached.nbytes == after[-1]
    assert cached.nbytes == 0


def test_bytes_of_two_branches_and_of_shared_storages() -> None:
    """Image and text of one attention are views of one tensor, which counts once."""
    tiny = by_name("flux-true-cfg")
    pipeline = tiny.build()
    with attach(pipeline, "interval(interval=9)") as cached:
        tiny.call(pipeline, 3, BATCH, 0)
        found = cached.nbytes
    kept: dict[int, int] = {}
    one, both = 0, 0
    replay = Replay(pipeline.transformer, [None, None])
    with replay:
        tiny.call(pipeline, 1, BATCH, 0)
        for outputs in replay.outputs:
            for value in outputs.values():
                for part in value if isinstance(value, tuple) else (value,):
                    if part is not None:
                        kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
                        both += part.nbytes
        one = sum(kept.values())
    assert found == one <= both


def test_bytes_count_each_storage_once_and_whole() -> None:
    whole = torch.zeros(4, 6)
    assert nbytes([whole, whole, (whole[:1], None), {"a": [whole.T]}]) == 96
    assert nbytes([whole[:1]]) == 96  # a view keeps all of it alive
    assert nbytes([whole, whole.clone()]) == 192
    assert nbytes([None, 3, ()]) == 0


# -- the report --------------------------------------------------------------------------------


def test_numbers_of_a_report() -> None:
    model = tiny_dit()
    with attach(model, "interval(interval=3)") as cached:
        empty = cached.report()
        assert (empty.runs, empty.evaluations, empty.computed_share) == (0, 0, 0.0)
        assert (empty.macs, empty.macs_uncached, empty.peak_bytes) == (0, 0, 0)
        assert "0 runs" in str(empty)
        for seed in range(2):
            NoisyLoop(model, steps=7)(seed)
        report = cached.report()
    assert (report.runs, report.evaluations) == (2, 14)
    assert report.computed_share == pytest.approx(3 / 7)
    assert report.seconds > 0
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["method"] == "interval(interval=3, level=sublayer)"
    assert len(plain["sublayers"]) == 6
    for counts in plain["sublayers"].values():
        assert counts == {"computed": 6.0, "reused": 8.0}
    text = " ".join(str(report).split())
    for part in ("2 runs, 14 evaluations", "transformer_blocks.*.attn1", "43%", " 18 ", " 24 "):
        assert part in text


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9))
def test_shares_follow_the_interval(interval: int, steps: int) -> None:
    with attach(_MODEL, "interval", interval=interval) as cached:
        NoisyLoop(_MODEL, steps=steps)(0)
    assert cached.report().computed_share == pytest.approx(math.ceil(steps / interval) / steps)
