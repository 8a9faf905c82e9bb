"""`mnemon bench --kernels` on a small shape: figures follow from each other and from the bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import run, run_json

from mnemon.cli import bench_kernels, bench_kernels_report
from mnemon.formats import default_scheme

SHAPE = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--rounds", "1")
QUICK = ("bench", "--kernels", "--contexts", "96,300", *SHAPE)
PATHS = [*bench_kernels.TORCH_PATHS, *bench_kernels.FORMATS]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "READ_BYTES", 2**20)
    monkeypatch.setattr(bench_kernels, "MOST_CALLS", 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_kernels, "READ_BYTES", 2**20)
        patch.setattr(bench_kernels, "MOST_CALLS", 2)
        return run_json(*QUICK, "--out", folder), folder


def test_every_path_at_every_context(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    assert [(row["context"], row["path"]) for row in found["results"]] == [
        (context, path) for context in (96, 300) for path in PATHS
    ]
    best = 1e9 * found["read_gb_per_s"]
    assert found["read_gb_per_s"] >= found["read_gb_per_s_median"] > 0
    for row in found["results"]:
        assert row["error"] is None
        assert 1 <= row["calls"] <= 2
        speed = row["size_bytes"] / row["ms"] * 1e3
        assert row["gb_per_s"] == pytest.approx(speed / 1e9)
        assert row["share_of_read"] == pytest.approx(speed / best)
        assert row["floor_ms"] == pytest.approx(1e3 * row["size_bytes"] / best)


def test_ratios_are_of_the_same_context(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    for context in (96, 300):
        ms = {row["path"]: row["ms"] for row in found["results"] if row["context"] == context}
        best = min(ms[path] for path in bench_kernels.TORCH_PATHS)
        for row in found["results"]:
            if row["context"] == context:
                assert row["against_sdpa"] == pytest.approx(ms["SDPA, enable_gqa"] / row["ms"])
                assert row["against_best_torch"] == pytest.approx(best / row["ms"])
                assert row["against_bf16"] == pytest.approx(ms["bf16"] / row["ms"])


def test_bytes_are_those_of_the_format(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    size = {(row["context"], row["path"]): row["size_bytes"] for row in found["results"]}
    for context, num_blocks in ((96, 0), (300, 3)):
        numbers = 2 * 2 * context * 32
        for path in ("SDPA, enable_gqa", "SDPA, mask", "grouped torch", "bf16"):
            assert size[context, path] == 2 * numbers
        assert size[context, "fp32"] == 4 * numbers
        for code in ("int8", "int4", "int2", "fp8"):
            block = default_scheme(code, 32, is_keys=True).block_bytes(32)
            block += default_scheme(code, 32, is_keys=False).block_bytes(32)
            tail = 2 * 2 * (context - 64 * num_blocks) * 32 * 2
            assert size[context, code] == num_blocks * 2 * (block + 2 * 4) + tail


def test_all_paths_compute_the_same_attention(written: tuple[dict[str, Any], Path]) -> None:
    found, _ = written
    most = {"int8": 0.05, "fp8": 0.2, "int4": 0.5, "int2": 2.0}
    for row in found["results"]:
        limit = 0.01 if row["context"] == 96 else most.get(row["path"], 0.01)
        assert row["difference"] < limit, row["path"]
    assert found["results"][0]["difference"] == 0


def test_the_kernel_files(written: tuple[dict[str, Any], Path]) -> None:
    found, folder = written
    assert json.loads((folder / "kernels.json").read_text()) == found
    for chart in ("kernels_time", "kernels_share"):
        assert (folder / f"{chart}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "kernels.html").read_text()
    assert page.count("<svg") == 2
    assert "int4" in page
    assert not re.search(r"(?:src|href)=[\"']https?://", page)
    assert "| 300 | int4 |" in (folder / "kernels.md").read_text()


def test_only_the_formats_asked_for() -> None:
    result = run("bench", "--kernels", "--contexts", "80", *SHAPE, "--cache", "int4")
    assert result.exit_code == 0
    assert "int4" in result.stdout
    assert "of read" in result.stdout
    assert "int8" not in result.stdout
    assert "fp32" not in result.stdout


def test_a_format_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench_kernels._path

    def failing(name: str, *rest: Any) -> Any:
        if name == "int2":
            raise ValueError("no such kernel\nat all")
        return honest(name, *rest)

    monkeypatch.setattr(bench_kernels, "_path", failing)
    settings = bench_kernels.Settings(
        contexts=(64,), heads=2, kv_heads=2, head_dim=16, rounds=1, formats=("int8", "int2")
    )
    run = bench_kernels.measure(settings, lambda doing, units: None)
    record = bench_kernels_report.record(settings, run, {"torch_threads": 1})
    failed = record["results"][-1]
    assert (failed["path"], failed["error"]) == ("int2", "no such kernel")
    assert failed["ms"] is failed["against_bf16"] is None
    assert "no such kernel" in bench_kernels_report._markdown(record)


def test_progress_counts_every_unit() -> None:
    settings = bench_kernels.Settings(
        contexts=(32, 64), heads=2, kv_heads=1, head_dim=16, rounds=2, formats=("bf16",)
    )
    done: list[int] = []
    bench_kernels.measure(settings, lambda doing, units: done.append(units))
    assert sum(done) == bench_kernels.num_units(settings)


def test_without_the_extension_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemon.attention import cpu

    monkeypatch.setattr(cpu, "is_built", lambda: False)
    reader = bench_kernels._Reader("cpu")
    reader.read()
    assert len(reader.speeds) == 1
    assert torch.equal(reader._buffer[:2], torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    "words",
    [
        ("--shape", "tiny"),
        ("some-model",),
        ("--heads", "6", "--kv-heads", "4"),
        ("--cache", "dense"),
        ("--contexts", "few"),
    ],
)
def test_wrong_calls_of_kernels(words: tuple[str, ...]) -> None:
    result = run("bench", "--kernels", *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
