"""Prints the matrix at the end of a run, with pytest-xdist too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from .architectures import rows
from .cells import Outcome
from .table import Results, details, summary, table


@pytest.fixture(autouse=True, scope="package")
def _quiet_single_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, and two workers share two cores."""
    num_threads = torch.get_num_threads()
    level = transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(num_threads)
    transformers.logging.set_verbosity(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rows one after the other: the tests of a row share a model and its reference tokens."""
    order = {name: index for index, name in enumerate(rows())}
    mine = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    of_row = sorted(
        (items[index] for index in mine),
        key=lambda item: order.get(_row(item), -1),
    )
    for index, item in zip(mine, of_row, strict=True):
        items[index] = item


def _row(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else str(callspec.params.get("row", ""))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    results: Results = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, cell in getattr(report, "user_properties", ()):
                if name == "cell":
                    row, mode, attached, kind, detail = cell
                    results[row, mode, attached] = Outcome(kind=kind, detail=detail)
    if not results:
        return
    terminalreporter.section("equality matrix")
    console = Console(width=160, force_terminal=terminalreporter.hasmarkup)
    with console.capture() as capture:
        console.print(table(results))
    terminalreporter.write(capture.get())
    for line in details(results):
        terminalreporter.write_line(line)
    terminalreporter.write_line(summary(results))
