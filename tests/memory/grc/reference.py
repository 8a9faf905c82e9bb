"""GRC attention once more, in loops over samples, heads and tokens, from the paper's equations.

Written from arXiv 2312.12742 (eq. 2 to 5, algorithm 1) and the list of what its public code does
otherwise. It shares no code with mnemon: weights come in as a dictionary of numpy arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


def weights_of(module: Any) -> Weights:
    """A module's parameters and buffers, by name."""
    return {k: v.detach().double().numpy().copy() for k, v in module.state_dict().items()}


def linear(w: Weights, name: str, x: Array) -> Array:
    """A row vector through a linear layer."""
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def sigmoid(x: Array) -> Array:
    """Element by element."""
    return 1 / (1 + np.exp(-x))


def attend(q: Array, keys: list[Array], values: list[Array]) -> Array:
    """One query's weighted mean of the values."""
    scores = np.array([q @ k / math.sqrt(len(q)) for k in keys])
    e = np.exp(scores - scores.max())
    return sum(float(p) * v for p, v in zip(e / e.sum(), values, strict=True))


def interpolate(tokens: list[Array], slots: int) -> list[Array]:
    """Linear, half-pixel centres, clamped to the ends."""
    out = []
    for i in range(slots):
        at = min(max((i + 0.5) * len(tokens) / slots - 0.5, 0.0), len(tokens) - 1.0)
        low = math.floor(at)
        high = min(low + 1, len(tokens) - 1)
        out.append((1 - (at - low)) * tokens[low] + (at - low) * tokens[high])
    return out


def updated(w: Weights, summary: list[Array], cache: list[Array], variant: str) -> list[Array]:
    """Equations 4 and 5 for one sample."""
    out = []
    for x, c in zip(summary, cache, strict=True):

        def pair(memory: Array, x: Array = x) -> Array:
            return np.concatenate([memory, x] if variant == "repo" else [x, memory])

        g_u = sigmoid(linear(w, "memory.cache.update_gate", pair(c)))
        g_r = sigmoid(linear(w, "memory.cache.reset_gate", pair(c)))
        new = linear(w, "memory.cache.candidate", pair(g_r * c))
        if variant == "repo":
            new = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in new])
            new = (new - new.mean()) / math.sqrt(new.var() + 1e-5)
            new = new * w["memory.cache.norm.weight"] + w["memory.cache.norm.bias"]
        out.append((1 - g_u) * c + g_u * new)
    return out


def convolved(w: Weights, tokens: list[Array], grid: tuple[int, int]) -> list[Array]:
    """A 3 x 3 convolution of each channel alone, zeros around."""
    height, width = grid
    kernel, bias = w["memory.position.weight"], w["memory.position.bias"]
    out = []
    for y in range(height):
        for x in range(width):
            total = bias.copy()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        total += kernel[:, 0, dy + 1, dx + 1] * tokens[(y + dy) * width + x + dx]
            out.append(total)
    return out


def grc_attention(
    w: Weights,
    x: Array,
    real: NDArray[np.bool_],
    heads: int,
    variant: str,
    *,
    training: bool,
    grid: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """Outputs ``(batch, tokens, channels)`` (at real tokens) and the buffer afterwards."""
    batch, tokens, dim = x.shape
    slots, kept = w["memory.cache.cache"].shape
    wide, narrow = dim // heads, kept // heads
    cache = list(w["memory.cache.cache"])
    own = np.zeros_like(x)
    for b in range(batch):
        seen = [t for t in range(tokens) if real[b, t]]
        q, k, v = (
            [linear(w, name, x[b, t]) for t in range(tokens)] for name in ("query", "key", "value")
        )
        for t in seen:
            for h in range(heads):
                part = slice(h * wide, (h + 1) * wide)
                own[b, t, part] = attend(
                    q[t][part], [k[s][part] for s in seen], [v[s][part] for s in seen]
                )
    source = own if variant == "repo" else x
    updates = []
    for b in range(batch):
        summary = [source[b, t, :kept] for t in range(tokens) if real[b, t]]
        updates.append(updated(w, interpolate(summary, slots), cache, variant))
    mean = [sum(u[i] for u in updates) / batch for i in range(slots)]
    after = np.stack(mean) if training else np.stack(cache)
    out = np.zeros_like(x)
    share = sigmoid(w["memory.lambdas"])
    for b in range(batch):
        read = updates[b] if variant == "repo" else list(after)
        asking = [source[b, t, :kept] if real[b, t] else np.zeros(kept) for t in range(tokens)]
        if variant == "repo":
            placed = convolved(w, asking, grid or (tokens, 1))
            asking = [a + p for a, p in zip(asking, placed, strict=True)]
        keys = [linear(w, "memory.key", c) for c in read]
        values = [linear(w, "memory.value", c) for c in read]
        for t in range(tokens):
            if not real[b, t]:
                continue
            q = linear(w, "memory.query", asking[t])
            mixed = np.zeros(dim)
            for h in range(heads):
                small = slice(h * narrow, (h + 1) * narrow)
                part = slice(h * wide, (h + 1) * wide)
                memory = attend(q[small], [k[small] for k in keys], [v[part] for v in values])
                mixed[part] = share[h] * memory + (1 - share[h]) * own[b, t, part]
            out[b, t] = linear(w, "out", mixed)
    return out, after
