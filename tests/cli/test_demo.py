"""`mnemon demo`: figures that follow from the model are right, and what fails is said."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import CONTEXT, run, run_json, save_tiny
from test_report import make_result
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    QuantizedCache,
    StaticCache,
)

import mnemon
from mnemon.cli import contenders, demo, demo_run, trial
from mnemon.cli.models import load_model
from mnemon.cli.sources import own_text

OPTIONS = ["--context", "64", "--new-tokens", "6"]
NAMES = [
    "DynamicCache",
    "StaticCache",
    "QuantizedCache fp8",
    "dense",
    "dense + attach",
    "static",
    "static + attach",
    "int8 + attach",
    "int4 + attach",
    "int2 + attach",
    "fp8 + attach",
    "window(4096) + attach",
    "sinks(4) + window(4096) + attach",
    "random(keep=0.25) + attach",
    "h2o(keep=1024) + attach",
    "tova(keep=1024) + attach",
    "host + attach",
    "disk(memory=256MiB) + attach",
]
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("demo") / "tiny")


@pytest.fixture(scope="module")
def llm(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the demo, shared by the tests that read it."""
    out = tmp_path_factory.mktemp("out")
    return {**run_json("demo", model, *OPTIONS, "--out", out), "folder": out}


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["rows"]}


def test_every_cache_is_there_and_none_failed(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if not row["name"].endswith("-4")]  # quanto, hqq
    assert [row["name"] for row in rows] == NAMES
    assert [row["error"] for row in rows] == [""] * len(NAMES)
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["first_token_s"] > 0
        assert row["bits_per_byte"] > 0
        assert len(row["tokens"]) == 6


def test_lossless_caches_agree_and_the_lossy_one_shows(found: dict[str, Any]) -> None:
    rows = by_name(found)
    for name in NAMES:
        if "fp8" in name or name.startswith(("int", "random")):
            assert rows[name]["logit_difference"] > 0
        else:
            assert rows[name]["agreement"] == 1.0
            assert rows[name]["logit_difference"] < 1e-4
    assert rows["DynamicCache"]["logit_difference"] == 0.0
    assert rows["QuantizedCache fp8"]["logit_difference"] > 1e-3


def test_stored_bytes_follow_from_the_shape(found: dict[str, Any]) -> None:
    rows = by_name(found)
    for name in ("DynamicCache", "dense", "dense + attach", "static", "static + attach"):
        assert rows[name]["bytes_per_token"] == BYTES_PER_TOKEN
        assert rows[name]["held_bytes"] >= (64 + 5) * BYTES_PER_TOKEN
    # transformers' static layer and its fp8 layer keep a few bytes of counters and scales
    assert rows["StaticCache"]["bytes_per_token"] == pytest.approx(BYTES_PER_TOKEN, rel=0.01)
    assert rows["QuantizedCache fp8"]["bytes_per_token"] == pytest.approx(
        BYTES_PER_TOKEN / 4, rel=0.01
    )


def test_reuse_and_the_prompt_fed_twice(found: dict[str, Any]) -> None:
    reuse = found["reuse"]
    assert reuse["same_tokens"]
    assert reuse["num_reused"] == reuse["num_shared"] == 64
    assert len(reuse["fresh_s"]) == len(reuse["kept_s"]) == len(reuse["loaded_s"]) == 3
    assert reuse["file_bytes"] > 64 * BYTES_PER_TOKEN
    theirs, ours = found["fed_twice"]
    assert theirs["name"] == "DynamicCache"
    assert theirs["num_held"] == 2 * theirs["num_prompt"] + 15
    assert theirs["num_same"] < theirs["num_prompts"]
    assert ours["num_held"] == ours["num_right"] == ours["num_prompt"] + 15
    assert ours["num_same"] == ours["num_prompts"]


def test_the_report_is_written_with_these_figures(found: dict[str, Any]) -> None:
    assert [path.name for path in found["folder"].iterdir()] == ["report.html"]
    page = (found["folder"] / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert name in page
        assert f"{by_name(found)[name]['tokens_per_s']:.1f}" in page
    assert found["environment"]["torch"] in page


def test_contexts_of_the_sweep(found: dict[str, Any]) -> None:
    assert sorted({point["context"] for point in found["speed"]}) == [32, 64, 128]


def test_prints_one_table_and_the_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "TIME_S", 0.0)
    file = tmp_path / "text.txt"
    file.write_text(own_text().text[:6000])
    result = run("demo", model, *OPTIONS, "--file", file, "--out", tmp_path)
    assert result.exit_code == 0
    for name in NAMES:
        assert name in result.stdout
    assert "report.html" in result.stdout
    assert "text.txt" in result.stdout
    assert "no prompt given twice" in result.stdout


def test_findings_are_printed_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    demo._print(make_result(), Path("out/report.html"))
    out = capsys.readouterr().out
    assert "2,048 of 2,080 tokens: first token after 1,000 ms computed, 20 ms from" in out
    assert "DynamicCache: 1 of 4 answers right, 75 tokens held where 43 are right" in out
    assert "dense + attach: 4 of 4 answers right, 43 tokens held" in out
    assert "100% at 16, 90% at 256, 40% at 1,024" in out
    assert "out/report.html" in out


