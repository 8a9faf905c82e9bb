"""What is guessed about axes, from no sample, one, or several."""

import pytest

from mnemon.errors import ExportError
from mnemon.export.axes import guess

ROLES = {
    "input_ids": ("batch", "query"),
    "attention_mask": ("batch", "total"),
    "past_key_values.0.key": ("batch", 2, "past", 16),
}


def shapes(
    batch: int, past: int, query: int, **more: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    return {
        "input_ids": (batch, query),
        "attention_mask": (batch, past + query),
        "past_key_values.0.key": (batch, 2, past, 16),
        **more,
    }


def test_zero_one_and_two_samples_say_the_same() -> None:
    expected = {
        "input_ids": ("batch", "query"),
        "attention_mask": ("batch", "past + query"),
        "past_key_values.0.key": ("batch", 2, "past", 16),
    }
    for samples in ([], [shapes(1, 5, 1)], [shapes(1, 5, 1), shapes(2, 7, 3)]):
        assert guess(ROLES, samples).summary() == expected


def test_axes_without_a_role_are_joined_by_the_samples() -> None:
    samples = [
        shapes(2, 5, 3, token_type_ids=(2, 3), both=(8, 4), other=(9, 4)),
        shapes(3, 7, 4, token_type_ids=(3, 4), both=(11, 4), other=(5, 4)),
    ]
    found = guess(ROLES, samples).summary()
    assert found["token_type_ids"] == ("batch", "query")
    assert found["both"] == ("past + query", 4)
    assert found["other"] == ("other_0", 4)


def test_a_sum_of_other_axes_is_found() -> None:
    samples = [shapes(2, 5, 3, x=(5,)), shapes(4, 7, 3, x=(7,)), shapes(4, 9, 5, x=(9,))]
    assert guess(ROLES, samples).summary()["x"] == ("past",)
    samples = [shapes(2, 5, 3, x=(7,)), shapes(4, 7, 3, x=(11,)), shapes(4, 9, 5, x=(13,))]
    assert guess(ROLES, samples).summary()["x"] == ("batch + past",)


def test_equal_axes_without_a_role_are_one() -> None:
    samples = [shapes(2, 5, 3, x=(17, 4), y=(17,)), shapes(2, 5, 3, x=(19, 4), y=(19,))]
    found = guess(ROLES, samples).summary()
    assert found["x"] == ("x_0", 4)
    assert found["y"] == ("x_0",)


def test_a_sample_without_a_cache_beside_one_with() -> None:
    without = {name: size for name, size in shapes(2, 0, 5).items() if "past" not in name}
    assert guess(ROLES, [without, shapes(2, 5, 1)]).summary() == guess(ROLES, []).summary()


def test_what_equals_past_may_be_nothing() -> None:
    samples = [shapes(2, 5, 3, x=(5,)), shapes(2, 7, 3, x=(7,))]
    assert guess(ROLES, samples).of("x")[0].low == 0


@pytest.mark.parametrize("bound", [4.5, None, (1, 2, 3), "1", True])
def test_ranges_that_are_none(bound: object) -> None:
    with pytest.raises(ExportError, match="expected a size"):
        guess(ROLES, [], {"past": bound})  # type: ignore[dict-item]


def test_one_sample_leaves_an_unknown_axis_static() -> None:
    (axis,) = guess(ROLES, [shapes(2, 5, 3, x=(9,))]).of("x")
    assert axis.size == 9
    assert "one sample" in axis.evidence


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({**shapes(2, 5, 3), "input_ids": (3, 3)}, r"'batch' is 3 in input_ids\[0\] and 2 in"),
        ({**shapes(2, 0, 3), "attention_mask": (2, 9)}, r"is 9; past \+ query = 0 \+ 3 = 3"),
        ({**shapes(2, 5, 3), "attention_mask": (2, 9)}, r"is 9; past \+ query = 5 \+ 3 = 8"),
        ({**shapes(2, 5, 3), "past_key_values.0.key": (2, 4, 5, 16)}, "another model's sample"),
        ({**shapes(2, 5, 3), "input_ids": (2, 3, 1)}, "2 axes were expected"),
    ],
)
def test_samples_that_contradict_themselves(
    sample: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        guess(ROLES, [sample])


def test_ranges_pin_and_bound() -> None:
    found = guess(ROLES, [], {"batch": 1, "past": (2, 64)})
    assert found.summary()["attention_mask"] == (1, "past + query")
    past = found.symbols["past"]
    assert (past.low, past.high) == (2, 64)
    by_axis = guess(ROLES, [], {"input_ids[0]": 1})
    assert by_axis.summary() == guess(ROLES, [], {"batch": 1}).summary()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"batch": 3}, r"input_ids\[0\] is 2 in a sample; ranges allows 3"),
        ({"past": (6, 9)}, "is 5 in a sample; ranges allows 6 to 9"),
        ({"total": 8}, "bound its terms instead"),
        ({"bach": 1}, "known are batch, past, query"),
        ({"past_key_values.0.key[1]": 3}, "it is 2"),
        ({"batch": 2, "input_ids[0]": 4}, "says 2 and 4"),
        ({"query": (5, 3)}, "least, most"),
    ],
)
def test_ranges_that_contradict(ranges: dict[str, int], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        guess(ROLES, [shapes(2, 5, 3)], ranges)


def test_a_window_bounds_what_is_stored_and_not_the_mask() -> None:
    highs = {"past": 5}
    beyond = {**shapes(2, 5, 3), "attention_mask": (2, 20)}
    assert guess(ROLES, [beyond], None, highs).symbols["past"].high == 5
    with pytest.raises(ExportError, match="is 20"):
        guess(ROLES, [{**shapes(2, 4, 3), "attention_mask": (2, 20)}], None, highs)
    with pytest.raises(ExportError, match="the model itself goes up to 5"):
        guess(ROLES, [], {"past": (0, 9)}, highs)
