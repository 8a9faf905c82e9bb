"""`mnemon inspect`: what a file holds, and what it is when it holds no cache."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from cli_models import run, run_json
from safetensors.torch import save_file
from transformers import LlamaConfig

from mnemon import Cache

LAYERS, HEADS, DIM, TOKENS, ROWS = 3, 2, 8, 11, 2


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        hidden_size=32,
    )
    cache = Cache(config)
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, ROWS, HEADS, TOKENS, DIM, generator=generator)
        cache.update(keys, values, layer)
    path = tmp_path / "prompt.cache"
    cache.save(path)
    return path


def test_the_table_says_what_is_inside(saved: Path) -> None:
    result = run("inspect", saved)
    assert result.exit_code == 0
    for words in ("llama", "dense", f"{TOKENS} x {ROWS} rows", "header only", "format 1"):
        assert words in result.stdout
    assert "0 known by id" in result.stdout  # filled by hand


def test_json_says_it_exactly(saved: Path) -> None:
    found = run_json("inspect", saved)
    assert found["num_tokens"] == TOKENS
    assert found["batch_size"] == ROWS
    assert found["layers"] == [
        {"kind": "dense", "count": LAYERS, "nbytes": 2 * 4 * LAYERS * ROWS * HEADS * TOKENS * DIM}
    ]
    assert found["is_verified"] is None
    assert found["file_bytes"] == saved.stat().st_size


def test_verify_reads_everything(saved: Path) -> None:
    assert run_json("inspect", saved, "--verify")["is_verified"] is True
    assert "whole and undamaged" in run("inspect", saved, "--verify").stdout
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    assert run("inspect", saved).exit_code == 0  # the header is whole
    result = run("inspect", saved, "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "DamagedFile"


def test_what_is_no_cache_is_named(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary")
    empty = tmp_path / "empty"
    empty.touch()
    pickled = tmp_path / "cache.pt"
    pickled.write_bytes(pickle.dumps([1, 2]))
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(4)}, weights)
    short = tmp_path / "short.cache"
    short.write_bytes(saved.read_bytes()[:-100])
    cases = {
        text: "NotACacheFile",
        empty: "NotACacheFile",
        tmp_path: "NotACacheFile",
        tmp_path / "missing": "NotACacheFile",
        weights: "NotACacheFile",
        pickled: "UnsafeFile",
        short: "TruncatedFile",
    }
    for path, kind in cases.items():
        result = run("inspect", path, "--json")
        assert result.exit_code == 1, path
        error = json.loads(result.stdout)["error"]
        assert error["type"] == kind, path
        assert path.name in error["message"]
        plain = run("inspect", path)
        assert plain.exit_code == 1
        assert plain.stderr.startswith("error: ")
        assert "Traceback" not in plain.output