def test_out_of_time_measures_less_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "TIME_S", 0.0)
    found = run_json("demo", model, *OPTIONS, "--out", tmp_path)
    assert found["settings"]["rounds"] == 1
    assert {point["context"] for point in found["speed"]} == {64}
    (note,) = found["notes"]
    assert "1 of 3 timed rounds" in note
    assert "dense was not scored" in note
    assert "no speed with 128 tokens of context" in note
    assert found["reuse"] is None
    assert found["fed_twice"] == []
    assert by_name(found)["dense"]["bits_per_byte"] is None
    assert by_name(found)["dense"]["tokens_per_s"] > 0


def test_a_cache_that_fails_is_a_row_not_the_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_broken(llm: Any) -> list[contenders.Contender]:
        def broken(tokens: int) -> Any:
            raise ValueError("no such layer\nmore")

        good = contenders.contenders(llm)
        return [*good[:1], dataclasses.replace(good[1], name="broken", make=broken), *good[2:]]

    monkeypatch.setattr(demo_run, "contenders", with_broken)
    monkeypatch.setattr(demo_run, "TIME_S", 0.0)
    found = run_json("demo", model, *OPTIONS, "--out", tmp_path)
    assert by_name(found)["broken"]["error"] == "ValueError: no such layer"
    assert by_name(found)["dense"]["error"] == ""
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not with this model: ValueError: no such layer" in page


def test_context_is_cut_to_text_and_model(model: Path) -> None:
    loaded = load_model(str(model))
    cut = demo_run.Demo(loaded, own_text(), demo_run.DemoOptions(context=400, num_new=6))
    assert cut.context == CONTEXT - demo_run.SCORED_TOKENS
    assert "shortened from 400 to 256" in cut.all_notes()[0]
    shorter = demo_run.Demo(loaded, own_text(), demo_run.DemoOptions(context=200, num_new=6))
    assert (shorter.context, shorter.all_notes()) == (200, [])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--context", "many"], 2, "not a number of tokens"),
        (["--file", "nowhere.txt"], 1, "cannot read nowhere.txt"),
        (["--new-tokens", "480"], 1, "at least"),
        (["--new-tokens", "0"], 2, "new-tokens"),
        (["--out", "/proc/nowhere"], 1, "choose another --out"),
    ],
)
def test_errors(model: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = run("demo", model, "--out", tmp_path, *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("short")
    result = run("demo", model, "--file", file, "--out", tmp_path)
    assert result.exit_code == 1
    assert "short.txt gives 1 tokens" in result.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["dynamic", "static", "fp8", "mnemon", "mnemon static"])
def test_bytes_of_any_cache(llm: Any, name: str) -> None:
    makers = {
        "dynamic": lambda: DynamicCache(config=llm.config),
        "static": lambda: StaticCache(config=llm.config, max_cache_len=50),
        "fp8": lambda: QuantizedCache("fp8", llm.config),
        "mnemon": lambda: mnemon.Cache(llm.config),
        "mnemon static": lambda: mnemon.Cache(llm.config, "static(50)"),
    }
    cache = makers[name]()
    with torch.no_grad():
        llm(torch.arange(3, 23)[None], past_key_values=cache)
    stored, held = contenders.stored_bytes(cache), contenders.held_bytes(cache)
    wanted = 20 * BYTES_PER_TOKEN // (4 if name == "fp8" else 1)
    assert wanted <= stored <= wanted + 64  # counters and scales
    if "static" in name:
        assert held >= 50 * BYTES_PER_TOKEN
    assert held >= stored


def test_score_is_what_the_whole_text_scores(llm: Any) -> None:
    ids = torch.tensor([[5, 9, 77, 300, 4, 8, 1000, 12] * 20])
    with torch.no_grad():
        logits = llm(ids).logits[0, 39:-1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 40:], reduction="sum")
    found = trial.score(llm, ids, DynamicCache(config=llm.config), 40)
    torch.testing.assert_close(found.logits, logits, atol=1e-4, rtol=1e-4)
    assert found.nll == pytest.approx(float(nll), rel=1e-5)


def test_mamba_type_models_are_measured_too() -> None:
    config = MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4)
    torch.manual_seed(0)
    model = MambaForCausalLM(config).eval()
    ids = torch.arange(3, 23)[None]
    runs, logits = [], []
    for make in (lambda: DynamicCache(config=config), lambda: mnemon.Cache(config)):
        runs.append(trial.generate(model, ids, make(), 5).tokens)
        logits.append(trial.score(model, ids, make(), 10).logits)
    assert runs[0] == runs[1]
    torch.testing.assert_close(*logits)
    filled = DynamicCache(config=config)
    trial.generate(model, ids, filled, 2)
    assert contenders.held_tokens(filled) is None


def test_times_add_up(llm: Any) -> None:
    run_ = trial.generate(llm, torch.tensor([[5, 9, 77]]), DynamicCache(config=llm.config), 10)
    assert len(run_.tokens) == 10
    assert len(run_.step_s) == 9
    assert min(run_.step_s) > 0
    assert run_.first_token_s > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's account")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with trial.PeakMemory(torch.device("cpu")) as peak:
        torch.ones(16 * 2**20)  # 64 MiB, freed at once
    if peak.bytes is None:
        pytest.skip("the kernel does not let this process reset its peak")
    assert 60 * 2**20 < peak.bytes < 120 * 2**20
    with trial.PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes is not None
    assert peak.bytes < 8 * 2**20
