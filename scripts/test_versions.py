"""Run what depends on transformers on several of its releases, each in its own environment.

    python scripts/test_versions.py [--workers 2] 4.57 5.14 current

The environments are those of `make test-matrix`. Ends with a table: releases, tests, cells of the
equality matrix, time; and fails if a test failed, a cell differs, or a release has fewer rows or
more cells that do not apply than it had when it was recorded.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
#: What reads transformers or is read by it. tests/matrix is first: its conftest prints the matrix.
SUITES = (
    "tests/matrix",
    "tests/contract/test_views.py",
    "tests/hf",
    "tests/attention/test_enabling.py",
    "tests/attention/test_models.py",
    "tests/files",
    "tests/names",
    "tests/legacy",
    *(f"tests/test_{name}.py" for name in ("cache", "legacy_form", "binding", "prefill")),
    *(f"tests/test_{name}.py" for name in ("binding_generate", "binding_tracking", "files")),
    *(f"tests/test_{name}.py" for name in ("errors", "exports", "recipe", "token_log")),
    "tests/memory/retrofitting/test_generating.py",
    "tests/memory/retrofitting/test_adapter.py",
)
#: Of the layers' contract only the classes that models of a release bring depend on it; 4.57 has
#: none of them.
CONTRACT = ("tests/contract/test_layers.py", "tests/contract/test_machines.py")
WITHOUT_CLASSES = ("4.57",)
KINDS = {"equal": "green", "different": "bold red", "error": "bold red", "n/a": "dim"}


@dataclass(slots=True)
class Result:
    """What one release showed.

    Args:
        release: as it was named on the command line.
        status: of pytest; 0 is success.
        tests: number by outcome.
        cells: of the matrix, number by kind.
        rows: architectures in the matrix.
        seconds: it took.
    """

    release: str
    status: int
    seconds: float
    tests: Counter[str] = field(default_factory=Counter)
    cells: Counter[str] = field(default_factory=Counter)
    rows: int = 0


def run(release: str, workers: int) -> Result:
    """All suites in the environment of `release`."""
    python = ROOT / (".venv" if release == "current" else f".venv-{release}") / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"There is no {python.parents[1].name}; make it with `make test-matrix`.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadgroup"]
        command += [f"--junitxml={report}", *SUITES]
        command += [] if release in WITHOUT_CLASSES else CONTRACT
        begin = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        result = Result(release, status, time.monotonic() - begin)
        if report.exists():
            _read(report, result)
    return result


def _read(report: Path, result: Result) -> None:
    rows = set()
    for case in xml.parse(report).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        result.tests[outcomes[0] if outcomes else "passed"] += 1
        for note in case.iter("property"):
            if note.get("name") == "cell":
                row, _, _, kind, _ = ast.literal_eval(note.get("value", ""))
                rows.add(row)
                result.cells[kind] += 1
    result.rows = len(rows)


def table(results: list[Result]) -> Table:
    view = Table(title="mnemon on releases of transformers")
    for heading in ("transformers", "passed", "failed", "skipped", "rows", *KINDS, "minutes"):
        view.add_column(heading, justify="right")
    for one in results:
        failed = one.tests["failure"] + one.tests["error"]
        view.add_row(
            one.release,
            str(one.tests["passed"]),
            f"[bold red]{failed}[/]" if failed else "0",
            str(one.tests["skipped"]),
            str(one.rows),
            *(f"[{style}]{one.cells[kind]}[/]" for kind, style in KINDS.items()),
            f"{one.seconds / 60:.1f}",
        )
    return view


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("releases", nargs="+", help="such as 4.57, or current")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    results = [run(release, options.workers) for release in options.releases]
    Console(width=120).print(table(results))
    return int(any(one.status for one in results))


if __name__ == "__main__":
    sys.exit(main())
