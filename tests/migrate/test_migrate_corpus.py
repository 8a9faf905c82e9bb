"""Zero false rewrites: ordinary code with the same names on other objects."""

import sysconfig
from pathlib import Path

import pytest

from mnemon.migrate import Target, migrate_source
from mnemon.migrate.run import migrate_files

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.py"))


@pytest.mark.parametrize("target", ["5.0", "5.23"])
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_nothing_is_rewritten(path: Path, target: str) -> None:
    if path.stem == "right_already" and target != "5.23":
        pytest.skip("it is written for 5.23")
    content = path.read_bytes()
    assert migrate_source(content, Target(target), str(path)).after == content


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) >= 5


@pytest.mark.slow
def test_the_standard_library_comes_back_byte_for_byte() -> None:
    paths = [str(path) for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")]
    paths = [path for path in paths if "site-packages" not in path]
    assert len(paths) > 1000
    for result in migrate_files(paths, Target("5.23")):
        assert result.after == result.before
        assert not result.findings
