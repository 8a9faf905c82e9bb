"""Print the matrix and write it down: `python -m tests.matrix [architecture ...]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

from .architectures import missing, rows
from .cells import DIFFERENT, ERROR, RELEASE, Outcome, judge
from .modes import MODES
from .table import Results, details, summary, table, to_json

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
#: matrix.json is that of the newest release; older ones carry theirs.
RECORD = _RESULTS / (
    "matrix.json" if RELEASE >= (5, 15) else f"matrix_{'.'.join(map(str, RELEASE))}.json"
)
Cell = tuple[tuple[str, str, bool], Outcome]


def quiet() -> None:
    """One thread for tiny matrices; transformers' warnings are not about us."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def run_row(row: str) -> list[Cell]:
    """All cells of one architecture."""
    return [
        ((row, mode, attached), judge(row, mode, attached))
        for mode in MODES
        for attached in (False, True)
    ]


def main() -> int:
    """Exit code 1 if any cell differs."""
    parser = argparse.ArgumentParser(description="Equality with transformers' default cache.")
    parser.add_argument("architecture", nargs="*", choices=[[], *rows()], help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help=f"default, for all: {RECORD.name}")
    options = parser.parse_args()
    names = options.architecture or list(rows())
    console = Console(width=160)
    begin = time.perf_counter()
    results: Results = {}
    with ProcessPoolExecutor(options.workers, initializer=quiet) as pool:
        for cells in track(
            pool.map(run_row, names), total=len(names), console=console, transient=True
        ):
            results.update(cells)
    console.print(table(results))
    for line in details(results):
        console.print(line, markup=False, highlight=False)
    if missing():
        console.print(f"not in this transformers: {', '.join(missing())}")
    console.print(f"{summary(results)}; {time.perf_counter() - begin:.0f} s")
    path = options.json or (None if options.architecture else RECORD)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_record(results, time.perf_counter() - begin), indent=1) + "\n")
    return int(any(outcome.kind in (DIFFERENT, ERROR) for outcome in results.values()))


def _record(results: Results, seconds: float) -> dict[str, object]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": versions,
        "seconds": round(seconds),
        "missing": missing(),
        **to_json(results),
    }


if __name__ == "__main__":
    raise SystemExit(main())
