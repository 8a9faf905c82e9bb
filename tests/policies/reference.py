"""Every policy as plain loops in float64 over lists that keep everything."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference", "mask_of", "padded_turns"]


class Reference:
    """All tokens of all rows and heads, and which of them a policy would still hold.

    Args:
        name: of the policy: ``window``, ``random``, ``h2o`` or ``tova``.
        most: tokens held at most, once so many were seen.
        least: tokens held after a drop.
        sinks: first real tokens that stay.
        recent: share of the newest tokens under ``h2o``.
        luck: of ``random``: ``luck(head, place)`` of a row's real token number `place`.
    """

    def __init__(
        self,
        name: str,
        most: Callable[[int], int],
        least: Callable[[int], int],
        *,
        sinks: int = 0,
        recent: float = 0.5,
        luck: Callable[[int, int], float] = lambda head, place: 0.0,
    ) -> None:
        self.name, self.most, self.least = name, most, least
        self.sinks, self.recent, self.luck = sinks, recent, luck
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.padding: Tensor | None = None
        self.held: list[list[list[int]]] = []
        self.scores: list[list[dict[int, float]]] = []

    def step(self, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """Attention over what is held and the new tokens; then the policy's rule.

        Shapes: query ``[batch, heads, new, width]``, keys and values ``[batch, kv_heads, new,
        width]``, padding bool ``[batch, new]``. Rows of padding come out as zeros.
        """
        parts = (keys.double(), values.double(), padding)
        if self.keys is None:
            self.keys, self.values, self.padding = parts
            self.held = [[[] for _ in range(keys.shape[1])] for _ in range(keys.shape[0])]
            self.scores = [[{} for _ in range(keys.shape[1])] for _ in range(keys.shape[0])]
        else:
            self.keys = torch.cat([self.keys, parts[0]], 2)
            self.values = torch.cat([self.values, parts[1]], 2)
            self.padding = torch.cat([self.padding, padding], 1)
        seen, num_new = self.keys.shape[2], keys.shape[2]
        batch, heads = query.shape[:2]
        group = heads // keys.shape[1]
        out = torch.zeros(batch, heads, num_new, values.shape[3], dtype=torch.float64)
        last: list[dict[int, float]] = [{} for _ in range(batch)]
        for row in range(batch):
            for head in range(keys.shape[1]):
                held = self.held[row][head]
                held += range(seen - num_new, seen)
                for token in held:
                    self.scores[row][head].setdefault(token, 0.0)
                for step in range(num_new):
                    position = seen - num_new + step
                    if self.padding[row, position]:
                        continue
                    visible = [p for p in held if p <= position and not self.padding[row, p]]
                    own = slice(head * group, (head + 1) * group)
                    weights = self._weights(row, head, query[row, own, step], visible)
                    out[row, own, step] = weights @ self.values[row, head, visible]
                    for token, weight in zip(visible, weights.sum(0).tolist(), strict=True):
                        self.scores[row][head][token] += weight
                        if step == num_new - 1:
                            last[row][token] = last[row].get(token, 0.0) + weight
        if len(self.held[0][0]) > self.most(seen):
            for row in range(batch):
                for head in range(keys.shape[1]):
                    self._drop(row, head, self.least(seen), last[row])
        return out

    def _weights(self, row: int, head: int, queries: Tensor, visible: list[int]) -> Tensor:
        """Of the queries that share a key head, ``[group, visible]``."""
        assert self.keys is not None
        dots = queries.double() @ self.keys[row, head, visible].T
        exponents = torch.exp(dots / math.sqrt(queries.shape[-1]))
        return exponents / exponents.sum(-1, keepdim=True)

    def _drop(self, row: int, head: int, kept: int, last: dict[int, float]) -> None:
        assert self.padding is not None
        held = self.held[row][head]
        real = [p for p in held if not self.padding[row, p]]
        padding = [p for p in held if self.padding[row, p]]
        places = {p: int((~self.padding[row, :p]).sum()) for p in real}

        def value(p: int) -> tuple[float, int]:
            if self.name == "window":
                return (1.0 if places[p] < self.sinks else 0.0, p)
            if self.name == "random":
                return (self.luck(head, places[p]), p)
            if self.name == "tova":
                return (last[p], p)
            recent = p in real[max(0, len(real) - int(kept * self.recent)) :]
            return (math.inf if recent else self.scores[row][head][p], p)

        # Padding goes first, the oldest of it before the rest.
        order = padding + sorted(real, key=value)
        self.held[row][head] = sorted(order[len(held) - kept :])

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of what is held, ``[batch, kv_heads, held, width]``."""
        assert self.keys is not None
        assert self.values is not None
        index = torch.tensor(self.held)[..., None]
        return tuple(
            x.gather(2, index.expand(*index.shape[:3], x.shape[3]))
            for x in (self.keys, self.values)
        )  # type: ignore[return-value]


def mask_of(layer: Any, padding: Tensor, num_new: int) -> Tensor | None:
    """The mask that transformers makes from what a layer says of its sizes; ask before `append`.

    `padding`: bool ``[batch, seen + num_new]``.
    """
    length, offset = layer.mask_sizes(num_new)
    seen = padding.shape[1] - num_new
    if not bool(padding[:, offset:].any()) and (num_new == 1 or length == num_new):
        return None
    columns = torch.arange(length) + offset
    queries = torch.arange(num_new) + seen
    causal = columns[None, :] <= queries[:, None]
    return causal[None, None] & ~padding[:, columns][:, None, None]


def padded_turns(kind: str) -> list[tuple[int, list[int]]]:
    """Calls of a conversation of two rows: (new tokens, padding before each row's own)."""
    prompt = [(7, [0, 0])] if kind == "none" else [(7, [3, 0])]
    steps = [(1, [0, 0])] * 4
    turn = [(4, [0, 0])] if kind != "between" else [(4, [0, 2])]
    return [*prompt, *steps, *turn, *steps, (3, [0, 0]), *steps]
