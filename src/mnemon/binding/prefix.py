"""Comparing what a cache holds with what a prompt asks for. Tensors in, numbers out.

An `UNKNOWN` token of the log agrees with everything, `PADDING` with padding only.
"""

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int64

from mnemon.token_log import PADDING, UNKNOWN

__all__ = ["PADDING", "UNKNOWN", "Match", "first_difference", "marked", "match"]

_Log: TypeAlias = Int64[torch.Tensor, "rows cached"]
_Prompts: TypeAlias = Int64[torch.Tensor, "prompts tokens"]
_Rows: TypeAlias = Int64[torch.Tensor, " prompts"]


class Match(NamedTuple):
    """The best agreement of a cache with a batch of prompts.

    Args:
        rows: int64 ``[prompts]``, the cache row that serves each prompt.
        num_common: leading positions on which every prompt agrees with its row.
    """

    rows: torch.Tensor
    num_common: int


def marked(ids: torch.Tensor, mask: torch.Tensor | None) -> _Prompts:
    """`ids` ``[prompts, tokens]`` on the CPU as the token log writes them: masked is `PADDING`."""
    ids = ids.detach().to("cpu", torch.int64)
    if mask is None:
        return ids
    return ids.masked_fill(mask[:, : ids.shape[1]].to("cpu") == 0, PADDING)


def match(
    log: _Log,
    prompts: _Prompts,
    *,
    grouped: bool,
) -> Match:
    """The row of `log` that agrees longest with each of `prompts`.

    Args:
        log: ``[rows, cached]`` tokens of a cache, as `marked` writes them.
        prompts: ``[prompts, tokens]``, the same.
        grouped: rows belong to prompts by position (each prompt owns ``rows / prompts``
            neighbours), because tokens alone do not say what a row holds.
    """
    num_rows, num_prompts = log.shape[0], prompts.shape[0]
    length = min(log.shape[1], prompts.shape[1])
    log, prompts = log[:, :length], prompts[:, :length]
    if grouped and num_rows % num_prompts:
        return Match(torch.zeros(num_prompts, dtype=torch.int64), 0)
    share = num_rows // num_prompts if grouped else 0
    rows, common = [], length
    for number, prompt in enumerate(prompts):
        first = number * share
        candidates = log[first : first + share] if grouped else log
        agreeing = _agreeing(candidates, prompt)
        # Among equals a prompt keeps its own row: rows that nobody named are not alike.
        own = number if not grouped and num_rows == num_prompts else 0
        best = int(agreeing.argmax())
        best = own if int(agreeing[own]) == int(agreeing[best]) else best
        rows.append(first + best)
        common = min(common, int(agreeing[best]))
    return Match(torch.tensor(rows, dtype=torch.int64), common)


def first_difference(
    log: _Log,
    prompts: _Prompts,
    rows: _Rows,
) -> tuple[int, int]:
    """``(prompt, position)`` of the earliest disagreement; position = length if there is none."""
    length = min(log.shape[1], prompts.shape[1])
    agreeing = [
        int(_agreeing(log[int(row) : int(row) + 1, :length], prompts[number, :length])[0])
        for number, row in enumerate(rows)
    ]
    number = min(range(len(agreeing)), key=agreeing.__getitem__)
    return number, agreeing[number]


def _agreeing(log: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Leading positions of each row of `log` that agree with `prompt` ``[tokens]``."""
    same = (log == prompt) | (log == UNKNOWN)
    return same.to(torch.int64).cumprod(-1).sum(-1)
