"""`mnemon bench` on a tiny shape: every figure is there, and means what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import run, run_json
from transformers import DynamicCache

import mnemon
from mnemon.cli import bench_report, bench_run

QUICK = ("bench", "--shape", "tiny", "--contexts", "32,96", "--rounds", "2", "--steps", "2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    return run_json(*QUICK, "--dtype", "float32", "--out", folder), folder


def test_every_cache_at_every_context(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    names = ["DynamicCache", "StaticCache", "dense + attach"]
    assert [(row["context"], row["cache"]) for row in found["results"]] == [
        (context, name) for context in (32, 96) for name in names
    ]
    for row in found["results"]:
        assert row["error"] is None
        assert len(row["steps_ms"]) == 4
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["step_ms"])
        assert row["same_tokens"] is True
        assert row["append_us"] > 0
        assert row["prefill_tokens_per_s"] is None  # filled with random numbers
        assert row["held_bytes"] >= row["stored_bytes"]
    reference = found["results"][0]
    assert reference["speed_ratio"] == 1


def test_stored_bytes_are_those_of_the_tokens(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    shape = bench_run.SHAPES["tiny"]
    token = 2 * 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    for row in found["results"]:
        tokens = row["context"] + bench_run.WARM_UP_STEPS + 2 * 2
        counters = 64 if row["cache"] == "StaticCache" else 0  # its lengths are tensors
        assert 0 <= row["stored_bytes"] - token * tokens <= counters


def test_the_files(written: tuple[dict[str, Any], Path]) -> None:
    found, folder = written
    assert json.loads((folder / "bench.json").read_text()) == found
    for chart in ("decode", "ratio", "append", "memory"):
        assert (folder / f"{chart}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{chart}.svg").read_text()
    page = (folder / "bench.html").read_text()
    assert page.count("<svg") == 4
    assert "dense + attach" in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"(?:src|href)=[\"']https?://", page)
    assert "<script" not in page


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(*QUICK, "--no-check", "--all")
    assert result.exit_code == 0
    for name in ("DynamicCache", "StaticCache", "static + attach", "dense"):
        assert name in result.stdout
    assert "Medians of 4 steps" in result.stdout


def test_prefill_is_timed_on_request() -> None:
    found = run_json(*QUICK, "--prefill", "--no-check", "--cache", "dense")
    assert [row["cache"] for row in found["results"]] == ["DynamicCache", "dense"] * 2
    assert all(row["prefill_tokens_per_s"] > 0 for row in found["results"])
    assert all(row["same_tokens"] is None for row in found["results"])


def test_prefills_take_turns() -> None:
    words = ("bench", "--shape", "tiny", "--contexts", "96", "--rounds", "1", "--steps", "1")
    found = run_json(
        *(*words, "--prefill", "--prefill-rounds", "3", "--no-check"),
        *("--cache", "dense + attach", "--cache", "int4 + attach"),
    )
    names = ["DynamicCache", "dense + attach", "int4 + attach"]
    assert [row["cache"] for row in found["results"]] == names
    for row in found["results"]:
        assert row["error"] is None
        assert len(row["prefills_s"]) == 3
        middle = sorted(row["prefills_s"])[1]
        assert row["prefill_tokens_per_s"] == pytest.approx(96 / middle, rel=1e-3)
    base, *others = (row["prefill_tokens_per_s"] for row in found["results"])
    assert found["results"][0]["prefill_ratio"] == 1
    for row, speed in zip(found["results"][1:], others, strict=True):
        assert row["prefill_ratio"] == pytest.approx(speed / base)


def test_any_recipe_is_a_contender() -> None:
    found = run_json(
        *("bench", "--shape", "tiny", "--contexts", "200", "--rounds", "1", "--steps", "1"),
        *("--cache", "int4/int2 + attach", "--cache", "static(16) + attach", "--cache", "int8"),
    )
    rows = {row["cache"]: row for row in found["results"]}
    assert list(rows) == ["DynamicCache", "int4/int2 + attach", "static + attach", "int8"]
    assert all(row["error"] is None for row in rows.values())
    assert rows["static + attach"]["same_tokens"] is True  # sized to what the run needs
    assert rows["int8"]["same_tokens"] is rows["int4/int2 + attach"]["same_tokens"] is None
    assert rows["int4/int2 + attach"]["stored_bytes"] < rows["int8"]["stored_bytes"]
    assert rows["int8"]["stored_bytes"] < rows["DynamicCache"]["stored_bytes"]


def test_transformers_quantized_caches_have_short_names() -> None:
    from mnemon.cli.contenders import contender, contenders

    model = bench_run.random_model("tiny", torch.float32, "cpu")
    for each in contenders(model):
        assert contender(model, each.name).name == each.name
        if each.name.endswith("-4"):
            short = each.name.removeprefix("QuantizedCache ")
            assert contender(model, short).name == each.name
            assert not each.lossless
    assert contender(model, "fp8").library == "mnemon"


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_run._filled

    def failing(model: Any, rival: Any, *rest: Any) -> Any:
        if rival.name == "dense":
            raise AssertionError("not with this shape")
        return honest(model, rival, *rest)

    monkeypatch.setattr(bench_run, "_filled", failing)
    found = run_json(*QUICK, "--no-check", "--cache", "dense")
    errors = {row["cache"]: row["error"] for row in found["results"]}
    assert errors == {"DynamicCache": None, "dense": "not with this shape"}


def test_tokens_that_differ_are_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_run._greedy

    def forged(model: Any, rival: Any, settings: Any, context: int) -> list[int]:
        tokens = honest(model, rival, settings, context)
        return [*tokens[:-1], tokens[-1] + 1] if rival.library == "mnemon" else tokens

    monkeypatch.setattr(bench_run, "_greedy", forged)
    result = run(*QUICK, "--json")
    assert result.exit_code == 3
    rows = json.loads(result.stdout)["results"]
    assert {row["same_tokens"] for row in rows if row["library"] == "mnemon"} == {False}
    assert {row["same_tokens"] for row in rows if row["library"] == "transformers"} == {True}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--shape", "7b"), 1),
        (("--shape", "tiny", "--contexts", "9k"), 1),
        (("--shape", "tiny", "--contexts", "few"), 2),
        (("--shape", "tiny", "--contexts", "64", "--cache", "int1"), 2),
        (("some-model", "--shape", "tiny"), 2),
    ],
)
def test_wrong_calls(words: tuple[str, ...], code: int) -> None:
    result = run("bench", *words)
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_filling_gives_every_cache_the_same_content() -> None:
    model = bench_run.random_model("tiny", torch.float32, "cpu")
    ids = bench_run._tokens(model, 2, 80)
    theirs, ours = DynamicCache(config=model.config), mnemon.Cache(model.config)
    for cache in (theirs, ours):
        bench_run.fill(model, cache, ids, 70)
        assert cache.get_seq_length() == 70
    for one, other in zip(theirs.layers, ours.layers, strict=True):
        view = other.view()
        assert view is not None
        assert torch.equal(one.keys, view[0])
        assert torch.equal(one.values, view[1])


def test_the_check_leaves_the_weights_as_they_were() -> None:
    model = bench_run.random_model("tiny", torch.bfloat16, "cpu")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = bench_run.Settings(contexts=(20,), rounds=1, steps=1, prefill=False)
    from mnemon.cli.contenders import contenders

    bench_run.measure(model, contenders(model)[:1], settings, lambda doing, units: None)
    for name, weight in model.named_parameters():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, before[name])


def test_states_cannot_be_made_up() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from mnemon.errors import ModelError

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    model = MambaForCausalLM(config).eval()
    with pytest.raises((ModelError, TypeError)):
        bench_run.fill(model, DynamicCache(config=config), torch.ones(1, 4, dtype=torch.long), 4)


def test_lines_have_a_colour_of_their_own() -> None:
    rows = [
        {"cache": name, "library": library}
        for name, library in (("a", "mnemon"), ("b", "mnemon"), ("c", "transformers"))
    ]
    lines = bench_report._lines({"results": rows})
    assert len({colour for _, _, colour in lines}) == 3
