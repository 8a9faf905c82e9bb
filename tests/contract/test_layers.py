"""One contract for every kind of cache layer, against lists of float64 tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from contract.kinds import CAPACITY, KINDS, WINDOW, Kind, Tokens, assert_same, join, split
from contract.oracle import HEADS, WIDTH, Oracle, tokens
from mnemon.errors import CacheError, CapacityError, UnsupportedVerb
from mnemon.layers import CacheLayer, DenseLayer, HybridLayer, LayerState, RecurrentLayer
from mnemon.layers.base import row_index

F32 = torch.float32
TOKEN_KINDS = [kind for kind in KINDS if kind.has_tokens]
ROW_KINDS = [kind for kind in KINDS if kind.counts_rows]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
token_kinds = pytest.mark.parametrize("kind", TOKEN_KINDS, ids=str)
row_kinds = pytest.mark.parametrize("kind", ROW_KINDS, ids=str)


def fresh(batch: int, count: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return tokens(batch, count, seed).to(dtype)


def snapshot(layer: CacheLayer) -> tuple[Any, ...]:
    """All that can be seen of a layer, copied."""

    def content(state: LayerState) -> tuple[Any, ...]:
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        return state.kind, tensors, dict(state.meta), [content(part) for part in state.parts]

    return content(layer.state()), layer.num_tokens, layer.batch_size, layer.nbytes


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return same_kind and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def assert_refused(layer: CacheLayer, error: type[Exception], verb: Callable[[], object]) -> None:
    """`verb` raises `error`, says why, and leaves `layer` as it was."""
    before = snapshot(layer)
    with pytest.raises(error) as caught:
        verb()
    assert len(str(caught.value)) > 20
    assert equal(snapshot(layer), before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks of the test suite: what callers get who pass nonsense."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# -- appending -------------------------------------------------------------------------------------


@every_kind
def test_empty(kind: Kind) -> None:
    layer, oracle = kind.make(), Oracle()
    kind.check(layer, oracle)
    assert layer.nbytes == layer.nbytes_reserved == 0
    assert layer.keys is None
    assert layer.values is None
    assert layer.can_crop(0)
    layer.crop(0)
    layer.select(torch.tensor([], dtype=torch.int64))
    layer.repeat(3)
    layer.reset()
    kind.check(layer.fork(), oracle)
    kind.check(layer, oracle)
    assert "num_tokens=0" in repr(layer)


@every_kind
@pytest.mark.parametrize(
    "counts",
    [(1,), (1, 1, 1), (4,), (WINDOW,), (WINDOW + 1,), (3, 3, 1), (7, 1, 9), (2, 12, 1), (0, 3)],
)
def test_append(kind: Kind, counts: tuple[int, ...]) -> None:
    layer, oracle = kind.make(), Oracle()
    for step, count in enumerate(counts):
        kind.feed(layer, oracle, fresh(2, count, step))
        kind.check(layer, oracle)
        assert kind.counts_bytes(layer, oracle, 4)
        assert layer.nbytes <= layer.nbytes_reserved


@every_kind
def test_append_of_no_tokens_changes_nothing(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 6))
    kind.feed(layer, oracle, fresh(2, 0))
    kind.check(layer, oracle)


@token_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(kind: Kind, dtype: torch.dtype) -> None:
    layer, oracle = kind.filled(fresh(2, 6, dtype=dtype))
    kind.feed(layer, oracle, fresh(2, 1, 1, dtype))
    kind.check(layer, oracle)
    assert layer.keys is not None
    assert layer.keys.dtype == dtype
    assert kind.counts_bytes(layer, oracle, dtype.itemsize)


@token_kinds
@pytest.mark.parametrize("count", [1, WINDOW + 2])
@pytest.mark.parametrize(
    ("held", "came"), [(F32, torch.bfloat16), (torch.bfloat16, F32), (torch.float16, torch.float64)]
)
def test_dtype_promotion(kind: Kind, held: torch.dtype, came: torch.dtype, count: int) -> None:
    layer, oracle = kind.filled(fresh(2, 6, dtype=held))
    if not kind.promotes:
        new = fresh(2, count, 1, came)
        attention = kind.roles[0]
        assert isinstance(attention, Tokens)
        assert_refused(layer, CacheError, lambda: layer.append(*split(new)))
        return
    kind.feed(layer, oracle, fresh(2, count, 1, came))
    kind.check(layer, oracle)
    assert layer.keys is not None
    assert layer.keys.dtype == torch.promote_types(held, came)
    kind.feed(layer, oracle, fresh(2, 1, 2, came))
    kind.check(layer, oracle)


@row_kinds
def test_one_row_serves_a_batch(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(1, 7))
    kind.feed(layer, oracle, fresh(3, 2, 1))
    kind.check(layer, oracle)
    assert layer.batch_size == 3


# -- going back ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("seen", [3, 4, 5, 9])
@pytest.mark.parametrize("removed", [1, 3])
def test_crop_then_append(kind: Kind, seen: int, removed: int) -> None:
    layer, oracle = kind.filled(fresh(2, seen))
    possible = removed <= kind.crops_within(seen)
    if kind.counts_rows:
        assert layer.can_crop(removed) == possible
    if not possible:
        assert_refused(layer, CacheError, lambda: layer.crop(removed))
        return
    layer.crop(removed)
    oracle.crop(removed)
    kind.check(layer, oracle)
    for step in range(3):
        kind.feed(layer, oracle, fresh(2, 1 + step, 1 + step))
        kind.check(layer, oracle)


@every_kind
def test_crop_everything(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 3))
    if kind.crops_within(3) < 3:
        return
    layer.crop(3)
    oracle.crop(3)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, fresh(2, 2, 1))
    kind.check(layer, oracle)


@every_kind
def test_crop_refusals(kind: Kind) -> None:
    layer, _ = kind.filled(fresh(2, 4))
    assert_refused(layer, CacheError, lambda: layer.crop(-1))
    if kind.counts_rows:
        assert not layer.can_crop(-1)
        assert not layer.can_crop(5)
        assert_refused(layer, CacheError, lambda: layer.crop(5))
    layer.crop(0)


# -- rows ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("index", [[2, 0, 1], [0, 0, 0], [0, 1, 2], [1, 1, 2]])
def test_reorder(kind: Kind, index: list[int]) -> None:
    layer, oracle = kind.filled(fresh(3, 7))
    layer.reorder(torch.tensor(index))
    oracle.select(index)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, fresh(3, 2, 1))
    kind.check(layer, oracle)


@every_kind
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([1, 1, 0, 2, 2]), [1, 1, 0, 2, 2]),
        (torch.tensor([-1, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (torch.tensor([1], dtype=torch.int32), [1]),
    ],
)
def test_select(kind: Kind, index: torch.Tensor, rows: list[int]) -> None:
    layer, oracle = kind.filled(fresh(3, 7))
    layer.select(index)
    oracle.select(rows)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, fresh(len(rows), 2, 1))
    kind.check(layer, oracle)
    assert kind.counts_bytes(layer, oracle, 4)


@row_kinds
@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([3]),
        torch.tensor([-4]),
        torch.tensor([[0]]),
        torch.tensor([True, True]),
        torch.tensor([True, False, True, False]),
    ],
)
def test_select_refusals(kind: Kind, index: torch.Tensor) -> None:
    layer, _ = kind.filled(fresh(3, 4))
    assert_refused(layer, CacheError, lambda: layer.select(index))


def test_row_index_of_a_mask_and_of_negative_rows() -> None:
    assert row_index(torch.tensor([True, False, True]), 3).tolist() == [0, 2]
    assert row_index(torch.tensor([-1, -3]), 3).tolist() == [2, 0]


@every_kind
def test_repeat(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 7))
    layer.repeat(3)
    oracle.repeat(3)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, fresh(6, 1, 1))
    kind.check(layer, oracle)


@every_kind
@pytest.mark.parametrize("lengths", [(3, 7, 1), (5, 4, 9), (6, 6, 6)])
def test_merge_then_extract(kind: Kind, lengths: tuple[int, ...]) -> None:
    pairs = [kind.filled(fresh(1 + (seed == 1), n, seed)) for seed, n in enumerate(lengths)]
    (first, first_oracle), rest = pairs[0], pairs[1:]
    others = [layer for layer, _ in rest]
    unequal = len(set(lengths)) > 1
    if kind.merges == "never" or (kind.merges == "equal" and unequal):
        assert_refused(first, CacheError, lambda: first.merge(others))
        return
    before = [snapshot(layer) for layer, _ in pairs]
    merged = first.merge(others)
    expected = first_oracle.merge([oracle for _, oracle in rest])
    if kind.has_tokens:
        kind.check(merged, expected)
    originals = [row for _, oracle in pairs for row in oracle.rows]
    padding = [max(lengths) - len(row) for row in originals]
    for row, pad in enumerate(padding):
        back = merged.extract(row, pad)
        kind.check(back, Oracle([originals[row]], len(originals[row])))
    # Both go on: the batch with a token for every row, a row alone with its own.
    kind.feed(merged, expected, fresh(len(originals), 2, 5))
    kind.check(merged, expected)
    alone, oracle = merged.extract(-1, padding[-1]), expected.extract(-1, padding[-1])
    kind.feed(alone, oracle, fresh(1, 1, 6))
    kind.check(alone, oracle)
    assert all(equal(snapshot(layer), old) for (layer, _), old in zip(pairs, before, strict=True))


@row_kinds
def test_merge_refusals(kind: Kind) -> None:
    layer, _ = kind.filled(fresh(2, 4))
    assert_refused(layer, CacheError, lambda: layer.merge([kind.make()]))
    stranger = DenseLayer() if kind.name != "dense" else RecurrentLayer()
    assert_refused(layer, CacheError, lambda: layer.merge([stranger]))
    if kind.merges == "never":
        return
    assert_refused(layer, CacheError, lambda: layer.merge([_one_head(kind)]))
    half, _ = kind.filled(fresh(2, 4, dtype=torch.float16))
    assert_refused(layer, CacheError, lambda: layer.merge([half]))


def _one_head(kind: Kind) -> CacheLayer:
    """Such a layer of a model with other shapes."""
    layer = kind.make()
    keys, values = split(fresh(1, 4))
    for part in getattr(layer, "parts", (layer,)):
        if part.kind == "recurrent":
            part.update_conv_state(torch.zeros(1, 3, 4), 0, 3)
            if "recurrent" in kind.name:
                part.update_recurrent_state(torch.zeros(1, 3), 0)
        elif part.kind == "indexer":
            part.update_indexer(torch.zeros(1, 4, 3))
        else:
            part.append(keys[:, :1], values[:, :1])
    return layer


@row_kinds
def test_merge_of_empty_layers_is_empty(kind: Kind) -> None:
    if kind.merges != "never":
        kind.check(kind.make().merge([kind.make()]), Oracle())


@row_kinds
def test_extract_copies(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(3, 4))
    alone, alone_oracle = layer.extract(1), oracle.extract(1)
    kind.feed(layer, oracle, fresh(3, 2, 1))
    layer.reorder(torch.tensor([2, 2, 2]))
    kind.check(alone, alone_oracle)
    kind.feed(alone, alone_oracle, fresh(1, 2, 2))
    kind.check(alone, alone_oracle)
    before = snapshot(layer)
    with pytest.raises(CacheError):
        layer.extract(3)
    with pytest.raises(CacheError):
        layer.extract(-4)
    if not kind.extracts_padding:
        with pytest.raises(UnsupportedVerb):
            layer.extract(0, 1)
    assert equal(snapshot(layer), before)


# -- forks -----------------------------------------------------------------------------------------

Change = Callable[[Kind, CacheLayer, Oracle], None]


def _append(kind: Kind, layer: CacheLayer, oracle: Oracle) -> None:
    kind.feed(layer, oracle, fresh(oracle.batch_size if oracle.rows else 3, 2, 11))


def _crop_append(kind: Kind, layer: CacheLayer, oracle: Oracle) -> None:
    if kind.crops_within(oracle.seen) >= 2:
        layer.crop(2)
        oracle.crop(2)
    _append(kind, layer, oracle)


def _reorder(kind: Kind, layer: CacheLayer, oracle: Oracle) -> None:
    layer.reorder(torch.tensor([2, 0, 0]))
    oracle.select([2, 0, 0])


def _grow(kind: Kind, layer: CacheLayer, oracle: Oracle) -> None:
    room = CAPACITY - oracle.seen - 4 if kind.capacity else 400
    kind.feed(layer, oracle, fresh(3, room, 12))


def _reset(kind: Kind, layer: CacheLayer, oracle: Oracle) -> None:
    layer.reset()
    oracle.rows, oracle.seen = [], 0


@every_kind
@pytest.mark.parametrize("seen", [4, 8])
@pytest.mark.parametrize("swap", [False, True], ids=["original-changes", "fork-changes"])
@pytest.mark.parametrize("change", [_append, _crop_append, _reorder, _grow, _reset])
def test_fork_is_independent(kind: Kind, change: Change, swap: bool, seen: int) -> None:
    one, one_oracle = kind.filled(fresh(3, seen))
    two, two_oracle = one.fork(), one_oracle.fork()
    kind.check(two, two_oracle)
    if swap:
        one, one_oracle, two, two_oracle = two, two_oracle, one, one_oracle
    change(kind, one, one_oracle)
    kind.check(one, one_oracle)
    kind.check(two, two_oracle)
    _crop_append(kind, two, two_oracle)
    kind.check(two, two_oracle)
    kind.check(one, one_oracle)
    _append(kind, one, one_oracle)
    kind.check(one, one_oracle)
    kind.check(two, two_oracle)


@every_kind
def test_fork_shares_memory_until_a_write(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 4))
    fork = layer.fork()
    if not kind.has_tokens or not kind.shares:
        return
    one, two = layer.view(), fork.view()
    assert one is not None
    assert two is not None
    assert one[0].data_ptr() == two[0].data_ptr()
    assert one[1].data_ptr() == two[1].data_ptr()
    kind.feed(layer, oracle.fork(), fresh(2, 1, 1))  # the first to write owns the tip ...
    now = layer.view()
    assert now is not None
    assert kind.name == "cross" or now[0].untyped_storage().data_ptr() == (
        two[0].untyped_storage().data_ptr()
    )
    kind.feed(fork, oracle, fresh(2, 1, 2))  # ... and the second copies
    then = fork.view()
    assert then is not None
    assert then[0].untyped_storage().data_ptr() != now[0].untyped_storage().data_ptr()


@every_kind
def test_fork_of_a_fork_outlives_the_others(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 6))
    middle = layer.fork()
    last = middle.fork()
    del layer
    middle.reset()
    del middle
    kind.check(last, oracle)
    kind.feed(last, oracle, fresh(2, 3, 1))
    kind.check(last, oracle)


# -- state -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("seen", [0, 3, 9])
def test_state_round_trip(kind: Kind, seen: int) -> None:
    if seen:
        layer, oracle = kind.filled(fresh(2, seen))
    else:
        layer, oracle = kind.make(), Oracle()
    state = layer.state()
    other = kind.make()
    other.load_state(state)
    kind.check(other, oracle)
    other_oracle = oracle.fork()
    kind.feed(other, other_oracle, fresh(2, 2, 3))  # borrowed tensors are not written
    other.reorder(torch.tensor([1, 1]))
    other_oracle.select([1, 1])
    kind.check(other, other_oracle)
    kind.check(layer, oracle)
    kind.feed(layer, oracle, fresh(2, 1, 4))
    kind.check(layer, oracle)
    kind.check(other, other_oracle)


@every_kind
def test_state_of_a_cropped_layer(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 4))
    if kind.crops_within(4) < 1:
        return
    layer.crop(1)
    oracle.crop(1)
    other = kind.make()
    other.load_state(layer.state())
    kind.check(other, oracle)
    kind.feed(other, oracle, fresh(2, 7, 1))
    kind.check(other, oracle)


@every_kind
def test_state_meta_is_json(kind: Kind) -> None:
    import json

    def check(state: LayerState) -> None:
        assert json.loads(json.dumps(state.meta)) == state.meta
        for part in state.parts:
            check(part)

    layer, _ = kind.filled(fresh(2, 6))
    check(layer.state())


@every_kind
def test_load_state_refusals(kind: Kind) -> None:
    layer, _ = kind.filled(fresh(2, 6))
    good = layer.state()
    bad = [LayerState(kind="nothing-like-it")]
    if good.parts:
        bad.append(LayerState(kind=good.kind, parts=good.parts[:1]))
        wrong_part = LayerState(kind="nothing-like-it")
        bad.append(LayerState(kind=good.kind, parts=(*good.parts[:-1], wrong_part)))
    elif good.tensors:
        extra = {**good.tensors, "other": torch.zeros(1)}
        bad.append(LayerState(kind=good.kind, tensors=extra, meta=good.meta))
        flat = {name: tensor.flatten() for name, tensor in good.tensors.items()}
        if kind.merges != "never":  # a foreign layer does not know its shapes
            bad.append(LayerState(kind=good.kind, tensors=flat, meta=good.meta))
    if "num_tokens" in good.meta:
        for count in (-1, good.tensors["keys"].shape[-2] - 1):
            meta = {**good.meta, "num_tokens": count}
            bad.append(LayerState(kind=good.kind, tensors=good.tensors, meta=meta))
    for state in bad:
        assert_refused(layer, CacheError, lambda state=state: layer.load_state(state))


# -- keep ------------------------------------------------------------------------------------------


@every_kind
def test_keep(kind: Kind) -> None:
    layer, oracle = kind.filled(fresh(2, 9))
    index = [0, 3, 6, 7, 8]
    if not kind.keeps:
        if kind.counts_rows:
            assert_refused(layer, UnsupportedVerb, lambda: layer.keep(torch.tensor(index)))
        return
    layer.keep(torch.tensor(index))
    oracle.keep(index)
    kind.check(layer, oracle)
    assert layer.num_tokens == 9
    assert layer.num_stored == 5
    assert [layer.can_crop(n) for n in range(6)] == [True, True, True, True, False, False]
    kind.feed(layer, oracle, fresh(2, 2, 1))
    kind.check(layer, oracle)
    assert layer.can_crop(5)
    assert_refused(layer, CacheError, lambda: layer.crop(6))
    layer.crop(4)
    oracle.crop(4)
    kind.check(layer, oracle)
    state = layer.state()
    other = kind.make()
    other.load_state(state)
    kind.check(other, oracle)
    assert other.can_crop(1)
    assert not other.can_crop(2)
    assert_refused(layer, CacheError, lambda: layer.merge([other]))
    assert_refused(layer, CacheError, lambda: layer.extract(0, 1))
    kind.check(layer.extract(1), oracle.extract(1))
    layer.keep(torch.tensor([1]))
    oracle.keep([1])
    kind.check(layer, oracle)


@every_kind
def test_keep_per_head(kind: Kind) -> None:
    if not kind.keeps:
        return
    layer, oracle = kind.filled(fresh(2, 6))
    index = torch.tensor([[[0, 4, 5], [1, 2, 5]], [[3, 4, 5], [0, 1, 2]]])
    layer.keep(index)
    oracle.keep_per_head(index)
    kind.check(layer, oracle)
    assert not layer.can_crop(1)
    kind.feed(layer, oracle, fresh(2, 2, 1))
    kind.check(layer, oracle)


@every_kind
def test_keep_refusals(kind: Kind) -> None:
    if not kind.keeps:
        return
    layer, _ = kind.filled(fresh(2, 6))
    for index in (
        torch.tensor([0, 6]),
        torch.tensor([-1, 0]),
        torch.tensor([1, 0]),
        torch.tensor([1, 1]),
        torch.tensor([[0, 1]]),
        torch.zeros(2, HEADS + 1, 1, dtype=torch.int64),
        torch.zeros(3, HEADS, 1, dtype=torch.int64),
        torch.tensor([0.0, 1.0]),
    ):
        assert_refused(layer, CacheError, lambda index=index: layer.keep(index))
    empty = kind.make()
    assert_refused(empty, CacheError, lambda: empty.keep(torch.tensor([0])))


# -- reset -----------------------------------------------------------------------------------------


@every_kind
def test_reset_and_reuse(kind: Kind) -> None:
    layer, _ = kind.filled(fresh(2, 9))
    if kind.records:
        layer.set_recording(True)
    layer.reset()
    assert layer.num_tokens == 0
    assert layer.nbytes == 0
    assert not layer.is_recording
    oracle = Oracle()
    kind.feed(layer, oracle, fresh(2, 3, 1))
    kind.check(layer, oracle)


# -- what cannot be --------------------------------------------------------------------------------


@token_kinds
def test_append_refusals(kind: Kind, unchecked: None) -> None:
    layer, _ = kind.filled(fresh(2, 6))
    keys, values = split(fresh(2, 1, 1))
    if kind.tied:
        keys = values = fresh(2, 1, 1).transpose(1, 2)
    for wrong in (
        (keys[:1], values[:1]),
        (keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)),
        (keys[:, :1], values[:, :1]),
        (keys[..., :1], values[..., :1]),
        (keys[..., :2], values),
        (keys, values[..., :2]),
        (keys, values[:, :1]),
        (keys, values.repeat(1, 1, 2, 1)),
    ):
        if kind.tied and wrong[0].shape == keys.shape:
            continue  # such a layer ignores the values: they are the keys
        assert_refused(layer, CacheError, lambda wrong=wrong: layer.append(*wrong))
    one, _ = kind.filled(fresh(1, 6))
    wrong = (keys[..., :2].repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1))
    assert_refused(one, CacheError, lambda: one.append(*wrong))  # before rows are repeated


@token_kinds
def test_long_append_refusals(kind: Kind, unchecked: None) -> None:
    layer, _ = kind.filled(fresh(2, 6))
    keys, values = split(fresh(2, WINDOW + 3, 1))
    if kind.tied:
        keys = values = fresh(2, WINDOW + 3, 1).transpose(1, 2)
    for wrong in ((keys[:, :1], values[:, :1]), (keys[..., :1], values[..., :1])):
        assert_refused(layer, CacheError, lambda wrong=wrong: layer.append(*wrong))


@every_kind
def test_capacity(kind: Kind) -> None:
    if kind.capacity is None or not kind.has_tokens:
        return
    empty = kind.make()
    with pytest.raises(CapacityError, match=str(kind.capacity)):
        empty.append(*split(fresh(1, kind.capacity + 1)))
    kind.check(empty, Oracle())
    layer, oracle = kind.filled(fresh(2, kind.capacity))
    kind.check(layer, oracle)
    keys, values = split(fresh(2, 1, 1))
    assert_refused(layer, CapacityError, lambda: layer.append(keys, values))
    assert layer.max_length == kind.capacity
    assert layer.nbytes == layer.nbytes_reserved or "indexer" in kind.name


@every_kind
def test_verbs_of_other_kinds_of_layers(kind: Kind) -> None:
    layer, _ = kind.filled(fresh(2, 4))
    parts = {part.kind for part in getattr(layer, "parts", (layer,))}
    keys, values = split(fresh(2, 1))
    if not kind.has_tokens:
        assert_refused(layer, UnsupportedVerb, lambda: layer.append(keys, values))
    if "recurrent" not in parts:
        states = torch.zeros(2, 3, 4)
        verbs: list[Callable[[], object]] = [
            lambda: layer.update_conv_state(states),
            lambda: layer.update_recurrent_state(states),
            lambda: layer.conv_state(),
            lambda: layer.recurrent_state(),
            lambda: layer.has_state(),
        ]
        for verb in verbs:
            assert_refused(layer, UnsupportedVerb, verb)
    if "indexer" not in parts:
        error: type[Exception] = UnsupportedVerb
        assert_refused(layer, error, lambda: layer.update_indexer(torch.zeros(2, 1, 3)))


def test_indexer_positions_follow_the_rows() -> None:
    """Models with multi-dimensional positions set ``[dimensions, batch, tokens]`` themselves."""
    kind = next(kind for kind in KINDS if kind.name == "dense+indexer")
    layer, oracle = kind.filled(fresh(2, 6))
    assert isinstance(layer, HybridLayer)
    positions = torch.arange(3 * 2 * 6).view(3, 2, 6)
    layer.indexer_position_ids = positions
    assert layer.nbytes == kind.nbytes(oracle, 4) + positions.numel() * 8
    fork = layer.fork()
    layer.crop(2)
    layer.reorder(torch.tensor([1, 0]))
    assert torch.equal(layer.indexer_position_ids, positions[:, [1, 0], :4])
    assert torch.equal(fork.indexer_position_ids, positions)
    other = kind.make()
    other.load_state(fork.state())
    assert torch.equal(other.indexer_position_ids, positions)
    alone = fork.extract(1, 2)
    assert torch.equal(alone.indexer_position_ids, positions[:, 1:, 2:])
    merged = fork.merge([alone])
    padded = torch.nn.functional.pad(positions[:, 1:, 2:], (2, 0))
    assert torch.equal(merged.indexer_position_ids, torch.cat([positions, padded], 1))
    layer.reset()
    assert layer.indexer_position_ids is None


def test_join_is_the_inverse_of_split() -> None:
    new = tokens(2, 3)
    assert_same(join(*split(new)), new)
    assert new.shape[2:] == (HEADS, WIDTH)
