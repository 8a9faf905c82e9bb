"""Lines per second of `mnemon migrate`: over a big tree of ordinary code, and at its worst.

    python benchmarks/migrate.py                                # this environment's packages
    python benchmarks/migrate.py --worst path/to/transformers-4.44/models --out results/

Ordinary: every .py file of the standard library and of the installed packages, of which few hold
anything to look at. Worst: only files that pass the filter and are read in full; without --worst,
those of the installed transformers. Reading from disk and starting the processes count. The tree is
read once before, so that the disk's speed does not. Writes migrate.json and migrate.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mnemon.cli.environment import environment
from mnemon.migrate import Target
from mnemon.migrate.engine import is_candidate
from mnemon.migrate.run import migrate_files

LIMIT_LINES_PER_S = 10_000


def python_files(*folders: Path) -> list[str]:
    found = {str(path) for folder in folders for path in folder.rglob("*.py") if path.is_file()}
    return sorted(found)


def measure(paths: list[str], options: argparse.Namespace) -> dict[str, Any]:
    for path in paths:
        Path(path).read_bytes()
    seconds: list[float] = []
    lines, findings, problems = 0, Counter[str](), 0
    for _ in range(options.runs):
        begin = time.perf_counter()
        results = list(migrate_files(paths, Target(options.target), num_processes=options.jobs))
        seconds.append(time.perf_counter() - begin)
        lines = sum(result.num_lines for result in results)
        findings = Counter(f.status.value for result in results for f in result.findings)
        problems = sum(bool(result.problems) for result in results)
    return {
        "files": len(paths),
        "lines": lines,
        "seconds": seconds,
        "lines_per_s": lines / statistics.median(seconds),
        "lines_per_s_best": lines / min(seconds),
        "findings": dict(findings),
        "files_that_are_not_python": problems,
    }


def table(record: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {found['files']:,} | {found['lines']:,} | {found['lines_per_s']:,.0f} | "
        f"{found['lines_per_s_best']:,.0f} |"
        for name, found in record["trees"].items()
    ]
    head = ["# mnemon migrate, lines per second", "", "    " + record["command"], ""]
    head += ["| tree | files | lines | lines/s, median | best |", "|---|---:|---:|---:|---:|"]
    facts = [f"- {key}: {value}" for key, value in record["environment"].items()]
    return "\n".join([*head, *rows, "", *facts, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--worst", type=Path, help="a tree of which only candidates are read")
    parser.add_argument("--target", default="5.23")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    packages = Path(sysconfig.get_path("purelib"))
    ordinary = python_files(Path(sysconfig.get_path("stdlib")), packages)
    worst = python_files(options.worst or packages / "transformers")
    worst = [path for path in worst if is_candidate(Path(path).read_bytes())]
    record = {
        "command": "python benchmarks/migrate.py" + (" --worst TREE" if options.worst else ""),
        "environment": environment(),
        "trees": {
            "standard library and all packages": measure(ordinary, options),
            "only files read in full": measure(worst, options),
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "migrate.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    (options.out / "migrate.md").write_text(table(record))
    print(table(record))
    slow = [n for n, found in record["trees"].items() if found["lines_per_s"] < LIMIT_LINES_PER_S]  # type: ignore[attr-defined]
    if slow:
        raise SystemExit(f"below {LIMIT_LINES_PER_S:,} lines/s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
