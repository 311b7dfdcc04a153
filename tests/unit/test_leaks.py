import math

import numpy as np
import polars as pl
import pytest

from model.contract.columns import Dictionary
from model.leaks import (
    Values,
    column_values,
    determines,
    is_position,
    num_units,
    presence,
    rank_auc,
    rate_by_value,
    separation,
    series_values,
    stability_index,
)

RNG = np.random.default_rng(3)
N = 4000
POSITIVE = RNG.random(N) < 0.1
NOISE = RNG.normal(size=N)


def numbers(values: object) -> Values:
    return Values(numbers=np.asarray(values, np.float64))


def test_rank_auc_counts_ties_half() -> None:
    # Pairs (positive, negative): 2 > 1, 2 = 2, 3 > 1, 3 > 2: 3.5 of 4.
    area = rank_auc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))

    assert area == 3.5 / 4
    assert math.isnan(rank_auc(np.array([1.0]), np.array([True])))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_separates_whichever_way_it_runs(sign: float) -> None:
    area = separation(numbers(sign * (POSITIVE * 3.0 + NOISE)), POSITIVE)

    # Two normals 3 deviations apart: the AUC is Phi(3 / sqrt(2)) = 0.983.
    assert area == pytest.approx(0.983, abs=0.01)


def test_a_number_that_separates_at_both_ends_is_seen() -> None:
    values = np.where(POSITIVE, 5.0 * np.sign(NOISE), NOISE.clip(-4, 4))

    area = separation(numbers(values), POSITIVE)

    assert area is not None
    assert area > 0.95


def test_noise_and_ids_new_in_each_row_do_not_separate() -> None:
    ids = Values(codes=np.arange(N), names=tuple(map(str, range(N))))

    for values in (numbers(NOISE), ids):
        area = separation(values, POSITIVE)
        assert area is not None
        assert area < 0.6


def test_too_few_rows_are_not_judged() -> None:
    positive = np.arange(N) < 5

    assert separation(numbers(positive), positive) is None
    assert presence(numbers(np.where(positive, 1.0, np.nan)), positive) is None
    assert not determines(numbers(positive), positive)


def test_a_copy_of_the_label_decides_it_also_as_text() -> None:
    text = Values(codes=POSITIVE.astype(np.int64), names=("no", "yes"))

    assert determines(numbers(POSITIVE), POSITIVE)
    assert determines(text, POSITIVE)
    one_off = POSITIVE.copy()
    one_off[0] = ~one_off[0]
    assert not determines(numbers(one_off), POSITIVE)


def test_a_column_filled_with_the_label_only_decides_it() -> None:
    assert determines(numbers(np.where(POSITIVE, NOISE, np.nan)), POSITIVE)


def test_presence_tells_the_shares_where_the_label_decides_it() -> None:
    filled = np.where(POSITIVE, np.arange(N) % 5 != 0, np.arange(N) % 50 == 0)

    shares = presence(numbers(np.where(filled, 1.0, np.nan)), POSITIVE)

    assert shares is not None
    assert shares[0] == pytest.approx(0.8, abs=0.05)
    assert shares[1] == pytest.approx(0.02, abs=0.005)


def test_presence_that_merely_differs_is_no_sign() -> None:
    filled = np.where(POSITIVE, np.arange(N) % 10 < 6, np.arange(N) % 10 < 2)

    assert presence(numbers(np.where(filled, 1.0, np.nan)), POSITIVE) is None


def test_position_counts_through_each_request() -> None:
    request = np.repeat(np.arange(100), 5)
    places = np.concatenate([np.random.default_rng(k).permutation(5) + 1 for k in range(100)])

    assert is_position(numbers(places), request)
    text = Values(codes=places - 1, names=("1", "2", "3", "4", "5"))
    assert is_position(text, request)


@pytest.mark.parametrize(
    "values",
    [
        np.tile([1, 1, 2, 2, 3], 100),  # places are there twice
        np.tile([1, 2, 4, 8, 16], 100),  # not neighbours
        np.arange(500),  # ids in a row, which begin anywhere
        np.tile([1.5, 2.5, 3.5, 4.5, 5.5], 100),
    ],
)
def test_other_numbers_are_no_positions(values: np.ndarray) -> None:
    assert not is_position(numbers(values), np.repeat(np.arange(100), 5))


def test_rates_are_of_the_lowest_and_highest_common_value() -> None:
    values = np.repeat([1.0, 2.0, 9.0], [100, 100, 1])
    positive = np.arange(201) < 50

    assert rate_by_value(numbers(values), positive) == ("1", 0.5, "2", 0.0)


def test_stability_index_of_two_values() -> None:
    # p = 0.5, 0.5 and q = 0.8, 0.2: 0.3 ln(1.6) - 0.3 ln(0.4) = 0.416.
    before = Values(codes=np.arange(100_000) % 2, names=("a", "b"))
    after = Values(codes=(np.arange(100_000) % 10 < 8).astype(np.int64), names=("b", "a"))

    assert stability_index(before, after, units=(100_000, 100_000)) == pytest.approx(
        0.416, abs=0.001
    )


def test_stability_index_of_one_distribution_is_near_nothing() -> None:
    draws = np.random.default_rng(1).normal(size=600)

    index = stability_index(numbers(draws[:300]), numbers(draws[300:]), units=(300, 300))

    assert index == 0.0


def test_a_few_users_with_one_value_each_are_few_facts() -> None:
    # Ten users of a thousand rows: nine against five of one gender are chance.
    user = np.repeat(np.arange(10), 1000)
    before = Values(codes=(user < 9).astype(np.int64), names=("f", "m"))
    after = Values(codes=(user < 5).astype(np.int64), names=("f", "m"))
    request = np.arange(10_000)

    units = num_units(before, user=user, request=request)

    assert units == 10
    assert num_units(numbers(np.arange(10_000)), user=user, request=request) == 10_000
    assert stability_index(before, after, units=(10_000, 10_000)) > 0.7
    assert stability_index(before, after, units=(units, units)) == 0.0


def test_stability_index_sees_missing_values() -> None:
    gone = np.where(np.arange(N) % 2 == 0, np.nan, NOISE)

    assert stability_index(numbers(NOISE), numbers(gone), units=(N, N)) > 1.0


def test_values_come_from_columns_and_series_alike() -> None:
    rows = np.array([2, 0])
    text = column_values(Dictionary(values=["a", "b"], index=np.array([0, 1, -1])), rows)
    assert text is not None
    assert text.codes is not None
    assert text.codes.tolist() == [-1, 0]
    assert column_values([["a"]], rows) is None
    series = series_values(pl.Series(["a", None, "b"]))
    assert series is not None
    assert series.is_present.tolist() == [True, False, True]
    assert series_values(pl.Series([[1]])) is None
