"""How the newest tokens of a tiered layer become frozen ones, and back: one class per format."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mnemon.formats import BLOCK_TOKENS, PackedHalf, PackedSide, PackedTensor
from mnemon.layers.base import CacheLayer, LayerState
from mnemon.layers.dense import DenseLayer
from mnemon.layers.frozen import Layout
from mnemon.layers.packed import PackedLayer
from mnemon.schemes import PackedFormat, Scheme

__all__ = ["DenseHot", "HotFormat", "PackedHot", "Pair"]

Pair = tuple[Tensor, Tensor]


class HotFormat(ABC):
    """What the newest tokens are kept in, and what their frozen form consists of.

    Pieces are tensors ``[batch, ...]`` whose bytes go to the tier as they are.
    """

    #: Newest tokens that never freeze: what may be taken back without reading.
    tail_tokens: int = 128

    @abstractmethod
    def new_layer(self) -> CacheLayer:
        """An empty layer for the newest tokens."""

    @abstractmethod
    def layout(self, keys: Tensor, values: Tensor, num_tokens: int) -> Layout:
        """What `num_tokens` frozen tokens of one row of a layer with such keys and values take."""

    @abstractmethod
    def oldest(self, layer: CacheLayer, first: int, count: int) -> list[Tensor]:
        """The pieces of tokens `first` to ``first + count`` of `layer`; may share its memory."""

    @abstractmethod
    def without(self, layer: CacheLayer, count: int) -> CacheLayer:
        """A layer with what `layer` holds, without its `count` oldest tokens, sharing nothing."""

    @abstractmethod
    def joined(self, segments: Sequence[Sequence[Tensor]], layer: CacheLayer) -> CacheLayer:
        """A layer with the tokens of all `segments`, then those of `layer`, sharing nothing."""

    def aligned(self, layer: CacheLayer) -> CacheLayer:
        """What `layer` holds, so that it can be frozen from its first token on."""
        return layer

    @abstractmethod
    def tile(self, pieces: Sequence[Tensor], newest: Pair) -> Pair:
        """Keys and values of a segment as attention takes them; `newest` are the layer's own."""


@final
class DenseHot(HotFormat):
    """Keys and values in the model's dtype."""

    def __init__(self, tail_tokens: int = 128) -> None:
        self.tail_tokens = tail_tokens

    def new_layer(self) -> DenseLayer:
        return DenseLayer()

    def layout(self, keys: Tensor, values: Tensor, num_tokens: int) -> Layout:
        pieces = ((x.dtype, (x.shape[1], num_tokens, x.shape[3])) for x in (keys, values))
        return Layout(tuple(pieces))

    def oldest(self, layer: CacheLayer, first: int, count: int) -> list[Tensor]:
        held = layer.state().tensors
        return [held[name].narrow(2, first, count) for name in ("keys", "values")]

    def without(self, layer: CacheLayer, count: int) -> DenseLayer:
        held = layer.state().tensors
        left = held["keys"].shape[2] - count
        return _dense([held[name].narrow(2, count, left).detach() for name in ("keys", "values")])

    def joined(self, segments: Sequence[Sequence[Tensor]], layer: CacheLayer) -> DenseLayer:
        held = layer.state().tensors
        ends = [[held["keys"].detach(), held["values"].detach()]] if held else []
        parts = [*segments, *ends]
        return _dense([torch.cat([part[side] for part in parts], dim=2) for side in (0, 1)])

    def tile(self, pieces: Sequence[Tensor], newest: Pair) -> Pair:
        keys, values = pieces
        return keys, values


_PACKED = ("keys_blocks", "keys_factors", "values_blocks", "values_factors")


