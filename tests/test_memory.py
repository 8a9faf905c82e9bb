"""Resident memory, measured by the operating system in processes of their own."""

import json
import subprocess
import sys

import pytest

_MEASURE = """
import gc, json, resource, sys
import torch
from mnemon.layers import DenseLayer
torch.set_num_threads(1)
heads, num_tokens, batch = (int(word) for word in sys.argv[1:])

def status(name):
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(name):
                return int(line.split()[1]) * 1024

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

torch.manual_seed(0)
step = 64
new = torch.randn(batch, heads, step, 128).to(torch.bfloat16)
warm = DenseLayer()
while warm.nbytes < 6 << 20:  # whatever torch loads on the way is not the cache's
    warm.append(new, new)
del warm
gc.collect()
layer = DenseLayer()
before = status("VmRSS")
reset_peak()
worst = 0.0
while layer.num_tokens < num_tokens:
    layer.append(new, new)
    live = layer.nbytes
    if live > 8 << 20:
        # Small sizes drown in what the process allocates for itself.
        worst = max(worst, (status("VmHWM") - before) / live)
    reset_peak()
view = layer.view()
tail_is_right = bool(torch.equal(view[0][:, :, -step:], new))
tail_is_right &= bool(torch.equal(view[1][:, :, :step], new))
print(json.dumps({
    "worst": worst, "end": status("VmRSS") - before, "live": layer.nbytes,
    "reserved": layer.nbytes_reserved, "right": tail_is_right,
}))
"""


def _measure(heads: int, num_tokens: int, batch: int = 1) -> dict[str, float]:
    command = [sys.executable, "-c", _MEASURE, str(heads), str(num_tokens), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result: dict[str, float] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("heads", "num_tokens", "batch"),
    [
        pytest.param(8, 9_000, 1, id="8 heads to 9k"),
        pytest.param(1, 70_000, 1, id="1 head to 70k"),
        pytest.param(2, 5_000, 4, id="batch of 4"),
    ],
)
def test_growth_stays_within_a_quarter_of_the_live_bytes(
    heads: int, num_tokens: int, batch: int
) -> None:
    """Peak resident memory while growing, per append, and no cost of untouched reserve."""
    result = _measure(heads, num_tokens, batch)
    assert result["right"]
    assert result["worst"] <= 1.25, result
    assert result["end"] <= 1.25 * result["live"], result
    assert result["reserved"] > result["live"]
