"""`mnemon export` on the bundled model."""

import json
from pathlib import Path

import pytest
from cli_models import run

import mnemon


@pytest.mark.slow
def test_export_and_verify_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("export", "tiny-stdlib", str(out), "--to", "onnx", "--range", "past=0:512")
    assert done.exit_code == 0, done.output
    assert "past + query" in done.output
    assert "shapes give the model's numbers" in done.output
    assert mnemon.load_export(out).target == "onnx"
    again = run("export", "tiny-stdlib", "--verify-only", str(out), "--json")
    assert again.exit_code == 0, again.output
    facts = json.loads(again.stdout)
    assert facts["verdicts"]
    assert {one["status"] for one in facts["verdicts"]} == {"right"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny-stdlib",), "--verify-only"),
        (("tiny-stdlib", "OUT", "--range", "past"), "AXIS=SIZE"),
        (("tiny-stdlib", "FULL"), "choose a new folder"),
    ],
)
def test_wrong_usage(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    names = {"OUT": str(tmp_path / "out"), "FULL": str(full)}
    done = run("export", *(names.get(word, word) for word in words))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_errors_have_messages(tmp_path: Path) -> None:
    done = run("export", "tiny-stdlib", str(tmp_path / "out"), "--to", "tflite")
    assert done.exit_code == 1
    assert "program, onnx, aoti" in done.output
    done = run("export", "tiny-stdlib", "--verify-only", str(tmp_path))
    assert done.exit_code == 1
    assert "is no export" in done.output
    assert not list(tmp_path.iterdir())


def test_contradicting_options() -> None:
    done = run("export", "tiny-stdlib", "out", "--range", "batch=1", "--range", "batch=2")
    assert done.exit_code == 2
    assert "twice" in done.output
    done = run("export", "tiny-stdlib", "--verify-only", "out", "--cache", "int4")
    assert done.exit_code == 2
    assert "as it is" in done.output
    assert "--cache" in done.output
