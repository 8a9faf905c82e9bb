"""Attention over keys and values that come a tile at a time and are never there as a whole.

    tiles    [ 0 | 1 | 2 | ... | newest ]     each is read, attended to, merged in, let go
    parts    out, lse of each; joined by the lse, a few at a time

On a CPU a tile is one thread's, and a few tiles are under way: nobody waits for others within one,
and nobody spins while the threads that read need the processor.

Where the tiles end is the stream's affair and fixed, so the result does not depend on when what
was read. Nothing here knows where tiles come from.
"""

import functools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import final

import torch
from torch import Tensor

from mnemon.attention import cpu
from mnemon.attention.one_part import Part
from mnemon.attention.parts import attend_part, merge_parts
from mnemon.formats.stand_in import StandIn
from mnemon.types import Queries

__all__ = ["KeyValueStream", "StreamedTensor", "attend_stream"]

_PARTS = 16  # results of tiles that are kept before they are joined


class KeyValueStream(ABC):
    """Keys and values of one layer, in the order of time."""

    #: Of all tiles together: ``[batch, kv_heads, tokens, width]``.
    keys_shape: tuple[int, int, int, int]
    values_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    #: Tiles that may be in use at once.
    most_held: int = 1

    @abstractmethod
    def tiles(
        self, held: int = 1, settle: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each tile in turn, dense or `PackedTensor`.

        Each is valid until the one `held` places on is asked for. Where that may end earlier, as
        there is no further one, `settle` is called: it waits until none is used any more.
        """

    def dense(self, *, is_keys: bool) -> Tensor:
        """All keys, or all values, as one ordinary tensor: what streaming is there to avoid."""
        shape = self.keys_shape if is_keys else self.values_shape
        whole = torch.empty(shape, dtype=self.dtype, device=self.device)
        start = 0
        for pair in self.tiles():
            tile = pair[0 if is_keys else 1]
            whole.narrow(2, start, tile.shape[2]).copy_(tile)
            start += tile.shape[2]
        return whole


@final
class StreamedTensor(StandIn):
    """Looks like the keys (or the values) of a stream; attention of mnemon reads the `stream`.

    Args:
        stream: what it stands for.
        is_keys: its keys, or its values.
    """

    stream: KeyValueStream
    is_keys: bool

    @staticmethod
    def __new__(cls, stream: KeyValueStream, *, is_keys: bool) -> "StreamedTensor":
        shape = stream.keys_shape if is_keys else stream.values_shape
        made: StreamedTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=stream.dtype, device=stream.device
        )
        made.stream, made.is_keys = stream, is_keys
        return made

    def __init__(self, stream: KeyValueStream, *, is_keys: bool) -> None:
        del stream, is_keys  # kept by __new__

    def dense(self) -> Tensor:
        return self.stream.dense(is_keys=self.is_keys)


def attend_stream(
    query: Queries,
    stream: KeyValueStream,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`mnemon.attention.attend` over a stream; the same arguments.

    Returns:
        The output in the query's dtype, [batch, heads, new, value_dim].
    """
    num_new, num_tokens = query.shape[2], stream.keys_shape[2]
    past = num_tokens - num_new
    causal = causal and num_new > 1
    few = num_new <= cpu.MAX_ROWS
    threads = torch.get_num_threads() if few and query.device.type == "cpu" else 1
    at_once = min(threads, stream.most_held - 1)
    workers = _workers(os.getpid(), at_once) if at_once > 1 else None
    held = 1 if workers is None else at_once + 1  # the next one comes while all threads work
    parts = _Parts(_PARTS if few else 2, held)  # results of a long prompt are large
    start = 0
    try:
        for keys, values in stream.tiles(held, parts.settle):
            stop = start + keys.shape[2]
            added = _columns(bias, start, stop)
            if causal and stop - 1 > past:
                seen = torch.ones(num_new, stop - start, dtype=torch.bool, device=query.device)
                hidden = torch.zeros(seen.shape, dtype=torch.float32, device=query.device)
                hidden = hidden.masked_fill_(~seen.tril(past - start), -torch.inf)[None, None]
                added = hidden if added is None else added + hidden
            given = query, keys, values, _columns(mask, start, stop), scale, softcap, added
            if workers is not None and cpu.serves(*given[:4], added):
                parts.begin(workers.submit(_attend_natively, *given, threads // at_once))
            else:
                parts.add(_attend(*given))
            start = stop
        out, lse = parts.joined()
    finally:
        parts.settle()
    return merge_parts([out], [lse], sinks).to(query.dtype)


@final
class _Parts:
    """Results of tiles in the order in which they were begun, joined a few at a time.

    Args:
        most: results that are kept before they are joined.
        at_once: results that are waited for before another is begun.
    """

    def __init__(self, most: int, at_once: int) -> None:
        self._most = most
        self._at_once = at_once
        self._done: list[Part] = []
        self._running: deque[Future[Part]] = deque()

    def begin(self, part: Future[Part]) -> None:
        self._running.append(part)
        if len(self._running) == self._at_once:
            self._take(self._running.popleft().result())

    def add(self, part: Part) -> None:
        self._drain()
        self._take(part)

    def settle(self) -> None:
        """Wait for what was begun; its errors come when it is joined."""
        wait(self._running)

    def joined(self) -> Part:
        self._drain()
        assert self._done, "a stream has tokens"
        return _joined(self._done)

    def _drain(self) -> None:
        while self._running:
            self._take(self._running.popleft().result())

    def _take(self, part: Part) -> None:
        self._done.append(part)
        if len(self._done) == self._most:
            self._done = [_joined(self._done)]


@functools.cache
def _workers(process: int, count: int) -> ThreadPoolExecutor:
    """So many threads of this process (those of a parent are not there after a fork)."""
    return ThreadPoolExecutor(count, thread_name_prefix="mnemon-attention")


def _attend_natively(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    threads: int | None = None,
) -> Part:
    return cpu.decode_part(
        query, keys, values,
        mask=mask, scale=scale, softcap=softcap, bias=bias, threads=threads,
    )  # fmt: skip


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
) -> Part:
    if cpu.serves(query, keys, values, mask, bias):
        return _attend_natively(query, keys, values, mask, scale, softcap, bias)
    return attend_part(query, keys, values, mask=mask, scale=scale, softcap=softcap, bias=bias)


def _joined(parts: list[Part]) -> Part:
    """Several parts as one, in a few operations however many they are."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, dim=0)
    base = total.masked_fill(total == -torch.inf, 0.0)  # a row that sees nothing: all weights 0
    weights = torch.exp(lses - base)[..., None]
    whole = weights.sum(dim=0).clamp(min=torch.finfo(weights.dtype).tiny)  # 1, see `combine`
    return (torch.stack([out for out, _ in parts]) * weights).sum(dim=0) / whole, total


def _columns(given: Tensor | None, start: int, stop: int) -> Tensor | None:
    """What a mask or bias says of the tokens from `start` to `stop`."""
    return given if given is None or given.shape[-1] == 1 else given[..., start:stop]
