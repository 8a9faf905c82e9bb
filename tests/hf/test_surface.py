"""What mnemon rests on in transformers is known, and a change is noticed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

from releases import RELEASE

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "surface.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surface", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["surface"] = module
    spec.loader.exec_module(module)
    return module


def test_the_installed_release_is_as_it_was_recorded(tool: ModuleType) -> None:
    known = tool.records()
    if RELEASE not in known:
        pytest.skip(f"there is no record of {RELEASE}")
    assert tool.compare(known[RELEASE], tool.surface()) == []


def test_every_supported_family_is_recorded(tool: ModuleType) -> None:
    assert {(4, 57), (5, 14), (5, 23)} <= set(tool.records())


#: Asked for where a release has it and done without in 4.57: a table of ways to run experts.
ONLY_NEWER = {"transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS"}


def test_the_list_follows_the_sources(tool: ModuleType) -> None:
    imports = tool.imports()
    assert "hf/masks.py" in imports["transformers.masking_utils.AttentionMaskInterface"]
    named = tool.attributes()
    assert "hf/enabling.py" in named["PreTrainedConfig._attn_implementation"]
    found = tool.surface()
    missing = {name for name, what in found["imports"].items() if what == "missing"}
    assert missing <= (ONLY_NEWER if transformers.__version__.startswith("4.") else set())
    assert found["asked of a cache"]["update"] == "called"
    assert found["asked of a layer"]["keys"] == "read"


def test_a_change_is_noticed_and_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crop(self: object, tokens: int, *, strict: bool) -> None: ...

    def announce(self: object) -> None: ...

    monkeypatch.setattr(transformers.cache_utils.Cache, "crop", crop)
    monkeypatch.setattr(transformers.cache_utils.Cache, "announce", announce, raising=False)
    monkeypatch.delattr(transformers.masking_utils, "AttentionMaskInterface")
    if RELEASE not in tool.records():
        pytest.skip(f"there is no record of {RELEASE}")
    assert tool.main(["--quiet"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "classes: Cache.crop was function(self, " in out
    assert "and is function(self, tokens, *, strict)" in out
    assert "classes: Cache.announce is new" in out
    assert "imports: transformers.masking_utils.AttentionMaskInterface was class" in out
    assert "is missing" in out


def test_recording_writes_the_release_down(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "RECORDS", tmp_path / "surface")
    monkeypatch.setattr(tool, "surface", lambda: {"imports": {"transformers.x": "module"}})
    assert tool.main(["--quiet"]) == 1  # nothing to compare with
    assert tool.main(["--record"]) == 0
    path = tmp_path / "surface" / f"{RELEASE[0]}.{RELEASE[1]}.json"
    assert json.loads(path.read_text()) == {"imports": {"transformers.x": "module"}}
    assert tool.main(["--quiet"]) == 0
