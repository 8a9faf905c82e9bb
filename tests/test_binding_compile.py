"""An attached model compiles into one graph (in a process without shape checks: see conftest)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from binding_models import llama, prompt

import mnemon

model, ids = llama(), prompt(20)
expected = model.generate(ids, max_new_tokens=6, do_sample=False)
mnemon.attach(model)
cache = mnemon.Cache(model.config, "static(64)")
with torch.no_grad():
    model(ids, past_key_values=cache)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for position in range(20, 24):
        fed = expected[:, position : position + 1]
        logits = compiled(input_ids=fed, past_key_values=cache).logits
        assert int(logits.argmax(-1)) == int(expected[0, position + 1]), position
assert cache.num_tokens == 24
assert cache.num_known_tokens == 20  # a graph writes nothing down
"""


@pytest.mark.slow
def test_an_attached_model_compiles_into_one_graph() -> None:
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent / 'src')!r}]\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
