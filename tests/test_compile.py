"""Caches under ``torch.compile``; the scenarios run in processes without shape checks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("compiling.py")


def scenario(name: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), name], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        pytest.param("jamba", marks=pytest.mark.slow),
        pytest.param("llama-inductor", marks=pytest.mark.slow),
    ],
)
def test_static_caches_compile_into_one_graph(name: str) -> None:
    """``fullgraph=True``, the tokens of eager mode, and nothing is compiled after warm-up.

    A window that fills up is three states (filled by hand, filling, full), so three graphs.
    """
    result = scenario(name)
    assert result["same"]
    assert result["again"]  # after reset, with error_on_recompile
    graphs = result["graphs"]
    assert isinstance(graphs, list)
    assert graphs[-1] <= (3 if name == "mistral" else 1)
    steps = 12 if name == "llama-inductor" else 30
    assert result["length"] == 10 + steps


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("growing", 340),
        pytest.param("growing-twice", 720, marks=pytest.mark.slow),
        pytest.param("growing-inductor", 340, marks=pytest.mark.slow),
        pytest.param("growing-window", 120, marks=pytest.mark.slow),
    ],
)
def test_growing_caches_recompile_at_most_log2_of_their_length_times(name: str, steps: int) -> None:
    """Memory is obtained inside the graph: ``fullgraph=True`` across growth, too."""
    result = scenario(name)
    assert result["same"]
    length, graphs, again = result["length"], result["graphs"], result["recompilations"]
    assert length == 10 + steps
    assert isinstance(graphs, int)
    assert isinstance(again, int)
    assert graphs <= math.log2(length)
    assert 1 <= again <= math.log2(length)
