"""`mnemon diffusion ...` on a tiny random DiT: every command, its files and its refusals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from mnemon.cli import app, output
from mnemon.cli.diffusion import fronts, record, settings
from mnemon.cli.diffusion.measure import Outcome, Studio, Task
from mnemon.diffusion.digits import build_transformer
from mnemon.diffusion.digits.architecture import build_pipeline
from mnemon.diffusion.digits.classifier import frechet_distance, train_classifier
from mnemon.diffusion.digits.data import load_digits
from mnemon.diffusion.methods.fitted import load_plan
from mnemon.diffusion.router import load_router
from mnemon.errors import DiffusionError, ZooError

STEPS = "4"
PEERS = """
import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    apply: object
    package: str = "other"
    method: str = "Zero"
    error: str | None = None


@contextlib.contextmanager
def zero_blocks(pipe):
    # Every second evaluation skips all blocks but the first.
    block = pipe.transformer.transformer_blocks[1]
    block.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield None
    finally:
        del block.forward


@contextlib.contextmanager
def broken(pipe):
    raise TypeError("takes 2 positional arguments but 3 were given")
    yield


def peers(steps):
    assert steps == 4
    return [
        Peer(name="zero", apply=zero_blocks),
        Peer(name="broken", method="Broken", apply=broken),
        Peer(name="idle", apply=lambda pipe: contextlib.nullcontext(), error="caches nothing"),
    ]
"""


def run(*words: str | Path) -> Result:
    """Runs ``mnemon diffusion WORDS`` in this process."""
    arguments = ["diffusion", *map(str, words)]
    result = CliRunner().invoke(app.build(" ".join(arguments[:2])), arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback for the user: never right
    return result


def run_json(*words: str | Path) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with random weights, its adaptive norms among them."""
    model = build_transformer("tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.02, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("dit") / "random"
    build_pipeline(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "contenders.py").write_text(PEERS)
    return folder


@pytest.fixture(scope="module")
def evaluated(
    pipe: Path, contenders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("eval")
    words = ("-n", "6", "--steps", STEPS, "--batch", "4", "--rounds", "1", "--timed", "1")
    families = ("--only", "interval", "--only", "Zero", "--only", "Broken")
    found = run_json(
        *("eval", pipe, pipe, *words, *families, "--peers", contenders, "--out", folder)
    )
    return found, folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("root writes everywhere")
        yield
    finally:
        folder.chmod(0o700)


# -- eval ------------------------------------------------------------------------------------------


def test_eval_has_every_figure_of_every_setting(evaluated: tuple[dict[str, Any], Path]) -> None:
    found, _ = evaluated
    rows = {row["name"]: row for row in found["results"]}
    base = rows["uncached"]
    assert base["psnr"] is None
    assert base["calls"] == base["macs_share"] == base["speedup"] == 1
    for name, row in rows.items():
        if row["error"] is not None or name == "uncached":
            continue
        assert len(row["pipes"]) == 2
        assert 0 < row["macs_share"] <= 1
        assert row["seconds"] > 0
        assert row["psnr"] is None if row["exact"] else row["psnr"] > 0
        assert row["psnr_sd"] == 0 or row["exact"]  # the same pipeline twice
        assert 0 <= row["accuracy"] <= 1
        assert row["distance"] >= 0
    assert rows["interval(interval=2)"]["calls"] == 0.5
    assert rows["interval(interval=2)"]["peak_bytes"] > rows["3 steps, uncached"]["peak_bytes"] == 0
    assert rows["3 steps, uncached"]["macs_share"] == pytest.approx(0.75)
    assert found["floor"] == base["distance"]
    assert found["classifier_accuracy"] > 0.95


def test_eval_counts_what_peers_compute_and_says_what_fails(
    evaluated: tuple[dict[str, Any], Path],
) -> None:
    rows = {row["name"]: row for row in evaluated[0]["results"]}
    assert rows["other: zero"]["calls"] == pytest.approx(5 / 6)  # one block of six never runs
    assert rows["other: zero"]["peak_bytes"] is None
    assert rows["other: idle"]["exact"]
    assert rows["other: idle"]["note"] == "caches nothing"
    assert rows["other: broken"]["error"].startswith("TypeError: takes 2 positional")


def test_eval_ranks_families_at_equal_cost(evaluated: tuple[dict[str, Any], Path]) -> None:
    found, _ = evaluated
    places = [(table["axis"], table["cost"]) for table in found["at_cost"]]
    assert places == [(axis, cost) for axis in record.AXES for cost in (0.35, 0.5, 0.7)]
    for table in found["at_cost"]:
        values = [entry["psnr"] for entry in table["families"]]
        assert values == sorted(values, reverse=True)
    at_half = {e["family"]: e for e in found["at_cost"][1]["families"]}
    fewer = next(row for row in found["results"] if row["name"] == "2 steps, uncached")
    assert at_half["fewer steps"]["psnr"] == pytest.approx(fewer["psnr"])
    assert at_half["fewer steps"]["gain"] == 0
    assert len(at_half["interval, stack"]["by_pipe"]) == 2


def test_eval_writes_its_files(evaluated: tuple[dict[str, Any], Path]) -> None:
    found, folder = evaluated
    assert json.loads((folder / "eval.json").read_text()) == found
    names = ("psnr_macs", "psnr_wall_clock", "psnr_macs_peers", "costs", "samples")
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "eval.html").read_text()
    assert page.count("<svg") == 5
    assert "interval(interval=2)" in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"(?:src|href)=[\"']https?://", page)
    assert "<script" not in page
    text = (folder / "eval.md").read_text()
    assert "## Best PSNR within a share of the uncached MACs" in text
    assert "other: broken: TypeError" in text
    assert not list(folder.glob(".*"))


