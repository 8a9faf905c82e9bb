"""A layer whose older tokens lie in a tier and stream through attention a segment at a time."""

import math
from collections.abc import Iterator, Sequence
from typing import Final, final

import torch
from torch import Tensor

from mnemon.attention.stream import KeyValueStream, StreamedTensor
from mnemon.errors import CacheError, CapacityError, TierError
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.frozen import Layout, Segment, StoredRows, freeze
from mnemon.layers.hot import HotFormat, Pair
from mnemon.layers.order import LayerOrder
from mnemon.layers.tokens import check_mergeable, token_index
from mnemon.tiers import Record, Settle, Tier, Tile, nothing_runs
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["TieredLayer"]

_SEGMENT_BYTES: Final = 4 << 20  # reads of this size keep a disk busy
_SEGMENT_TOKENS: Final = (1024, 16384)  # between these, where memory allows
_FEWEST_TOKENS: Final = 64  # of a segment, where memory is short
_HOT_SHARE: Final = 2  # 1/2 of the memory for the newest tokens of all layers, at most
_TILE_SHARE: Final = 32  # a segment takes 1/32 of it at most: four fit the buffers


@final
class TieredLayer(CacheLayer):
    """Every token: the newest in an ordinary layer, the others frozen in segments in a tier.

    ::

        time ->  [ segment 0 ][ segment 1 ] ... [ segment n-1 ][ hot layer            ]
                   in the tier, `segment_tokens` each             tail .. tail + segment

    What `append` returns streams: mnemon's attention reads one segment while the next ones are
    being fetched, so the layer is never whole in memory. Any other function that touches it gets
    the right numbers, all of them at once. All verbs work; `keep`, and `merge` and `extract` of
    padded or unequal rows, hold one layer whole while they run. Rows that were repeated or
    selected, and forks, share frozen tokens. No gradients flow into frozen tokens.

    Args:
        tier: keeps the segments; shared by the layers of a cache and by what is made from them.
        hot: the format of both.
        order: the cache's layers, for reading ahead.
        max_tokens: tokens that fit (``static(n)``); None without a bound.
        segment_tokens: of a segment; None to choose by size and memory at the first append.
        place: the layer's place in `order`; None for the end.
    """

    kind = "tiered"

    def __init__(
        self,
        tier: Tier,
        hot: HotFormat,
        order: "LayerOrder[TieredLayer]",
        *,
        max_tokens: int | None = None,
        segment_tokens: int | None = None,
        place: int | None = None,
    ) -> None:
        self._tier = tier
        self._format = hot
        self._order = order
        self._place = order.join(self, place)
        self.max_tokens = max_tokens
        self._given_segment_tokens = segment_tokens
        self._segment_tokens = segment_tokens
        self._hot = hot.new_layer()
        self._segments: list[Segment] = []
        self._dropped = 0  # logical tokens that `keep` let go
        self._tail: int | None = None  # newest tokens stored without a gap, once `keep` ran

    def _empty(self) -> "TieredLayer":
        order = self._order.heir(self._place)
        order.preallocated = True
        other = TieredLayer(
            self._tier,
            self._format,
            order,
            max_tokens=self.max_tokens,
            segment_tokens=self._given_segment_tokens,
            place=self._place,
        )
        other._segment_tokens = self._segment_tokens
        return other

    # -- keys and values -------------------------------------------------------------------------

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        num_new = keys.shape[-2]
        stored = self.num_stored
        if self.max_tokens is not None and stored + num_new > self.max_tokens:
            raise CapacityError(
                f"A cache of {self.max_tokens} tokens holds {stored} and {num_new} more came. Use "
                f"a larger static(n), or leave it out."
            )
        held = self._hot.keys
        if held is not None and held.dtype != keys.dtype:
            raise CacheError(
                f"The tier holds {held.dtype} and {keys.dtype} came: frozen tokens do not change. "
                f"Convert what comes, or reset() and prefill again."
            )
        count = self._due(keys, values)
        was = self._hot.fork() if count else self._hot, self._segments
        view = self._hot.append(keys, values)
        if self._segments and len(self._segments[0].rows) != keys.shape[0]:
            # One stored row serves a whole batch: the layer of newest tokens has just agreed.
            self._segments = [segment.at([0] * keys.shape[0]) for segment in self._segments]
        if self._segments:
            view = self._streamed(self._segments, view)
        if count:
            try:
                self._adopt(self._hot, self._segments, count)
            except BaseException:
                self._hot, self._segments = was
                raise
        if self._tail is not None:
            self._tail += num_new
        return view

    def _due(self, keys: Tensor, values: Tensor) -> int:
        """How many segments freeze when these have come; there is room for them.

        Raises:
            TierError: there is none; nothing changed.
        """
        if keys.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
            return 0  # the layer of newest tokens says what is wrong
        self._tier.bind(keys.device)
        if self._segment_tokens is None:
            self._segment_tokens = self._choose(keys, values)
        tokens, tail = self._segment_tokens, self._format.tail_tokens
        count = max(0, self._hot.num_stored + keys.shape[2] - tail) // tokens
        fresh = self.max_tokens is not None and not self._order.preallocated
        if not count and not fresh:
            return 0
        rows, layout = keys.shape[0], self._format.layout(keys, values, tokens)
        self._tier.claim(self, rows * layout.num_bytes * (tail + tokens) // tokens)
        if fresh:
            assert self.max_tokens is not None
            most = max(0, self.max_tokens - tail) // tokens * rows * len(self._order)
            self._tier.preallocate(most * self._tier.stride(layout.num_bytes))
            self._order.preallocated = True
        if count:
            # The layers that come after this one in the same forward need as much: better to
            # refuse now, before one of them holds what the others cannot.
            later = sum(layer.num_segments < self.num_segments + count for layer in self._order)
            self._tier.reserve(count * rows * max(1, later), layout.num_bytes)
        return count

    def _choose(self, keys: Tensor, values: Tensor) -> int:
        """Tokens of a segment: large reads, as far as memory allows."""
        tail, layers, memory = self._format.tail_tokens, len(self._order), self._tier.memory_bytes
        tokens, most = _SEGMENT_TOKENS
        size = keys.shape[0] * self._format.layout(keys, values, tokens).num_bytes / tokens
        while tokens < most and tokens * size < _SEGMENT_BYTES:
            tokens *= 2
        if memory is None:
            return tokens

        def needed(tokens: int) -> int:
            hot = _HOT_SHARE * (tail + tokens) * size * layers
            return math.ceil(max(hot, _TILE_SHARE * tokens * size))

        while tokens > _FEWEST_TOKENS and needed(tokens) > memory:
            tokens //= 2
        if needed(tokens) > memory:
            raise TierError(
                f"The tier may use {memory} bytes of memory and needs {needed(tokens)} for "
                f"{layers} layers of {list(keys.shape)} keys; give it more with "
                f"disk(memory=...)."
            )
        return tokens

    def _adopt(
        self, whole: CacheLayer, before: Sequence[Segment], count: int | None = None
    ) -> None:
        """Hold `before` and then what `whole` holds, its oldest tokens frozen.

        Raises:
            TierError: the tier cannot keep them; nothing changed.
        """
        tokens = self._segment_tokens
        if count is None:
            whole = self._format.aligned(whole)
            due = whole.num_stored - self._format.tail_tokens
            count = 0 if tokens is None else max(0, due) // tokens
        segments = list(before)
        for step in range(count):
            assert tokens is not None
            pieces = self._format.oldest(whole, step * tokens, tokens)
            segments.append(freeze(self._tier, pieces, Layout.of(pieces)))
        hot = whole
        if count:
            assert tokens is not None
            hot = self._format.without(whole, count * tokens)
        self._hot, self._segments = hot, segments

    def _streamed(self, segments: Sequence[Segment], newest: Pair) -> tuple[Keys, Values]:
        stream = LayerStream(self, segments, newest)
        return StreamedTensor(stream, is_keys=True), StreamedTensor(stream, is_keys=False)

    def _thawed(self, segments: Sequence[Segment] | None = None) -> CacheLayer:
        """One ordinary layer with the tokens of `segments` (default all) and the newest."""
        segments = self._segments if segments is None else segments
        return self._format.joined(list(self._read(segments)), self._hot)

    def _read(self, segments: Sequence[Segment]) -> Iterator[list[Tensor]]:
        tiles = [segment.tile for segment in segments]
        for found, segment in zip(self._tier.stream(tiles, tuple), segments, strict=False):
            yield [piece.clone() for piece in segment.pieces(found)]

    def view(self) -> tuple[Keys, Values] | None:
        newest = self._hot.view()
        if newest is None or not self._segments:
            return newest
        return self._streamed(self._segments, newest)

    @property
    def num_tokens(self) -> int:
        return self.num_stored + self._dropped

    @property
    def num_stored(self) -> int:
        return len(self._segments) * (self._segment_tokens or 0) + self._hot.num_stored

    @property
    def segment_tokens(self) -> int | None:
        """Tokens that move to the tier at once; None before the first append chose it."""
        return self._segment_tokens

    @property
    def num_segments(self) -> int:
        """Segments in the tier."""
        return len(self._segments)

    @property
    def max_length(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return self.num_stored + num_new, self._dropped

    # -- going back, forgetting ------------------------------------------------------------------

    @property
    def _croppable(self) -> int:
        return self.num_stored if self._tail is None else self._tail

    def can_crop(self, num_tokens: int) -> bool:
        return 0 <= num_tokens <= self._croppable

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens: only the newest {self._croppable} are stored "
                f"without a gap. Remove fewer, or reset() and prefill again."
            )
        missing = num_tokens - self._hot.num_stored
        if missing > 0:
            assert self._segment_tokens is not None
            left = len(self._segments) - -(-missing // self._segment_tokens)
            hot = self._thawed(self._segments[left:])
            hot.set_recording(self._hot.is_recording)
            hot.crop(num_tokens)
            self._hot, self._segments = hot, self._segments[:left]
        else:
            self._hot.crop(num_tokens)
        if self._tail is not None:
            self._tail -= num_tokens

    def set_recording(self, on: bool) -> None:
        self._hot.set_recording(on)

    def record_last(self) -> None:
        self._hot.record_last()

    @property
    def is_recording(self) -> bool:
        return self._hot.is_recording

    def keep(self, indices: Tensor) -> None:
        stored = self.num_stored
        indices = token_index(indices, stored, self.keys)
        kept = indices.shape[-1]
        # The tail: how many of the newest tokens are all there, counted from the end.
        newest = torch.arange(stored - kept, stored, device=indices.device)
        gapless = (indices == newest).flip(-1).to(torch.int64).cumprod(-1).sum(-1)
        tail = min(self._croppable, int(gapless.min()) if kept else 0)
        whole = self._thawed()
        whole.keep(indices)
        self._adopt(self._format.without(whole, 0), ())
        self._dropped += stored - kept
        self._tail = tail

    def reset(self) -> None:
        self._hot.reset()
        self._segments = []
        self._segment_tokens = self._given_segment_tokens
        self._dropped, self._tail = 0, None

    # -- rows ------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self._hot.batch_size

    def reorder(self, index: Tensor) -> None:
        self._hot.reorder(index)
        self._gather(index)

    def select(self, index: Tensor) -> None:
        if self.batch_size >= 0:
            index = row_index(index, self.batch_size)
            self._hot.select(index)
            self._gather(index)

    def _gather(self, index: Tensor) -> None:
        rows = index.tolist() if self._segments else []
        if rows != list(range(len(rows))) or (
            self._segments and len(rows) != len(self._segments[0].rows)
        ):
            self._segments = [segment.at(rows) for segment in self._segments]

    def merge(self, others: Sequence["TieredLayer"]) -> "TieredLayer":
        layers = [self, *others]
        merged = self._empty()
        if check_mergeable(layers):
            if any(layer._dropped for layer in layers):
                raise CacheError("Cannot merge caches from which keep() dropped tokens.")
            lengths = {(one._segment_tokens, one.num_segments, one.num_stored) for one in layers}
            if len(lengths) == 1 and all(one._tier is self._tier for one in layers):
                merged._hot = self._hot.merge([one._hot for one in others])
                columns = zip(*(one._segments for one in layers), strict=True)
                merged._segments = [
                    Segment([row for one in same for row in one.rows], same[0].layout)
                    for same in columns
                ]
            else:
                wholes = [one._thawed() for one in layers]
                merged._adopt(wholes[0].merge(wholes[1:]), ())
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "TieredLayer":
        if self._dropped and num_padding:
            raise CacheError("Cannot remove padding: keep() dropped tokens before.")
        other = self._empty()
        if self.batch_size >= 0:
            number = int(row_index(torch.tensor([row]), self.batch_size))
            other._segments = [segment.at([number]) for segment in self._segments]
        other._hot = self._hot.extract(row)
        other._dropped, other._tail = self._dropped, self._tail
        if num_padding:
            other._adopt(other._thawed().extract(0, num_padding), ())
        return other

    def fork(self) -> "TieredLayer":
        other = self._empty()
        other._hot, other._segments = self._hot.fork(), list(self._segments)
        other._dropped, other._tail = self._dropped, self._tail
        return other

    # -- bytes -----------------------------------------------------------------------------------

    def state(self) -> LayerState:
        newest = self._hot.state()
        device = next(iter(newest.tensors.values())).device if newest.tensors else None
        tensors = {
            f"segment_{place:06d}": StoredRows(self._tier, segment, device or torch.device("cpu"))
            for place, segment in enumerate(self._segments)
        }
        meta = {
            "segment_tokens": self._segment_tokens,
            "dropped": self._dropped,
            "tail": self._tail,
        }
        return LayerState(kind=self.kind, tensors=tensors, meta=meta, parts=(newest,))

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        if len(state.parts) != 1 or set(state.meta) != {"segment_tokens", "dropped", "tail"}:
            raise CacheError("A saved tiered layer lacks its newest tokens, or facts about it.")
        hot = self._format.new_layer()
        hot.load_state(state.parts[0])
        tokens, dropped, tail = (state.meta[name] for name in ("segment_tokens", "dropped", "tail"))
        names = [f"segment_{place:06d}" for place in range(len(state.tensors))]
        numbers = [x for x in (tokens, dropped, tail) if x is not None]
        stored = len(names) * (tokens or 0) + hot.num_stored
        if (
            not all(type(number) is int and number >= 0 for number in numbers)
            or dropped is None
            or (tokens == 0)
            or (names and tokens is None)
            or set(names) != set(state.tensors)
            or (tail is not None and tail > stored)
            or (names and hot.batch_size < 0)
        ):
            raise CacheError(f"A saved tiered layer's facts {dict(state.meta)} contradict it.")
        if self.max_tokens is not None and stored > self.max_tokens:
            raise CapacityError(f"{stored} saved tokens do not fit a cache of {self.max_tokens}.")
        segments = []
        keys, values = hot.keys, hot.values
        for name in names:
            assert keys is not None
            assert values is not None
            layout = self._format.layout(keys, values, tokens)
            rows = state.tensors[name]
            expected = (hot.batch_size, layout.num_bytes)
            if rows.dtype != torch.uint8 or tuple(rows.shape) != expected:
                raise CacheError(
                    f"Saved segment {name} is {rows.dtype} {list(rows.shape)}; expected uint8 "
                    f"{list(expected)} beside keys {list(keys.shape)}."
                )
            self._tier.bind(rows.device)
            segments.append(freeze(self._tier, [rows], layout))
        self.reset()
        self._hot, self._segments = hot, segments
        self._segment_tokens = tokens if tokens is not None else self._given_segment_tokens
        self._dropped, self._tail = dropped, tail

    def _records(self) -> list[Record]:
        """Every record, each once: rows that share one count it once."""
        return list(
            {row.serial: row for segment in self._segments for row in segment.rows}.values()
        )

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_by_place().values())

    def nbytes_by_place(self) -> dict[str, int]:
        found = {"device": self._hot.nbytes}
        if self._segments:
            content = self._segments[0].layout.content_bytes
            for record in self._records():
                place = self._tier.where(record)
                found[place] = found.get(place, 0) + content
        return found

    @property
    def nbytes_reserved(self) -> int:
        return self._hot.nbytes_reserved + sum(record.stride for record in self._records())


@final
class LayerStream(KeyValueStream):
    """What attention reads of a layer: its segments as the tier brings them, then the newest.

    Args:
        layer: whose they are.
        segments: frozen tokens, oldest first.
        newest: keys and values of the newest tokens.
    """

    def __init__(self, layer: TieredLayer, segments: Sequence[Segment], newest: Pair) -> None:
        self._tier, self._format = layer._tier, layer._format
        self._order, self._place = layer._order, layer._place
        self._segments = tuple(segments)
        self._newest = newest
        keys, values = newest
        tokens = len(segments) * (layer._segment_tokens or 0) + keys.shape[2]
        batch, heads = keys.shape[:2]
        self.keys_shape = (batch, heads, tokens, keys.shape[3])
        self.values_shape = (batch, heads, tokens, values.shape[3])
        self.dtype, self.device = keys.dtype, keys.device
        if self._segments:
            tile = self._segments[0].tile
            self.most_held = self._tier.most_held(len(tile) * tile[0].stride)

    def tiles(self, held: int = 1, settle: Settle = nothing_runs) -> Iterator[Pair]:
        tiles = [segment.tile for segment in self._segments]
        stream = self._tier.stream(tiles, self._then, held, settle)
        for found, segment in zip(stream, self._segments, strict=False):
            yield self._format.tile(segment.pieces(found), self._newest)
        if self._newest[0].shape[2]:
            yield self._newest

    def _then(self) -> Iterator[Tile]:
        """What a forward pass reads after this layer: the next ones, then the first again."""
        for layer in self._order.after(self._place):
            for segment in layer._segments:
                yield segment.tile
