"""Old modeling files, migrated, under the installed transformers: the tokens they gave of old."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnemon.migrate import Status, Target, migrate_source

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "legacy" / "models"
STYLES = sorted(path.name for path in MODELS.iterdir() if path.is_dir())

# In a process of its own: remote code is imported, under names that other tests use as well.
SCRIPT = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from tests.legacy import building, record
torch.set_num_threads(1)
style, models, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
building.MODELS = models
spec = building.STYLES[style]
model = building.load(building.build(style, out), spec.auto_class)
print(json.dumps({"native": spec.native, "answers": record.answers(model, style)}))
"""


def migrated_files(style: str) -> dict[Path, bytes]:
    found = {}
    for path in (MODELS / style).glob("*.py"):
        result = migrate_source(path.read_bytes(), Target("5.23"), str(path))
        assert not result.problems
        found[path] = result.after
    return found


@pytest.mark.parametrize("style", STYLES)
def test_it_is_migrated_once_and_for_all(style: str) -> None:
    for path, after in migrated_files(style).items():
        again = migrate_source(after, Target("5.23"), str(path))
        assert again.after == after
        assert not again.of(Status.UNDECIDED)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_it_says_what_it_said_of_old(style: str, tmp_path: Path) -> None:
    import transformers

    if not transformers.__version__.startswith("5.23"):
        pytest.skip("migrated to 5.23")
    models = tmp_path / "models"
    (models / style).mkdir(parents=True)
    for path, after in migrated_files(style).items():
        (models / style / path.name).write_bytes(after)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, style, str(models), str(tmp_path / "out")],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = json.loads(done.stdout.decode().splitlines()[-1])
    recorded = json.loads((MODELS.parent / "recorded.json").read_text())
    wanted = recorded[found["native"]][style]
    # "sinks" is another way of decoding, with a class that has no successor in transformers.
    assert found["answers"] == {key: wanted[key] for key in wanted if key != "sinks"}
