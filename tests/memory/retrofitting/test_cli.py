"""`mnemon retrofit`: a tiny model from a folder to a folder, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import FAMILIES, save_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import mnemon
from mnemon.cli import app
from mnemon.memory import load_retrofitted
from mnemon.memory.retrofitting import Progress, Retrofitter, measure

FAST = ("--steps", "6", "--length", "32", "--batch", "1", "--lr", "1e-3", "--decision-lr", "3e-3")


def run(*arguments: str | Path) -> Result:
    words = ["retrofit", *(str(word) for word in arguments)]
    result = CliRunner().invoke(app.build("retrofit"), words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_that_loads_and_compresses(tmp_path: Path, text: Path, family: str) -> None:
    folder, out = save_folder(tmp_path / "plain", family), tmp_path / "small"
    result = run(
        folder, "--method", "dms", "--ratio", "2", "--window", "4", "--text", text, *FAST,
        "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["measured"] == pytest.approx(2, rel=0.3)  # hardly trained: a steep curve
    assert facts["tokens"] == 6 * 32
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "mnemon_memory.safetensors"} <= names
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "small", "text.py"]
    model = load_retrofitted(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(text.read_text()[:600], return_tensors="pt")["input_ids"]
    assert measure(model, [ids]).ratio > 1.2
    cache = mnemon.Cache(model.config)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert made.shape[1] == ids.shape[1] + 4
    with torch.no_grad():
        whole = model(made[:, :-1], use_cache=False).logits[:, -4:].argmax(-1)
    assert torch.equal(made[:, -4:], whole)


def test_the_table(tmp_path: Path, text: Path) -> None:
    folder, out = save_folder(tmp_path / "plain"), tmp_path / "small"
    result = run(folder, "-m", "dmc", "-r", "2", "--factor", "30", "--text", text, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    assert "head 1" in result.stdout
    assert "tokens per slot" in result.stdout
    assert "load_retrofitted" in result.stdout
    assert "warning: training ended far below" in result.stdout
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "config.json").stat().st_mode}


def test_the_control_is_a_plain_model(tmp_path: Path, text: Path) -> None:
    folder, out = save_folder(tmp_path / "plain"), tmp_path / "small"
    result = run(folder, "-m", "none", "--loss", "text", "--text", text, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    assert "control" in result.stdout
    assert not (out / "mnemon_memory.safetensors").exists()
    assert not hasattr(AutoModelForCausalLM.from_pretrained(out).config, "mnemon_memory")


def test_ctrl_c_and_resume(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as those of a run that was not interrupted."""
    folder = save_folder(tmp_path / "plain")
    words = [folder, "-m", "dms", "-r", "2", "--window", "4", "--text", text, *FAST]
    assert run(*words, "-o", tmp_path / "first").exit_code == 0
    out, checkpoint = tmp_path / "second", tmp_path / "second.checkpoint.pt"
    plain_step = Retrofitter.train_step

    def interrupted(trainer: Retrofitter) -> Progress:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Retrofitter, "train_step", interrupted)
        assert run(*words, "-o", out).exit_code == 130
    assert not out.exists()
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    other = run(*words, "-o", out, "--seed", "1", "--resume")
    assert other.exit_code == 1
    assert "seed is 0 there and 1 here" in other.stderr
    assert run(*words, "-o", out, "--resume").exit_code == 0
    for name in ("model.safetensors", "mnemon_memory.safetensors"):
        one, two = (load_file(path / name) for path in (tmp_path / "first", out))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratio", "0.5"], "ratio of a retrofit is from 1"),
        (["--method", "h2o"], "dmc, dms, none"),
        (["--method", "dmc", "--window", "0"], "window of dmc"),
        (["--loss", "mse"], "distill, text, both"),
        (["--length", "1000"], "context of 256"),
        (["--resume"], "nothing to go on from"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--out", "/proc/none/there"], "cannot write"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_folder(tmp_path / "plain")
    result = run(folder, *FAST, "--out", "small", *words)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    as_json: Any = json.loads(run(folder, *FAST, "--out", "small", *words, "--json").stdout)
    assert said in as_json["error"]["message"]


def test_no_model_and_wrong_kinds(tmp_path: Path, text: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    out = tmp_path / "small"
    result = run(tmp_path / "nowhere", "--text", text, *FAST, "-o", out)
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    other = save_folder(tmp_path / "gpt2")
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=4096, n_positions=128)
    ).save_pretrained(other)
    result = run(other, "--text", text, *FAST, "-o", out)
    assert result.exit_code == 1
    assert "GPT2" in result.stderr
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    result = run(other, "--text", text, *FAST, "-o", out)
    assert result.exit_code == 1
    assert "not an empty folder" in result.stderr
    short = tmp_path / "short.txt"
    short.write_text("hello")
    result = run(save_folder(tmp_path / "plain"), "--text", short, *FAST, "-o", tmp_path / "new")
    assert result.exit_code == 1
    assert "a row 32" in result.stderr