def test_eval_prints_who_wins_where(pipe: Path, tmp_path: Path) -> None:
    words = ("-n", "2", "--steps", STEPS, "--rounds", "0", "--only", "first_block", "--at", "0.5")
    result = run("eval", pipe, *words, "--out", tmp_path)
    assert result.exit_code == 0
    assert "At 0.5 of the MACs: " in result.stdout
    assert "wall-clock" not in result.stdout  # nothing was timed
    assert "fewer steps" in result.stdout
    assert "eval.html" in result.stdout


def test_other_models_than_digits_are_not_classified(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(8,), norm_num_groups=1
    )
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(tmp_path / "other")
    words = ("-n", "2", "--steps", STEPS, "--rounds", "0", "--only", "interval")
    found = run_json("eval", tmp_path / "other", *words, "--out", tmp_path)
    assert found["classifier_accuracy"] is found["floor"] is None
    assert all(row["accuracy"] is None for row in found["results"])
    assert (tmp_path / "samples.png").is_file()


# -- demo and bench --------------------------------------------------------------------------------


def test_demo(pipe: Path, tmp_path: Path) -> None:
    words = ("-n", "3", "--steps", STEPS, "--rounds", "1", "--method", "taylor(order=2)")
    result = run("demo", pipe, *words, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    for name in ("uncached", "2 steps, uncached", "duca(interval=3, ratio=0.1)", "taylor(order=2)"):
        assert name in result.stdout
    assert "l2c left out: no router-4.safetensors" in result.stdout
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "diffusion.html",
        "diffusion.png",
    ]
    page = (tmp_path / "new" / "diffusion.html").read_text()
    assert page.count("<svg") == 2
    assert "data:image/png;base64," in page
    assert "<script" not in page


def test_bench_with_peers(pipe: Path, contenders: Path, tmp_path: Path) -> None:
    words = ("-n", "1", "--steps", STEPS, "--rounds", "3", "--method", "interval(interval=4)")
    found = run_json("bench", pipe, *words, "--peers", contenders, "--out", tmp_path)
    names = ["uncached", "interval(interval=4)", "other: zero", "other: broken", "other: idle"]
    assert [row["name"] for row in found["results"]] == names
    for row in found["results"]:
        rounds = row["pipes"][0]["rounds_s"]
        assert len(rounds) == (0 if row["error"] else 3)
        if rounds:
            assert row["seconds"] == sorted(rounds)[1]
    assert {"date", "torch", "torch_threads", "diffusers"} <= found["environment"].keys()
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    for name in ("bench.html", "bench.md", "costs.png", "held.png"):
        assert (tmp_path / name).is_file()
    shown = run("bench", pipe, *words, "--only", "interval")
    assert shown.exit_code == 0
    assert "interval(interval=4)" in shown.stdout
    assert "zero" not in shown.stdout


# -- fit and train-router --------------------------------------------------------------------------


