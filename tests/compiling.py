"""Scenarios of test_compile.py, in a process without shape checks. Prints one JSON object.

Usage: ``python compiling.py SCENARIO``
"""

import json
import sys
from collections.abc import Callable

import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

import mnemon
from binding_models import jamba, llama, mistral, prompt

Forward = Callable[..., object]


def decode(
    model: PreTrainedModel, forward: Forward, cache: TransformersCache, steps: int
) -> tuple[list[int], list[int]]:
    """Greedy tokens after a prompt of 10, and the graphs compiled after each step."""
    tokens, graphs = [], []
    with torch.no_grad():
        token = model(prompt(10), past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(steps):
            tokens.append(int(token))
            out = forward(token, past_key_values=cache)
            token = out.logits[:, -1:].argmax(-1)  # type: ignore[attr-defined]
            graphs.append(counters["stats"]["unique_graphs"])
    return tokens, graphs


def static(model: PreTrainedModel, backend: str, steps: int = 30) -> dict[str, object]:
    """A preallocated cache in a full graph: nobody asks for a length between the steps."""
    expected, _ = decode(model, model, mnemon.Cache(model.config, "static(64)"), steps)
    dense, _ = decode(model, model, mnemon.Cache(model.config), steps)
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend=backend)
    cache = mnemon.Cache(model.config, "static(64)")
    tokens, graphs = decode(model, forward, cache, steps)
    length = cache.get_seq_length()
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        again, _ = decode(model, forward, cache, steps)
    return {
        "same": tokens == expected == dense,
        "again": again == expected,
        "graphs": graphs,
        "length": length,
    }


def growing(
    model: PreTrainedModel, recipe: str, steps: int, backend: str = "eager"
) -> dict[str, object]:
    """A cache that grows under ``torch.compile``."""
    expected, _ = decode(model, model, mnemon.Cache(model.config, recipe), steps)
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, fullgraph=True, backend=backend)
    cache = mnemon.Cache(model.config, recipe)
    tokens, graphs = decode(model, forward, cache, steps)
    length = cache.get_seq_length()
    # A compile id is "frame/times": times > 0 is the same code compiled again.
    ids = [str(one.compile_id) for one in torch._dynamo.utils.get_compilation_metrics()]
    again = [one for one in ids if not one.endswith("/0")]
    with torch.no_grad():  # and it goes on without the graph, forks included
        fork = cache.fork()
        model(prompt(3), past_key_values=cache)
        loose = torch.compile(model, backend=backend)  # the copy of a fork breaks the graph
        loose(prompt(1), past_key_values=fork)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (13 + steps, 11 + steps)
    return {
        "same": tokens == expected,
        "graphs": graphs[-1],
        "recompilations": len(again),
        "ids": ids,
        "length": length,
    }


SCENARIOS: dict[str, Callable[[], dict[str, object]]] = {
    "llama": lambda: static(llama(), "eager"),
    "llama-inductor": lambda: static(llama(), "inductor", 12),
    "mistral": lambda: static(mistral(window=16), "eager"),
    "jamba": lambda: static(jamba(), "eager"),
    "growing": lambda: growing(llama(), "", 340),
    "growing-twice": lambda: growing(llama(), "", 720),
    "growing-inductor": lambda: growing(llama(), "", 340, "inductor"),
    "growing-window": lambda: growing(mistral(window=16), "", 120),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(SCENARIOS[sys.argv[1]]()))
