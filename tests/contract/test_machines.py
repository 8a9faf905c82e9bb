"""Random sequences of verbs on every kind of layer, against lists of tokens."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from contract.kinds import KINDS, Kind
from contract.oracle import Oracle, tokens
from mnemon.layers import CacheLayer

MAX_ROWS = 4
MAX_TOKENS = 20  # below the capacity of the preallocated kinds


class Pair:
    """A layer and what it must hold."""

    def __init__(self, layer: CacheLayer, oracle: Oracle) -> None:
        self.layer = layer
        self.oracle = oracle


class LayerMachine(RuleBasedStateMachine):
    """Several layers that were forked, merged, cut and saved from one another."""

    kind: Kind
    pairs = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Pair] = []
        self.seed = 0

    def pair(self, layer: CacheLayer, oracle: Oracle) -> Pair:
        made = Pair(layer, oracle)
        self.live.append(made)
        return made

    @initialize(target=pairs)
    def start(self) -> Pair:
        return self.pair(self.kind.make(), Oracle())

    @rule(pair=pairs, count=st.integers(0, 7), rows=st.integers(1, 3))
    def append(self, pair: Pair, count: int, rows: int) -> None:
        if pair.oracle.stored + count > MAX_TOKENS or pair.oracle.seen + count > MAX_TOKENS:
            return
        if pair.oracle.batch_size > 1:
            rows = pair.oracle.batch_size
        self.seed += 1
        new = tokens(rows, count, self.seed).to(torch.float32)
        self.kind.feed(pair.layer, pair.oracle, new)

    @rule(pair=pairs, count=st.integers(1, 6))
    def crop(self, pair: Pair, count: int) -> None:
        kept_some = pair.oracle.dropped > 0
        if kept_some or pair.oracle.batch_size < 0 or not pair.layer.can_crop(count):
            return
        assert count <= self.kind.crops_within(pair.oracle.seen) or not self.kind.counts_rows
        pair.layer.crop(count)
        pair.oracle.crop(count)

    @rule(pair=pairs, data=st.data())
    def reorder(self, pair: Pair, data: st.DataObject) -> None:
        if pair.oracle.batch_size > 0:
            size = pair.oracle.batch_size
            index = data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
            pair.layer.reorder(torch.tensor(index))
            pair.oracle.select(index)

    @rule(pair=pairs, data=st.data())
    def select(self, pair: Pair, data: st.DataObject) -> None:
        if pair.oracle.batch_size > 0:
            size = pair.oracle.batch_size
            rows = st.integers(-size, size - 1)
            index = data.draw(st.lists(rows, min_size=1, max_size=MAX_ROWS))
            pair.layer.select(torch.tensor(index))
            pair.oracle.select([row % size for row in index])

    @rule(pair=pairs, repeats=st.integers(1, 2))
    def repeat(self, pair: Pair, repeats: int) -> None:
        if 0 < pair.oracle.batch_size * repeats <= MAX_ROWS:
            pair.layer.repeat(repeats)
            pair.oracle.repeat(repeats)

    @rule(pair=pairs, data=st.data())
    def keep(self, pair: Pair, data: st.DataObject) -> None:
        if self.kind.keeps and pair.oracle.stored:
            positions = st.integers(0, pair.oracle.stored - 1)
            index = sorted(data.draw(st.sets(positions, min_size=1)))
            pair.layer.keep(torch.tensor(index))
            pair.oracle.keep(index)

    @rule(target=pairs, pair=pairs)
    def fork(self, pair: Pair) -> Pair:
        return self.pair(pair.layer.fork(), pair.oracle.fork())

    @precondition(lambda self: len(self.live) > 1)
    @rule(pair=consumes(pairs))
    def drop(self, pair: Pair) -> None:
        self.live.remove(pair)

    @rule(target=pairs, one=pairs, other=pairs)
    def merge(self, one: Pair, other: Pair) -> object:
        group = (one.oracle, other.oracle)
        fits = self.kind.merges == "any" or (
            self.kind.merges == "equal" and one.oracle.stored == other.oracle.stored
        )
        rows = sum(oracle.batch_size for oracle in group)
        holds = all(oracle.batch_size > 0 and not oracle.dropped for oracle in group)
        if not fits or not holds or not 0 < rows <= MAX_ROWS:
            return multiple()
        if not self.kind.has_tokens and one.oracle.stored != other.oracle.stored:
            return multiple()  # a state knows no padding; test_layers.py has these
        return self.pair(one.layer.merge([other.layer]), one.oracle.merge([other.oracle]))

    @rule(target=pairs, pair=pairs, row=st.integers(0, MAX_ROWS - 1))
    def extract(self, pair: Pair, row: int) -> object:
        if row >= pair.oracle.batch_size:
            return multiple()
        return self.pair(pair.layer.extract(row), pair.oracle.extract(row))

    @rule(target=pairs, pair=pairs)
    def save(self, pair: Pair) -> Pair:
        layer = self.kind.make()
        layer.load_state(pair.layer.state())
        return self.pair(layer, pair.oracle.fork())

    @rule(pair=pairs)
    def reset(self, pair: Pair) -> None:
        pair.layer.reset()
        pair.oracle.rows, pair.oracle.seen = [], 0

    @invariant()
    def all_hold_what_they_must(self) -> None:
        for pair in self.live:
            self.kind.check(pair.layer, pair.oracle)
            assert self.kind.counts_bytes(pair.layer, pair.oracle, 4)
            assert pair.layer.nbytes <= pair.layer.nbytes_reserved


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_verbs(kind: Kind) -> None:
    machine = type(f"Machine_{kind.name}", (LayerMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=4,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