def test_what_is_fitted_beside_a_pipeline_is_found(pipe: Path, tmp_path: Path) -> None:
    """`fit` and `train-router` write what `demo`, `bench` and `eval` look for."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for entry in pipe.iterdir():
        (folder / entry.name).symlink_to(entry)
    plan, router = folder / "plan-4-2.safetensors", folder / "router-4.safetensors"
    words = ("--steps", STEPS, "-n", "2")
    fitted = run_json(*("fit", folder, *words, "--compute", "2", "--rounds", "1", "--out", plan))
    assert len(fitted["computed"]) == sum(load_plan(plan).computed) == 2
    assert fitted["psnr"] >= fitted["psnr_evenly_spread"] > 0
    assert fitted["tried"] >= 2
    trained = run_json(
        *("train-router", folder, *words, "--runs", "1", "--train-steps", "2", "--out", router)
    )
    assert load_router(router).num_steps == 4
    assert trained["computed_share"] == pytest.approx(0.5)
    found = run_json("bench", folder, *words, "--rounds", "1", "--only", "fitted", "--only", "l2c")
    rows = {row["name"]: row for row in found["results"]}
    assert set(rows) == {"uncached", "l2c", "fitted(2 of 4)"}
    assert found["notes"] == []
    assert rows["fitted(2 of 4)"]["calls"] == 0.5
    assert rows["l2c"]["calls"] == pytest.approx(0.75)


def test_fit_says_what_it_found(pipe: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.safetensors"
    words = ("--steps", STEPS, "--compute", "3", "-n", "1", "--rounds", "0", "--out", target)
    result = run("fit", pipe, *words)
    assert result.exit_code == 0
    assert "3 of 4 steps" in result.stdout
    assert str(target) in result.stdout.replace("\n", "")


def test_an_interrupt_leaves_no_file(
    pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Studio, "run", interrupted)
    target = tmp_path / "plan.safetensors"
    fit = run("fit", pipe, "--steps", STEPS, "--compute", "2", "--out", target)
    demo = run("demo", pipe, "--steps", STEPS, "-n", "1", "--out", tmp_path)
    for result in (fit, demo):
        assert result.exit_code == output.EXIT_INTERRUPTED
        assert "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "bench", "eval"])
def test_a_missing_pipeline_is_an_error(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path / "none", "--out", tmp_path)
    assert result.exit_code == output.EXIT_ERROR
    assert "give the folder of a saved DiTPipeline" in result.stderr
    told = run(name, tmp_path / "none", "--out", tmp_path, "--json")
    assert json.loads(told.stdout)["error"]["type"] == "ZooError"


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--steps", "1"),
        ("demo", "--samples", "0"),
        ("bench", "--rounds", "0"),
        ("bench", "--threads", "0"),
        ("eval", "--at", "2"),
        ("eval", "--at", "half"),
        ("fit", "--compute", "0"),
        ("train-router", "--share", "2"),
    ],
)
def test_impossible_numbers_are_wrong_usage(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == output.EXIT_USAGE


def test_what_is_no_pipeline_of_ours(pipe: Path, tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    assert "holds a FluxPipeline" in run("demo", tmp_path, "--out", tmp_path).stderr
    index.write_text("{")
    assert "damaged" in run("demo", tmp_path, "--out", tmp_path).stderr
    index.write_text((pipe / "model_index.json").read_text())  # and nothing it names
    result = run("demo", tmp_path, "--out", tmp_path)
    assert result.exit_code == output.EXIT_ERROR
    assert "cannot be loaded" in result.stderr


def test_other_refusals(pipe: Path, tmp_path: Path) -> None:
    refused = {
        "no such file": ("eval", pipe, "--peers", tmp_path, "--out", tmp_path),
        "method 'sleep' came": ("bench", pipe, "--method", "sleep"),
        "taylor has no option 'speed'": ("bench", pipe, "--method", "taylor(speed=2)"),
        "no family has xyz": ("eval", pipe, "--only", "xyz", "--out", tmp_path),
        "no name has xyz": ("bench", pipe, "--only", "xyz"),
        "fewer than --steps are computed": ("fit", pipe, "--steps", "4", "--compute", "4"),
        "is a directory": ("fit", pipe, "--out", tmp_path),
        "create it first": ("fit", pipe, "--out", tmp_path / "none" / "plan.safetensors"),
        "unknown device": ("demo", pipe, "--device", "abacus", "--out", tmp_path),
    }
    for message, words in refused.items():
        result = run(*words)
        assert result.exit_code == output.EXIT_ERROR, message
        assert message in result.stderr.replace("\n", " ")


def test_a_file_that_lists_no_peers(pipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "contenders.py"
    path.write_text("x = 1")
    result = run("bench", pipe, "--peers", path)
    assert result.exit_code == output.EXIT_ERROR
    assert "needs a function peers(steps)" in result.stderr.replace("\n", " ")


def test_a_folder_that_cannot_be_written(pipe: Path, tmp_path: Path) -> None:
    with read_only(tmp_path):
        for name in ("demo", "bench", "eval"):
            result = run(name, pipe, "--out", tmp_path / "new")
            assert result.exit_code == output.EXIT_ERROR
            assert "cannot write to" in result.stderr
        assert "cannot be written" in run("fit", pipe, "--out", tmp_path / "plan").stderr


def test_a_file_in_place_of_a_folder(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("demo", pipe, "--out", tmp_path / "file")
    assert result.exit_code == output.EXIT_ERROR
    assert "cannot write to" in result.stderr


def test_the_bundled_pipeline_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ZooError("the bundled DiT has no weights")

    monkeypatch.setattr("mnemon.diffusion.digits.bundled_path", missing)
    assert "the bundled DiT has no weights" in run("bench").stderr


# -- parts -----------------------------------------------------------------------------------------


def test_fronts() -> None:
    points = [fronts.Point(c, q) for c, q in ((0.5, 30), (0.3, 20), (0.4, 18), (0.9, 29))]
    assert fronts.front(points) == [(0.3, 20), (0.5, 30)]
    assert fronts.best_within(points, 0.29) is None
    assert fronts.best_within(points, 0.3) == 20
    assert fronts.best_within(points, 0.4) == pytest.approx(25)
    assert fronts.best_within(points, 0.8) == 30
    assert fronts.best_within([], 0.5) is None


def test_an_exact_setting_has_no_decibels() -> None:
    plain = Outcome(setting=settings.uncached(), macs_share=1.0, rounds_s=[1.0])
    same = Outcome(setting=settings.fewer_steps(3), psnr=math.inf, macs_share=1.0, rounds_s=[2.0])
    row = record.rows([[plain, same]])[1]
    assert row["exact"]
    assert row["psnr"] is None
    assert row["speedup"] == 0.5
    assert record.working([row]) == []


def test_names_and_settings_are_distinct() -> None:
    names = [setting.name for setting in settings.grid(20)]
    assert len(set(names)) == len(names)
    families = {setting.family for setting in settings.grid(20)}
    assert {"taylor", "taylor, stack", "dbcache + taylor", settings.FEWER_STEPS} <= families
    assert [s.steps for s in settings.grid(20) if s.steps] == list(range(19, 3, -1))


def test_an_own_method_that_does_not_fit_is_a_row_and_a_bug_is_not(pipe: Path) -> None:
    from mnemon.diffusion.digits import load_pipeline

    loaded = load_pipeline(pipe)
    studio = Studio(loaded, Task(steps=2, samples=1, batch=1), 10)
    refused = settings.of_method("dbcache(front=9)")
    found = studio.quality([refused], lambda _: None)
    assert found[1].error is not None
    assert "6 blocks" in found[1].error
    studio.clock(found, 1, lambda _: None)
    assert found[1].rounds_s is None

    @contextlib.contextmanager
    def bug(_: Any) -> Iterator[None]:
        raise ZeroDivisionError
        yield

    broken = settings.Setting(family="x", name="x", library="mnemon", apply=bug)
    with pytest.raises(ZeroDivisionError):
        studio.quality([broken], lambda _: None)


def test_batches_are_the_same_images_as_before(pipe: Path) -> None:
    from mnemon.diffusion.digits import load_pipeline

    studio = Studio(load_pipeline(pipe), Task(steps=2, samples=5, batch=2), 10)
    first, second = (studio.run(settings.uncached()).images for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (5, 1, 8, 8)
    counted, _ = studio.counted(settings.uncached())
    assert torch.equal(counted.images, first)
    assert not torch.equal(studio.at(seed=1).run(settings.uncached()).images, first)


def test_the_classifier_is_the_same_each_time() -> None:
    digits = load_digits("held_out")
    first, second = train_classifier(), train_classifier()
    judged, again = first.judge(digits.images), second.judge(digits.images)
    assert torch.equal(judged.features, again.features)
    assert first.accuracy == second.accuracy > 0.97
    assert frechet_distance(judged.features, again.features) == pytest.approx(0, abs=1e-6)
    noise = torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0))
    far = frechet_distance(judged.features, first.judge(noise).features)
    near = frechet_distance(judged.features[:180], judged.features[180:])
    assert near < far
    with pytest.raises(ValueError, match="2 at least"):
        frechet_distance(judged.features[:1], judged.features)


def test_a_router_that_is_damaged_is_said(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "router-4.safetensors").write_bytes(b"nothing")
    with pytest.raises(DiffusionError, match="router-4"):
        settings.learned(tmp_path, 4, every=False)
