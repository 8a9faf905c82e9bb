"""The experiments at a tiny size: arms, commands, what is written, and going on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("sklearn")

from mnemon.cli import app
from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.experiments.arms import chosen_arms
from mnemon.memory.grc.experiments.listops_task import ListOpsTask, order_of
from mnemon.memory.grc.experiments.lm_task import LanguageTask
from mnemon.memory.grc.experiments.scales import Scale
from mnemon.memory.grc.experiments.statistics import mean_of, rows
from mnemon.memory.grc.experiments.tasks import TASKS, make_task
from mnemon.memory.grc.experiments.training import Result as Trained
from mnemon.memory.grc.experiments.training import train

TINY: dict[str, Any] = {
    "dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "hidden": 16,
    "memory_length": 4,
    "batch": 4,
    "rate": 1e-2,
    "steps": 3,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task with a model of a few thousand parameters."""
    sizes = {
        "listops": Scale(**TINY, length=60, train_count=40, test_count=20),
        "digits": Scale(**TINY, length=16, train_count=1_000, test_count=50),
        "lm": Scale(**TINY, length=8, train_count=0, test_count=2),
    }
    for name, task in TASKS.items():
        scale = sizes[name]
        monkeypatch.setattr(task, "scales", staticmethod(lambda scale=scale: {"small": scale}))
    make_task.cache_clear()
    yield
    make_task.cache_clear()


def mnemon(*words: str) -> Result:
    arguments = ["memory", *words]
    return CliRunner().invoke(app.build(" ".join(arguments[:2])), arguments)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", list(TASKS))
def test_every_arm_of_every_task(name: str, tmp_path: Path) -> None:
    words = (name, "--seeds", "2", "--jobs", "1", "--out", str(tmp_path))
    found = mnemon(*words)
    assert found.exit_code == 0, found.output
    record = json.loads((tmp_path / f"grc_{name}.json").read_text())
    arms = [arm.name for arm in chosen_arms(name)]
    assert record["finished"]
    assert record["arms"] == arms == [row["arm"] for row in record["summary"]]
    assert {(run["arm"], run["seed"]) for run in record["runs"]} == {
        (arm, seed) for arm in arms for seed in range(2)
    }
    by_arm = {row["arm"]: row for row in record["summary"]}
    assert by_arm["closed"]["score"] == by_arm["plain"]["score"]
    assert by_arm["closed"]["difference"]["mean"] == 0
    assert by_arm["plain"]["difference"] is None
    wide, memory = by_arm["wide"]["num_parameters"], by_arm["grc-paper"]["num_parameters"]
    assert abs(wide - memory) < 0.02 * memory
    assert by_arm["closed"]["shares"] == [0.0]
    text = (tmp_path / f"grc_{name}.md").read_text()
    for arm in arms:
        assert f"| {arm} |" in text
        assert arm in found.output
    assert "minus plain" in text
    assert str(tmp_path.parent) not in text
    assert (tmp_path / f"grc_{name}.png").read_bytes().startswith(b"\x89PNG")
    if name != "lm":
        assert "most frequent answer" in found.output
    environment = record["environment"]
    assert environment["threads_per_run"] == 1
    assert {"date", "torch", "command"} <= set(environment)


