import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.datasets.bags import Bags, first_values, heaviest, slot_lists


def bags(*rows: list[tuple[int, float]]) -> Bags:
    flat = [(r, i, w) for r, row in enumerate(rows) for i, w in row]
    return Bags(
        rows=np.array([r for r, _, _ in flat], np.int64),
        ids=np.array([i for _, i, _ in flat], np.int64),
        weights=np.array([w for _, _, w in flat], np.float64),
        num_rows=len(rows),
    )


def test_first_values_keeps_the_first_and_counts_the_others() -> None:
    ids, weights, more = first_values(bags([(7, 0.5), (8, 1.0)], [], [(9, 2.0)]))

    assert ids.to_list() == [7, None, 9]
    assert weights.to_list() == [0.5, None, 2.0]
    assert more == 1


def test_heaviest_orders_by_weight_and_equal_ones_as_they_came() -> None:
    columns = heaviest(bags([(1, 1.0), (2, 3.0), (3, 3.0)], [(4, 0.0)], []), 2)

    assert [column.to_list() for column in columns] == [[2, 4, None], [3, None, None]]


@pytest.mark.parametrize(
    ("row", "slots", "expected"),
    [
        # 6, 3, 1 of 10 in ten places.
        ([(1, 3.0), (2, 1.0), (3, 6.0)], 10, [3] * 6 + [1] * 3 + [2]),
        # Quotas 2.4, 1.2, 0.4 of 4: two and one whole places, the last to the largest remainder.
        ([(1, 6.0), (2, 3.0), (3, 1.0)], 4, [1, 1, 1, 2]),
        # Equal weights that fit have one place each.
        ([(1, 2.0), (2, 2.0)], 10, [1, 2]),
        # Equal weights that do not fit: the first ones.
        ([(1, 1.0), (2, 1.0), (3, 1.0)], 2, [1, 2]),
        # All weights 0 count as equal.
        ([(1, 0.0), (2, 0.0)], 4, [1, 2]),
        # A weight of 0 beside others has none.
        ([(1, 0.0), (2, 2.0)], 4, [2, 2, 2, 2]),
        # 0.1 + 0.2 of 0.3 in three places, in spite of rounding.
        ([(1, 0.1), (2, 0.2)], 3, [2, 2, 1]),
    ],
)
def test_places_go_in_proportion_to_weight(
    row: list[tuple[int, float]], slots: int, expected: list[int]
) -> None:
    assert slot_lists(bags(row), slots=slots).to_list() == [expected]


def test_row_without_values_has_no_list() -> None:
    lists = slot_lists(bags([], [(5, 1.0)], []), slots=3)

    assert lists.to_list() == [None, [5], None]
    assert lists.dtype == pl.List(pl.Int64)


weighted = st.lists(st.tuples(st.integers(0, 99), st.floats(0.0, 1e6, width=32)), max_size=30)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(weighted, min_size=1, max_size=4), slots=st.integers(1, 40))
def test_mean_over_places_is_the_weighted_mean_to_within_a_place(
    rows: list[list[tuple[int, float]]], slots: int
) -> None:
    rows = [[(k, w) for k, (_, w) in enumerate(row)] for row in rows]

    lists = slot_lists(bags(*rows), slots=slots).to_list()

    for row, places in zip(rows, lists, strict=True):
        if not row:
            assert places is None
            continue
        total = sum(w for _, w in row)
        shares = [w / total if total else 1.0 / len(row) for _, w in row]
        assert 0 < len(places) <= slots
        for (value, _), share in zip(row, shares, strict=True):
            assert abs(places.count(value) / len(places) - share) < 1.0 / len(places) + 1e-6
