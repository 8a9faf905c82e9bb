"""The shipped card: written from the shipped records, and nothing of a machine in it."""

import json
import shutil
from pathlib import Path

import pytest

from mnemon.errors import ZooError
from mnemon.zoo import bundled_model_path
from mnemon.zoo.card import write_card


def test_the_shipped_card_is_what_the_records_give(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-stdlib"
    folder.mkdir()
    for name in ("config.json", "training.json", "eval.json"):
        shutil.copy(bundled_model_path() / name, folder / name)
    assert write_card(folder).read_text() == (bundled_model_path() / "README.md").read_text()


def test_the_card_states_its_verdict(tmp_path: Path) -> None:
    measured = json.loads((bundled_model_path() / "eval.json").read_text())
    for point in measured["recall"]["needle"]:
        point["accuracy"] = 0.5
    for name in ("config.json", "training.json"):
        shutil.copy(bundled_model_path() / name, tmp_path / name)
    (tmp_path / "eval.json").write_text(json.dumps(measured))
    assert "**not reached**" in write_card(tmp_path).read_text()


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"needs config\.json"):
        write_card(tmp_path)
