"""Which tokens a cache holds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.token_log import PADDING, UNKNOWN, TokenLog


def log_of(*rows: list[int]) -> TokenLog:
    return TokenLog.of(torch.tensor(rows))


def test_empty() -> None:
    log = TokenLog()
    assert len(log) == 0
    assert log.batch_size == -1
    assert log.tensor().shape == (1, 0)
    assert log.tensor(3, 2).tolist() == [[UNKNOWN] * 3] * 2
    log.gather(torch.tensor([0, 0]))
    log.crop_to(0)
    assert len(log.fork()) == 0


def test_record_masks_gaps_and_rewrites() -> None:
    log = TokenLog()
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    log.record(ids, torch.tensor([[1, 1, 1], [0, 1, 1]]), 0)
    ids.zero_()  # the caller's tensor is the caller's
    assert log.tensor().tolist() == [[4, 5, 6], [PADDING, 8, 9]]
    log.record(torch.tensor([[1], [2]]), None, 5)
    assert log.tensor().tolist() == [[4, 5, 6, -1, -1, 1], [PADDING, 8, 9, -1, -1, 2]]
    log.record(torch.tensor([[3], [3]]), None, 1)  # went back and took another way
    assert log.tensor().tolist() == [[4, 3], [PADDING, 3]]
    assert log.tensor(4).tolist() == [[4, 3, -1, -1], [PADDING, 3, -1, -1]]
    assert log.tensor(1).tolist() == [[4], [PADDING]]


def test_the_callers_tensor_is_copied() -> None:
    log, ids = TokenLog(), torch.tensor([[4, 5]])
    log.record(ids, None, 0)
    ids.fill_(9)
    assert log.tensor().tolist() == [[4, 5]]


def test_one_row_serves_a_batch() -> None:
    log = log_of([1, 2])
    log.record(torch.tensor([[3], [4]]), None, 2)
    assert log.tensor().tolist() == [[1, 2, 3], [1, 2, 4]]


def test_merge_pads_on_the_left() -> None:
    merged = TokenLog.merge([torch.tensor([[1]]), torch.tensor([[2, 3, 4], [5, 6, 7]])])
    assert merged.tensor().tolist() == [[PADDING, PADDING, 1], [2, 3, 4], [5, 6, 7]]


def test_forks_are_independent() -> None:
    log = log_of([1, 2, 3])
    fork = log.fork()
    log.crop_to(1)
    log.record(torch.tensor([[9]]), None, 1)
    fork.record(torch.tensor([[4]]), None, 3)
    assert log.tensor().tolist() == [[1, 9]]
    assert fork.tensor().tolist() == [[1, 2, 3, 4]]


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("record"), st.lists(st.integers(0, 9), max_size=4)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
        st.tuples(st.just("read"), st.none()),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(_STEPS)
def test_like_a_list(steps: list[tuple[str, object]]) -> None:
    log, expected = TokenLog(), []
    for verb, value in steps:
        if verb == "record" and value:
            log.record(torch.tensor([value]), None, len(expected))
            expected += value
        elif verb == "crop":
            del expected[value:]
            log.crop_to(value)
        assert len(log) == len(expected)
        if verb == "read":
            assert log.tensor().tolist() == [expected]
    assert log.tensor().tolist() == [expected]
