"""Every kind of cache layer, with how to feed it and how to compare it with the oracle."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from contract.oracle import HEADS, WIDTH, Oracle
from contract.stretched import TIMES, Stretched
from mnemon.layers import (
    CacheLayer,
    CrossLayer,
    DenseLayer,
    DMCLayer,
    DMSLayer,
    ForeignLayer,
    HybridLayer,
    IndexerLayer,
    PackedLayer,
    PackedWindowLayer,
    RecurrentLayer,
    SharedLayer,
    StaticLayer,
    StaticWindowLayer,
    WindowLayer,
)
from mnemon.layers.hot import DenseHot
from mnemon.layers.order import LayerOrder
from mnemon.layers.tiered import TieredLayer
from mnemon.policies import PolicyLayer, policy_of
from mnemon.recipe import parse
from mnemon.schemes import PackedFormat
from mnemon.tiers import DiskTier, HostTier, Tier

__all__ = ["CAPACITY", "KEY_WIDTH", "KINDS", "WINDOW", "Kind", "Role", "kind_named"]

KEY_WIDTH = 4  # of WIDTH; the rest are values: keys and values of different widths
CAPACITY = 24
WINDOW = 5
KERNEL = 3


class Role(ABC):
    """One thing that a layer keeps: how it is fed and what it must then hold."""

    @abstractmethod
    def feed(self, layer: Any, new: torch.Tensor, before: Oracle) -> None:
        """Put `new` ``[batch, new, heads, width]`` in and check what comes back."""

    @abstractmethod
    def check(self, layer: Any, oracle: Oracle) -> None:
        """Compare what `layer` holds with the oracle."""

    @abstractmethod
    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        """Exact bytes that a layer with this content stores."""


def split(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as keys and values, ``[batch, heads, new, width]``."""
    keys, values = new[..., :KEY_WIDTH], new[..., KEY_WIDTH:]
    return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def join(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`, in float64."""
    return torch.cat([keys, values], dim=-1).transpose(1, 2).to(torch.float64)


def assert_same(got: torch.Tensor, expected: torch.Tensor, within: float = 0.0) -> None:
    torch.testing.assert_close(got.to(torch.float64), expected, rtol=0, atol=within)


@final
class Tokens(Role):
    """Keys and values. `visible` is how many tokens a query sees, itself included."""

    def __init__(
        self,
        visible: int | None = None,
        *,
        bound: int | None = None,
        tied: bool = False,
        within: float = 0.0,
    ) -> None:
        self.visible = visible
        self.bound = bound  # tokens stored at most
        self.tied = tied  # values are the keys
        self.within = within  # how far a number may be from what came in

    def _pair(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tied:
            keys = new.transpose(1, 2).contiguous()
            return keys, keys
        return split(new)

    def feed(self, layer: CacheLayer, new: torch.Tensor, before: Oracle) -> None:
        length, offset = layer.mask_sizes(new.shape[1])
        keys, values = layer.append(*self._pair(new))
        after = before.fork()
        after.append(new.to(torch.float64))
        assert keys.shape[-2] == values.shape[-2] == length
        # Position `offset + j` of the mask is token j of what came back, and nothing a query may
        # see is missing.
        first = offset - before.dropped
        assert 0 <= first
        needed = 0 if self.visible is None else max(0, before.seen - (self.visible - 1))
        assert offset <= max(needed, before.dropped)
        expected = after.dense(first)
        assert length >= expected.shape[1]
        self._compare(keys, values, expected)

    def _compare(self, keys: torch.Tensor, values: torch.Tensor, expected: torch.Tensor) -> None:
        count = expected.shape[1]
        keys, values = keys[:, :, :count], values[:, :, :count]
        if self.tied:
            assert_same(keys.transpose(1, 2), expected)
            assert_same(values.transpose(1, 2), expected)
        else:
            assert_same(join(keys, values), expected, self.within)

    def stored(self, oracle: Oracle) -> int:
        return oracle.stored if self.bound is None else min(oracle.stored, self.bound)

    def check(self, layer: CacheLayer, oracle: Oracle) -> None:
        assert type(layer.num_tokens) is int
        assert type(layer.num_stored) is int
        assert layer.num_tokens == oracle.seen
        assert layer.num_stored == self.stored(oracle)
        assert layer.batch_size == oracle.batch_size
        view = layer.view()
        if oracle.batch_size < 0:
            assert view is None or view[0].shape[-2] == 0 or layer.is_compileable
            return
        assert view is not None
        expected = oracle.dense(oracle.stored - self.stored(oracle))
        assert view[0].shape[-2] == expected.shape[1] or layer.is_compileable
        self._compare(*view, expected)

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        return max(oracle.batch_size, 0) * self.stored(oracle) * HEADS * WIDTH * itemsize


@final
class States(Role):
    """A convolution state of `KERNEL` columns and, if `recurrent`, a running state."""

    def __init__(self, *, recurrent: bool) -> None:
        self.recurrent = recurrent

    def feed(self, layer: CacheLayer, new: torch.Tensor, before: Oracle) -> None:
        columns = new.flatten(2).transpose(1, 2)
        got = layer.update_conv_state(columns, 0, KERNEL)
        after = before.fork()
        after.append(new.to(torch.float64))
        context = min(before.stored, KERNEL) + new.shape[1]
        expected = after.dense(after.stored - context).flatten(2).transpose(1, 2)
        assert_same(got[..., got.shape[-1] - context :], expected)
        if self.recurrent:
            state = layer.recurrent_state(0)
            state = columns.new_zeros(columns.shape[:2]) if state is None else state
            for step in range(columns.shape[-1]):
                state = (2 * state + columns[..., step]).remainder(61)
            if state.shape[0] != new.shape[0]:
                state = state.expand(new.shape[0], -1)
            layer.update_recurrent_state(state.contiguous(), 0)

    def check(self, layer: Any, oracle: Oracle) -> None:
        assert layer.batch_size == oracle.batch_size
        assert layer.has_state() == (oracle.batch_size > 0)
        if oracle.batch_size < 0:
            assert layer.conv_state(0) is None
            assert layer.recurrent_state(0) is None
            return
        padded = Oracle([[None] * KERNEL + row for row in oracle.rows], 0)
        expected = padded.dense(padded.stored - KERNEL).flatten(2).transpose(1, 2)
        assert_same(layer.conv_state(0), expected)
        if self.recurrent:
            running = torch.zeros(oracle.batch_size, HEADS * WIDTH, dtype=torch.float64)
            for row, history in enumerate(oracle.rows):
                for token in history:
                    if token is not None:
                        running[row] = (2 * running[row] + token.flatten()).remainder(61)
            assert_same(layer.recurrent_state(0), running)

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        per_row = HEADS * WIDTH * (KERNEL + 1 if self.recurrent else KERNEL)
        return max(oracle.batch_size, 0) * per_row * itemsize


@final
class IndexerKeys(Role):
    """Keys of a sparse indexer, ``[batch, tokens, width]``, and positions beside them."""

    def feed(self, layer: Any, new: torch.Tensor, before: Oracle) -> None:
        got = layer.update_indexer(new.flatten(2))
        after = before.fork()
        after.append(new.to(torch.float64))
        assert_same(got[:, : after.stored], after.dense().flatten(2))

    def check(self, layer: Any, oracle: Oracle) -> None:
        keys = layer.indexer_keys
        if oracle.batch_size < 0:
            assert keys is None or layer.is_compileable
            return
        assert_same(keys[:, : oracle.stored], oracle.dense().flatten(2))
        part = getattr(layer, "indexer", layer)
        assert part.num_tokens == part.num_stored == oracle.stored
        assert part.batch_size == oracle.batch_size

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        return max(oracle.batch_size, 0) * oracle.stored * HEADS * WIDTH * itemsize


@final
class Nothing(Role):
    """A layer that keeps nothing."""

    def feed(self, layer: Any, new: torch.Tensor, before: Oracle) -> None:
        assert layer.mask_sizes(new.shape[1]) == (new.shape[1], 0)

    def check(self, layer: Any, oracle: Oracle) -> None:
        assert layer.num_tokens == layer.num_stored == 0
        assert layer.batch_size == -1
        assert layer.view() is None

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        return 0


@final
class SparseIndex(Role):
    """MiniMax M3: index keys that the model adds through the wrapped object's own method."""

    def feed(self, layer: Any, new: torch.Tensor, before: Oracle) -> None:
        if new.shape[0] != layer.batch_size:  # the model appends keys first, which repeats rows
            raise AssertionError("feed keys and values before the index")
        got = layer.update_index(new.flatten(2)[:, None])
        after = before.fork()
        after.append(new.to(torch.float64))
        assert_same(got[:, 0], after.dense().flatten(2))

    def check(self, layer: Any, oracle: Oracle) -> None:
        if oracle.batch_size < 0:
            assert layer.idx_keys is None
        else:
            assert_same(layer.idx_keys[:, 0], oracle.dense().flatten(2))

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        return max(oracle.batch_size, 0) * oracle.stored * HEADS * WIDTH * itemsize


RATE = 4


@final
class Compressed(Role):
    """DeepSeek V4: one entry for every `RATE` tokens, and a buffer of those not yet compressed."""

    def feed(self, layer: Any, new: torch.Tensor, before: Oracle) -> None:
        flat = new.flatten(2)
        chunk, gate, position = layer.store_compression_weights("compressor", flat, flat)
        assert position == before.seen // RATE * RATE
        assert torch.equal(chunk, gate)
        entries = chunk.unflatten(1, (-1, RATE)).amax(2)
        layer.update_compressor_states("compressor", entries)

    def check(self, layer: Any, oracle: Oracle) -> None:
        if oracle.batch_size < 0:
            assert layer.compressed_kv["compressor"] is None
            return
        whole = oracle.stored // RATE * RATE
        dense = oracle.dense().flatten(2)
        entries = dense[:, :whole].unflatten(1, (-1, RATE)).amax(2)
        assert layer.entry_count["compressor"] == whole // RATE
        assert_same(layer.compressed_kv["compressor"], entries)
        assert_same(layer.buffer_kv["compressor"], dense[:, whole:])
        assert_same(layer.buffer_gate["compressor"], dense[:, whole:])

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        whole = oracle.stored // RATE
        numbers = whole + 2 * (oracle.stored - whole * RATE)
        return max(oracle.batch_size, 0) * numbers * HEADS * WIDTH * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of layer under test.

    Args:
        name: of the test case.
        make: an empty layer.
        roles: what it keeps.
        crops_within: how many of `seen` tokens can be taken back.
        keeps: has `keep`.
        merges: ``"any"`` lengths, ``"equal"`` lengths, or ``"never"``.
        extracts_padding: a padded row can be cut.
        capacity: tokens that fit.
        promotes: accepts another dtype, as ``torch.cat`` does.
        shares: a fork shares memory until one of the two writes.
        counts_rows: knows its batch size.
        shares_rows: rows that were repeated share memory, which `nbytes` counts once.
        has_history: what it stores depends on the way there (blocks that were opened again).
        records: has `set_recording`.
        needs: a model type of transformers that it comes from.
    """

    name: str
    make: Callable[[], CacheLayer]
    roles: tuple[Role, ...]
    crops_within: Callable[[int], int] = lambda seen: seen
    keeps: bool = False
    merges: str = "any"
    extracts_padding: bool = True
    capacity: int | None = None
    promotes: bool = True
    shares: bool = False
    counts_rows: bool = True
    shares_rows: bool = False
    has_history: bool = False
    records: bool = True
    needs: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def has_tokens(self) -> bool:
        return isinstance(self.roles[0], Tokens)

    @property
    def tied(self) -> bool:
        first = self.roles[0]
        return isinstance(first, Tokens) and first.tied

    def feed(self, layer: CacheLayer, oracle: Oracle, new: torch.Tensor) -> None:
        """Append `new` to both, checking what the layer returns."""
        for role in self.roles:
            role.feed(layer, new, oracle)
        oracle.append(new.to(torch.float64))

    def check(self, layer: CacheLayer, oracle: Oracle) -> None:
        for role in self.roles:
            role.check(layer, oracle)

    def nbytes(self, oracle: Oracle, itemsize: int) -> int:
        return sum(role.nbytes(oracle, itemsize) for role in self.roles)

    def counts_bytes(self, layer: CacheLayer, oracle: Oracle, itemsize: int) -> bool:
        """Whether `layer.nbytes` is what a layer with this content stores."""
        exact = self.nbytes(oracle, itemsize)
        if self.has_history:
            return (layer.nbytes > 0) == (exact > 0)
        return layer.nbytes == exact or (self.shares_rows and 0 < layer.nbytes <= exact)

    def filled(
        self, new: torch.Tensor, layer: CacheLayer | None = None
    ) -> tuple[CacheLayer, Oracle]:
        """A layer that was given `new`, and its oracle."""
        layer = self.make() if layer is None else layer
        oracle = Oracle()
        self.feed(layer, oracle, new)
        return layer, oracle


def _minimax() -> Any:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    return modeling.MiniMaxM3VLSparseCacheLayer()


def _deepseek(name: str) -> Any:
    """A layer object of one of DeepSeek V4's classes."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    config = DeepseekV4Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        sliding_window=WINDOW, compress_rates={
            "heavily_compressed_attention": RATE, "compressed_sparse_attention": RATE,
        },
    )  # fmt: skip
    return getattr(modeling, name)(config)


def _tiered(tier: Tier) -> TieredLayer:
    """Segments of 4 tokens behind a tail of 1, so that a few tokens reach the tier."""
    return TieredLayer(tier, DenseHot(tail_tokens=1), LayerOrder(), segment_tokens=4)


def _packed(text: str) -> PackedFormat:
    form = parse(text).packed
    assert form is not None
    return form


def _under(text: str, inner: Callable[[], CacheLayer]) -> Callable[[], CacheLayer]:
    """A layer under a policy that lets it hold more than the suite feeds."""
    policy = policy_of(parse(text))
    assert policy is not None
    return lambda: PolicyLayer(inner(), policy, 3)


_PAST = WINDOW - 1
_STATES = States(recurrent=True)
_CONV = States(recurrent=False)

_KINDS: tuple[Kind, ...] = (
    Kind(name="dense", make=DenseLayer, roles=(Tokens(),), keeps=True, shares=True),
    Kind(
        name="tiered-host",
        make=lambda: _tiered(HostTier()),
        roles=(Tokens(),),
        keeps=True,
        promotes=False,
        shares_rows=True,
    ),
    Kind(
        name="tiered-disk",
        make=lambda: _tiered(DiskTier(memory_bytes=0)),
        roles=(Tokens(),),
        keeps=True,
        promotes=False,
        shares_rows=True,
    ),
    Kind(
        name="tiered-disk+recurrent",
        make=lambda: HybridLayer(_tiered(DiskTier(memory_bytes=0)), recurrent=RecurrentLayer()),
        roles=(Tokens(), _STATES),
        crops_within=lambda seen: 0,
        promotes=False,
        shares_rows=True,
    ),
    Kind(
        name="packed",
        make=lambda: Stretched(PackedLayer(_packed("int8(residual=20, rotate=no, keys=token)"))),
        roles=(Tokens(within=0.45),),
        keeps=True,
        has_history=True,
    ),
    Kind(
        name="packed-channel",
        make=lambda: Stretched(
            PackedLayer(_packed("int8(residual=0, rotate=yes, keys=channel, values=channel)"))
        ),
        roles=(Tokens(within=2.0),),
        keeps=True,
        has_history=True,
    ),
    Kind(
        name="packed-window",
        make=lambda: Stretched(
            PackedWindowLayer(_PAST * TIMES + 1, _packed("int8(residual=1, rotate=no, keys=token)"))
        ),
        roles=(Tokens(WINDOW, bound=_PAST, within=0.45),),
        crops_within=lambda seen: seen if seen <= _PAST else 0,
        has_history=True,
    ),
    Kind(
        name="packed+recurrent",
        make=lambda: HybridLayer(
            Stretched(PackedLayer(_packed("int8(residual=9, rotate=no, keys=token)"))),
            recurrent=RecurrentLayer(),
        ),
        roles=(Tokens(within=0.45), _STATES),
        crops_within=lambda seen: 0,
        has_history=True,
    ),
    Kind(
        name="dms",
        make=lambda: DMSLayer(WINDOW - 1),
        roles=(Tokens(),),
        crops_within=lambda seen: seen if seen <= WINDOW else 0,
        has_history=True,  # marks lie beside the slots
    ),
    Kind(
        name="dms-sliding",
        make=lambda: DMSLayer(1, sliding=1000),
        roles=(Tokens(),),
        crops_within=lambda seen: 0,
        has_history=True,
    ),
    Kind(
        name="dms-packed",
        make=lambda: Stretched(
            DMSLayer(WINDOW - 1, form=_packed("int8(residual=0, rotate=no, keys=token)"))
        ),
        roles=(Tokens(within=0.45),),
        crops_within=lambda seen: 0,
        has_history=True,
    ),
    Kind(name="dmc", make=DMCLayer, roles=(Tokens(),), crops_within=lambda seen: 0),
    Kind(
        name="under-window",
        make=_under("sinks(4) + window(1000)", DenseLayer),
        roles=(Tokens(),),
        keeps=True,
        shares=True,
        has_history=True,
    ),
    Kind(
        name="under-random-tiered",
        make=_under("random(keep=1000)", lambda: _tiered(HostTier())),
        roles=(Tokens(),),
        keeps=True,
        promotes=False,
        has_history=True,
    ),
    Kind(
        name="under-h2o-packed",
        make=_under(
            "h2o(keep=1000)",
            lambda: Stretched(PackedLayer(_packed("int8(residual=20, rotate=no, keys=token)"))),
        ),
        roles=(Tokens(within=0.45),),
        keeps=True,
        has_history=True,
        records=False,
    ),
    Kind(
        name="under-tova",
        make=_under("tova(keep=1000)", DenseLayer),
        roles=(Tokens(),),
        keeps=True,
        shares=True,
        has_history=True,
        records=False,
    ),
    Kind(
        name="cross",
        make=CrossLayer,
        roles=(Tokens(),),
        crops_within=lambda seen: 0,
        merges="equal",
        shares=True,
    ),
    Kind(
        name="static",
        make=lambda: StaticLayer(CAPACITY),
        roles=(Tokens(),),
        keeps=True,
        capacity=CAPACITY,
        promotes=False,
    ),
    Kind(
        name="static-sliding",
        make=lambda: StaticLayer(CAPACITY, is_sliding=True),
        roles=(Tokens(2 * CAPACITY),),
        keeps=True,
        capacity=CAPACITY,
        promotes=False,
    ),
    Kind(
        name="window",
        make=lambda: WindowLayer(WINDOW),
        roles=(Tokens(WINDOW, bound=_PAST),),
        crops_within=lambda seen: seen if seen <= _PAST else 0,
        shares=True,
    ),
    Kind(
        name="window-of-1",
        make=lambda: WindowLayer(1),
        roles=(Tokens(1, bound=0),),
        crops_within=lambda seen: 0,
    ),
    Kind(
        name="static-window",
        make=lambda: StaticWindowLayer(WINDOW),
        roles=(Tokens(WINDOW, bound=WINDOW),),
        crops_within=lambda seen: seen if seen <= WINDOW else 0,
        promotes=False,
    ),
    Kind(
        name="recurrent",
        make=RecurrentLayer,
        roles=(_STATES,),
        crops_within=lambda seen: 0,
    ),
    Kind(name="conv", make=RecurrentLayer, roles=(_CONV,), crops_within=lambda seen: 0),
    Kind(name="indexer", make=IndexerLayer, roles=(IndexerKeys(),), shares=True),
    Kind(
        name="static-indexer",
        make=lambda: IndexerLayer(CAPACITY),
        roles=(IndexerKeys(),),
        capacity=CAPACITY,
        promotes=False,
    ),
    Kind(name="shared", make=SharedLayer, roles=(Nothing(),), counts_rows=False),
    Kind(
        name="dense+recurrent",
        make=lambda: HybridLayer(DenseLayer(), recurrent=RecurrentLayer()),
        roles=(Tokens(), _STATES),
        crops_within=lambda seen: 0,
        shares=True,
    ),
    Kind(
        name="window+conv",
        make=lambda: HybridLayer(WindowLayer(WINDOW), recurrent=RecurrentLayer()),
        roles=(Tokens(WINDOW, bound=_PAST), _CONV),
        crops_within=lambda seen: 0,
        shares=True,
    ),
    Kind(
        name="dense+indexer",
        make=lambda: HybridLayer(DenseLayer(), indexer=IndexerLayer()),
        roles=(Tokens(), IndexerKeys()),
        shares=True,
    ),
    Kind(
        name="static+indexer",
        make=lambda: HybridLayer(StaticLayer(CAPACITY), indexer=IndexerLayer(CAPACITY)),
        roles=(Tokens(), IndexerKeys()),
        capacity=CAPACITY,
        promotes=False,
    ),
    Kind(
        name="static-window+recurrent",
        make=lambda: HybridLayer(StaticWindowLayer(WINDOW), recurrent=RecurrentLayer()),
        roles=(Tokens(WINDOW, bound=WINDOW), _STATES),
        crops_within=lambda seen: 0,
        promotes=False,
    ),
    Kind(
        name="minimax-m3",
        make=lambda: ForeignLayer(_minimax),
        needs="minimax_m3_vl",
        roles=(Tokens(), SparseIndex()),
        merges="never",
        extracts_padding=False,
    ),
    Kind(
        name="deepseek-v4-hca",
        make=lambda: ForeignLayer(lambda: _deepseek("DeepseekV4HCACache")),
        needs="deepseek_v4",
        roles=(Tokens(WINDOW, bound=_PAST, tied=True), Compressed()),
        crops_within=lambda seen: 0,
        merges="never",
        extracts_padding=False,
    ),
    Kind(
        name="deepseek-v4-csa",
        make=lambda: ForeignLayer(lambda: _deepseek("DeepseekV4CSACache")),
        needs="deepseek_v4",
        roles=(Tokens(WINDOW, bound=_PAST, tied=True), Compressed()),
        crops_within=lambda seen: 0,
        merges="never",
        extracts_padding=False,
    ),
)


#: Without layers of models that the installed transformers does not have.
KINDS = tuple(kind for kind in _KINDS if not kind.needs or kind.needs in CONFIG_MAPPING)


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
