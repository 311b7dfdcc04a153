"""The stability index and its window, against computations by hand."""

import math

import numpy as np
import pytest

from service.drift import Drift, SlidingCounts, WindowCounts, stability_indices


def stability_index(expected: list[int], actual: list[int]) -> float:
    starts = np.zeros(1, np.intp)
    (index,) = stability_indices(np.array(expected), np.array(actual), starts)
    return float(index)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_index_of_equal_shares_is_nothing() -> None:
    assert stability_index([10, 30, 0], [100, 300, 0]) == 0


def test_index_is_that_of_a_hand_computation() -> None:
    # Expected 50 % and 50 %, actual 80 % and 20 %.
    by_hand = (0.8 - 0.5) * math.log(0.8 / 0.5) + (0.2 - 0.5) * math.log(0.2 / 0.5)

    assert stability_index([500, 500], [80, 20]) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.4159, abs=1e-4)


def test_share_of_nothing_counts_as_one_in_ten_thousand() -> None:
    by_hand = (1 - 1e-4) * math.log(1 / 1e-4) + (1e-4 - 1) * math.log(1e-4)

    assert stability_index([70, 0], [0, 9]) == pytest.approx(by_hand)


def test_each_column_has_an_index_of_its_own() -> None:
    indices = stability_indices(
        np.array([500, 500, 10, 10, 10]), np.array([80, 20, 5, 5, 5]), np.array([0, 2])
    )

    assert indices == pytest.approx([0.4159, 0], abs=1e-4)


def test_window_forgets() -> None:
    clock = Clock()
    window = SlidingCounts(1, window_s=120, clock=clock)
    window.add(np.array([1]))
    clock.now += 60
    window.add(np.array([2]))
    assert window.total() == [3]

    clock.now += 55
    assert window.total() == [3]
    clock.now += 10
    assert window.total() == [2]
    clock.now += 10_000
    assert window.total() == [0]


def drift(clock: Clock) -> Drift:
    """Of one feature of two bins and one of two columns."""
    return Drift(
        "b1",
        expected={
            "a": [np.array([50, 50])],
            "two": [np.array([50, 50]), np.array([50, 50])],
        },
        places={"a": [np.array([0, 1])], "two": [np.array([0, 1]), np.array([2, 3])]},
        window=SlidingCounts(4, window_s=60, clock=clock),
    )


def test_no_index_is_made_of_too_few_values() -> None:
    drifting = drift(Clock())
    drifting.window.add(np.array([400, 99, 250, 249]))
    assert drifting.indices([drifting.told()]) == {}

    drifting.window.add(np.array([0, 1, 0, 1]))
    assert set(drifting.indices([drifting.told()])) == {"a", "two"}


def test_largest_index_of_the_columns_is_the_feature_s() -> None:
    drifting = drift(Clock())
    drifting.window.add(np.array([250, 250, 400, 100]))

    found = drifting.indices([drifting.told()])

    assert found["a"] == 0
    assert found["two"] == pytest.approx(0.4159, abs=1e-4)


def test_windows_of_workers_are_put_together_and_not_those_of_other_bundles() -> None:
    first, second = drift(Clock()), drift(Clock())
    first.window.add(np.array([400, 0, 250, 250]))
    second.window.add(np.array([0, 100, 250, 250]))
    other = WindowCounts("b0", np.array([9000, 0, 0, 9000], np.int64).tobytes())

    found = first.indices([first.told(), other, second.told()])

    # 80 % and 20 %, of 500 values together.
    assert found["a"] == pytest.approx(0.4159, abs=1e-4)
    assert first.indices([other]) == {}