@pytest.mark.usefixtures("tiny")
def test_going_on_gives_what_a_whole_run_gives(tmp_path: Path) -> None:
    words = ("digits", "--arms", "grc-paper", "--jobs", "1", "--json")
    whole = mnemon(*words, "--seeds", "2", "--out", str(tmp_path / "whole"))
    path = tmp_path / "parts" / "grc_digits.json"
    assert mnemon(*words, "--seeds", "2", "--out", str(path.parent)).exit_code == 0
    record = json.loads(path.read_text())
    record |= {"runs": record["runs"][:3], "finished": False}
    path.write_text(json.dumps(record))
    refused = mnemon(*words, "--seeds", "2", "--out", str(path.parent))
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    other = mnemon(*words, "--seeds", "2", "--steps", "4", "--resume", "--out", str(path.parent))
    assert other.exit_code == 1
    assert "steps=3" in other.output
    assert json.loads(path.read_text()) == record
    resumed = mnemon(*words, "--seeds", "2", "--resume", "--out", str(path.parent))
    assert resumed.exit_code == 0, resumed.output

    def scores(found: Result) -> list[tuple[str, int, float]]:
        runs = json.loads(found.stdout)["runs"]
        return sorted((run["arm"], run["seed"], run["score"]) for run in runs)

    assert scores(resumed) == scores(whole)
    more = mnemon(*words, "--seeds", "3", "--resume", "--out", str(path.parent))
    assert len(json.loads(more.stdout)["runs"]) == 6


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_and_resumed_in_processes(tmp_path: Path) -> None:
    """The command as users call it, killed in the middle without warning; then two workers."""
    path = tmp_path / "grc_digits.json"
    words = ["digits", "--seeds", "1", "--steps", "8", "--arms", "grc-paper,wide"]
    words += ["--out", str(tmp_path), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemon", "memory", *words, "--jobs", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    _wait(path.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(path.read_text())["runs"]
    assert before
    done = mnemon(*words, "--jobs", "2", "--resume")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["finished"]
    assert record["runs"][: len(before)] == before
    assert {run["arm"] for run in record["runs"]} == {"plain", "grc-paper", "wide"}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arms", "grc-paper,other"), "known: plain"),
        (("--arms", ","), "names such as"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    found = mnemon("digits", *words, "--out", str(tmp_path))
    assert found.exit_code == 1
    assert message in " ".join(found.output.split())


@pytest.mark.usefixtures("tiny")
def test_something_else_at_the_place_of_the_record(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}"):
        (tmp_path / "grc_digits.json").write_text(text)
        found = mnemon("digits", "--out", str(tmp_path))
        assert found.exit_code == 1
        assert "remove it" in found.output


def test_help_names_every_option() -> None:
    found = CliRunner(env={"COLUMNS": "120"}).invoke(
        app.build("memory listops"), ["memory", "listops", "--help"]
    )
    for option in ("--seeds", "--steps", "--arms", "--out", "--size", "--jobs", "--resume"):
        assert option in found.output
    listed = CliRunner().invoke(app.build(), ["memory", "--help"])
    assert all(name in listed.output for name in TASKS)


def trained(arm: str, seed: int, score: float) -> Trained:
    return Trained(arm, seed, score, 1.0, 10, 2.0, (0.5, 0.25) if arm != "plain" else ())


def test_means_and_intervals_by_hand() -> None:
    found = mean_of([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.sd == pytest.approx(math.sqrt(7 / 3))
    assert found.half_width == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert mean_of([5.0]) == (5.0, None, None, (5.0,))


def test_differences_are_paired_by_seed() -> None:
    results = [trained("plain", seed, float(seed)) for seed in range(3)]
    results += [trained("wide", seed, seed + 0.5) for seed in (2, 0)]
    plain, wide = rows(results, ["plain", "other", "wide"])
    assert plain.difference is None
    assert wide.score.values == (0.5, 2.5)
    assert wide.difference is not None
    assert wide.difference.values == (0.5, 0.5)
    assert wide.difference.sd == 0
    assert wide.shares == (0.5, 0.25)


@pytest.mark.usefixtures("tiny")
def test_arms_share_their_weights() -> None:
    """The plain part of every arm begins alike, and a closed memory never does anything."""
    task = make_task("listops")
    arms = {arm.name: arm for arm in chosen_arms("listops")}
    plain = task.start(arms["plain"], 1).model.state_dict()
    for name in ("grc-paper", "grc-repo", "zero", "fifo"):
        other = task.start(arms[name], 1).model.state_dict()
        assert all(torch.equal(other[key], value) for key, value in plain.items())
    one, two = (train(task, arms[name], 1, 4) for name in ("plain", "closed"))
    assert (one.score, one.loss) == (two.score, two.loss)
    zero = task.start(arms["zero"], 1).model
    zero.train()
    assert all("memory.cache.cache" not in k or v.eq(0).all() for k, v in zero.state_dict().items())


def test_batches_are_random_and_of_about_one_length() -> None:
    lengths = [10 + (7 * i) % 90 for i in range(130)]
    batches = order_of(lengths, 8, seed=1, epoch=0)
    used = [place for batch in batches for place in batch]
    assert len(used) == len(set(used)) == 128
    assert all(len(batch) == 8 for batch in batches)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 15
    assert batches == order_of(lengths, 8, seed=1, epoch=0)
    assert batches != order_of(lengths, 8, seed=1, epoch=1)


def test_nothing_is_both_trained_on_and_judged_by() -> None:
    task = ListOpsTask("small")
    task.scale = Scale(**{**TINY, "length": 150, "train_count": 400, "test_count": 100})
    tokens = {expression.tokens for expression in task.train}
    assert not any(expression.tokens in tokens for expression in task.test)
    assert task.facts()["majority_accuracy"] < 0.35
    text = LanguageTask("small").held_out()
    assert len({bytes(row.tolist()) for row in text}) == len(text)


def test_unknown_names() -> None:
    with pytest.raises(LearnedMemoryError, match="known: listops, digits, lm"):
        make_task("other")
    assert [arm.name for arm in chosen_arms("lm", ["fifo"])] == ["plain", "fifo"]