@final
class PackedHot(HotFormat):
    """Blocks of a packed format, as they are: what comes back is bit for bit what went away.

    Args:
        form: how keys and values are stored.
    """

    def __init__(self, form: PackedFormat) -> None:
        self.form = form
        self._known: dict[tuple[object, ...], tuple[Scheme, Tensor]] = {}
        # Tokens beyond it lie in whole blocks, however they came.
        self.tail_tokens = max(128, -(-form.residual // BLOCK_TOKENS + 1) * BLOCK_TOKENS)

    def new_layer(self) -> PackedLayer:
        return PackedLayer(self.form)

    def layout(self, keys: Tensor, values: Tensor, num_tokens: int) -> Layout:
        heads, blocks = keys.shape[1], num_tokens // BLOCK_TOKENS
        found: list[tuple[torch.dtype, tuple[int, ...]]] = []
        for side, width in ((self.form.keys, keys.shape[3]), (self.form.values, values.shape[3])):
            found.append((torch.uint8, (heads, blocks, side.scheme(width).block_bytes(width))))
            found.append((torch.float32, (heads, blocks)))
        return Layout(tuple(found))

    def oldest(self, layer: CacheLayer, first: int, count: int) -> list[Tensor]:
        held = layer.state().tensors
        first, count = first // BLOCK_TOKENS, count // BLOCK_TOKENS
        return [held[name].narrow(2, first, count) for name in _PACKED]

    def without(self, layer: CacheLayer, count: int) -> PackedLayer:
        state = self.aligned(layer).state()
        first = count // BLOCK_TOKENS
        blocks = [state.tensors[name][:, :, first:] for name in _PACKED if name in state.tensors]
        return self._layer(state, blocks)

    def joined(self, segments: Sequence[Sequence[Tensor]], layer: CacheLayer) -> PackedLayer:
        state = layer.state()
        ends = [[state.tensors[name] for name in _PACKED]] if _PACKED[0] in state.tensors else []
        parts = [*segments, *ends]
        blocks = [torch.cat(same, dim=2) for same in zip(*parts, strict=True)]
        return self._layer(state, blocks)

    def _layer(self, state: LayerState, blocks: Sequence[Tensor]) -> PackedLayer:
        """A layer with the tail of `state` behind `blocks`, sharing nothing."""
        held = {name: state.tensors[name].detach().clone() for name in ("keys", "values")}
        tokens = held["keys"].shape[2]
        if blocks and blocks[0].shape[2]:
            held.update(zip(_PACKED, (part.clone() for part in blocks), strict=True))
            tokens += blocks[0].shape[2] * BLOCK_TOKENS
        widths = {"keys": held["keys"].shape[3], "values": held["values"].shape[3]}
        sides = {"keys": self.form.keys, "values": self.form.values}
        schemes = {name: sides[name].scheme(widths[name]).facts() for name in sides}
        meta = {"num_tokens": tokens, "tail": None, "skipped": 0, "schemes": schemes}
        layer = PackedLayer(self.form)
        layer.load_state(LayerState(kind=layer.kind, tensors=held, meta=meta))
        return layer

    def aligned(self, layer: CacheLayer) -> CacheLayer:
        if not layer.state().meta["skipped"]:
            return layer
        moved = layer.fork()
        moved.keep(torch.arange(layer.num_stored))
        return moved

    def tile(self, pieces: Sequence[Tensor], newest: Pair) -> Pair:
        (keys, keys_factors, values, values_factors), like = pieces, newest
        return (
            self._side(keys, keys_factors, like[0], is_keys=True),
            self._side(values, values_factors, like[1], is_keys=False),
        )

    def _side(self, blocks: Tensor, factors: Tensor, like: Tensor, *, is_keys: bool) -> Tensor:
        batch, heads, _, width = like.shape
        facts = (batch, heads, width, like.dtype, like.device, is_keys)
        known = self._known.get(facts)
        if known is None:
            scheme = (self.form.keys if is_keys else self.form.values).scheme(width)
            with torch.inference_mode(False):
                tail = torch.empty((batch, heads, 0, width), dtype=like.dtype, device=like.device)
            known = self._known[facts] = (scheme, tail)
        scheme, tail = known
        side = PackedSide(
            blocks=blocks, factors=factors, scheme=scheme, width=width, is_keys=is_keys
        )
        return PackedTensor(PackedHalf(side=side, tail=tail))


def _dense(pair: Sequence[Tensor]) -> DenseLayer:
    layer = DenseLayer()
    with torch.no_grad():
        layer.append(pair[0], pair[1])
    return layer
