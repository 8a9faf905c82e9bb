"""`mnemon migrate` from outside: modes, exit codes, JSON and SARIF."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OLD = "from transformers import DynamicCache\nc = DynamicCache()\nn = c.seen_tokens\n"
NEW = OLD.replace("c.seen_tokens", "c.get_seq_length()")
OPEN = "from transformers import DynamicCache\ndef f(c: DynamicCache):\n    c.seen_tokens = 1\n"


def run(*arguments: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mnemon", "migrate", *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "old.py").write_text(OLD)
    (tmp_path / "open.py").write_text(OPEN)
    (tmp_path / "plain.py").write_text("x = 1\n")
    return tmp_path


def test_a_diff_is_the_default_and_changes_nothing(tree: Path) -> None:
    done = run(".", cwd=tree)
    assert done.returncode == 0
    assert b"+n = c.get_seq_length()" in done.stdout
    assert b"open.py:3: seen_tokens" in done.stderr
    assert b"3 files: would rewrite 1 place in 1, 1 undecided" in done.stderr
    assert (tree / "old.py").read_text() == OLD


def test_a_diff_can_be_applied(tree: Path) -> None:
    done = run("--diff", "old.py", cwd=tree)
    applied = subprocess.run(["git", "apply", "-"], cwd=tree, input=done.stdout, check=False)
    assert applied.returncode == 0
    assert (tree / "old.py").read_text() == NEW


def test_check_answers_with_its_exit_code(tree: Path) -> None:
    assert run("--check", "plain.py", cwd=tree).returncode == 0
    done = run("--check", "old.py", cwd=tree)
    assert done.returncode == 3
    assert b"old.py:3: seen_tokens: " in done.stderr
    assert run("--check", "open.py", cwd=tree).returncode == 3
    assert run("--check", "old.py", "--target", "4.57", cwd=tree).returncode == 3
    assert (tree / "old.py").read_text() == OLD


def test_write_and_then_there_is_nothing_left(tree: Path) -> None:
    assert run("--write", "old.py", cwd=tree).returncode == 0
    assert (tree / "old.py").read_text() == NEW
    assert run("--check", "old.py", cwd=tree).returncode == 0


def test_standard_input(tree: Path) -> None:
    done = run("--write", "-", cwd=tree, stdin=OLD.encode())
    assert (done.returncode, done.stdout.decode()) == (0, NEW)


def test_a_broken_file_is_named_and_the_rest_goes_on(tree: Path) -> None:
    (tree / "broken.py").write_text("import transformers\ndef f(:\n    seen_tokens\n")
    done = run("--write", ".", cwd=tree)
    assert done.returncode == 1
    assert b"broken.py:2" in done.stderr
    assert (tree / "old.py").read_text() == NEW


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["none.py"], 1, b"none.py is not there"),
        (["--target", "4.12", "old.py"], 2, b"not a target"),
        ([], 2, b"name files"),
        (["--write", "--check", "old.py"], 2, b"exclude each other"),
        (["--json", "--sarif", "-", "old.py"], 2, b"standard output"),
    ],
)
def test_wrong_calls(tree: Path, arguments: list[str], code: int, text: bytes) -> None:
    done = run(*arguments, cwd=tree)
    assert done.returncode == code
    assert text in done.stderr


def test_json(tree: Path) -> None:
    done = run("--json", "--check", ".", cwd=tree)
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert found["target"] == "5.23"
    assert found["num_files"] == 3
    old, left = found["files"]
    (finding,) = old["findings"]
    assert (finding["rule"], finding["line"], finding["column"]) == ("seen_tokens", 3, 5)
    assert finding["replacement"] == "c.get_seq_length()"
    assert left["findings"][0]["status"] == "undecided"
    assert json.loads(run("--json", "--list-rules", cwd=tree).stdout)[0]["modern"]


def test_sarif_carries_places_and_fixes(tree: Path) -> None:
    assert run("--check", "--sarif", "out.sarif", ".", cwd=tree).returncode == 3
    log = json.loads((tree / "out.sarif").read_text())
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = only["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in only["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]
        assert "\\" not in place["artifactLocation"]["uri"]
        assert place["region"]["startLine"] >= 1
        assert place["region"]["endColumn"] >= place["region"]["startColumn"]
    fix = only["results"][0]["fixes"][0]["artifactChanges"][0]
    (replacement,) = fix["replacements"]
    region = replacement["deletedRegion"]
    lines = OLD.splitlines()
    line = lines[region["startLine"] - 1]
    start, end = region["startColumn"] - 1, region["endColumn"] - 1
    lines[region["startLine"] - 1] = (
        line[:start] + replacement["insertedContent"]["text"] + line[end:]
    )
    assert "\n".join(lines) + "\n" == NEW


def test_no_torch_is_imported(tree: Path) -> None:
    code = (
        "import sys; from mnemon.migrate.run import migrate_files; "
        "from mnemon.migrate import Target; list(migrate_files(['old.py'], Target('5.23'))); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tree, check=False).returncode == 0
