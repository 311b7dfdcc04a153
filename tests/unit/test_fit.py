import datetime as dt
from typing import Any

import numpy as np
import pytest

from model.contract.columns import Dictionary
from model.contract.encode import Encoder
from model.contract.errors import EncodeError
from model.contract.spec import FittedSchema, parse_schema
from model.fit import fit_schema

DAY = 86_400
NOW = 1_700_049_600.0

FEATURES: dict[str, dict[str, Any]] = {
    "town": {"kind": "categorical", "scope": "user", "source": "store"},
    "trips": {"kind": "numeric", "scope": "user", "source": "store"},
    "brand": {"kind": "categorical", "scope": "item", "source": "items"},
    "price": {
        "kind": "numeric",
        "scope": "item",
        "source": "items",
        "log1p": True,
        "minimum": 0,
        "maximum": 100,
    },
    "bought": {"kind": "match", "attribute": "brand"},
}


def fit(
    *,
    request: dict[str, Any] | None = None,
    candidate: dict[str, Any] | None = None,
    request_of: list[int] | None = None,
    num_rows: int = 4,
    **changes: dict[str, Any],
) -> FittedSchema:
    """Fits the features above, changed by name; one request per row unless told."""
    schema = parse_schema(
        {
            "steps": [{"name": "a", "label": "a"}, {"name": "b", "label": "b"}],
            "features": [
                {"name": name, **content, **changes.get(name, {})}
                for name, content in FEATURES.items()
            ],
        }
    )
    rows = list(range(num_rows)) if request_of is None else request_of
    return fit_schema(
        schema,
        request_columns=request or {},
        candidate_columns=candidate or {},
        request_time=np.full(max(rows) + 1, NOW),
        request_of=np.array(rows, np.int64),
    )


def test_vocabulary_is_by_falling_count_then_by_text() -> None:
    fitted = fit(candidate={"brand": ["b", "a", "c", "c", None, ""]}, num_rows=6)

    assert fitted.vocabularies["brand"] == ("c", "a", "b")


def test_ids_of_several_types_are_counted_as_one() -> None:
    fitted = fit(candidate={"brand": [7, "7", 7.0, "a"]})

    assert fitted.vocabularies["brand"] == ("7", "a")


def test_rare_values_are_left_out() -> None:
    fitted = fit(candidate={"brand": ["a", "a", "b", "c"]}, brand={"min_count": 2})

    assert fitted.vocabularies["brand"] == ("a",)


def test_only_the_most_frequent_values_are_kept() -> None:
    fitted = fit(candidate={"brand": ["b", "b", "c", "a"]}, brand={"max_size": 2})

    assert fitted.vocabularies["brand"] == ("b", "a")


def test_dictionary_column_counts_as_the_list_it_stands_for() -> None:
    dictionary = Dictionary(values=["x", "y", 7], index=np.array([1, 1, -1, 2], np.int64))

    assert fit(candidate={"brand": dictionary}).vocabularies["brand"] == ("y", "7")


@pytest.mark.parametrize(
    "column",
    [["x", "y"], Dictionary(values=["x", "y"], index=np.array([0, 1], np.int64))],
)
def test_request_values_count_once_per_impression(column: Any) -> None:
    fitted = fit(request={"town": column}, request_of=[0, 1, 1, 1])

    assert fitted.vocabularies["town"] == ("y", "x")


@pytest.mark.parametrize("value", [True, 1.5, dt.date(2024, 1, 1)])
def test_value_that_is_no_id_is_named_with_its_feature(value: object) -> None:
    with pytest.raises(EncodeError, match="feature 'brand': expected an id"):
        fit(candidate={"brand": ["a", value, "b", "c"]})


def test_feature_without_a_column_has_an_empty_vocabulary() -> None:
    assert fit().vocabularies == {"town": (), "brand": ()}


def test_moments_are_of_present_values_and_of_all_rows() -> None:
    fitted = fit(candidate={"price": [0.0, np.expm1(1.0), np.expm1(2.0), None]})

    # log1p gives 0, 1, 2: mean 1, deviations -1, 0, 1 and 0 for the missing: variance 1/2.
    price, flag = fitted.moments["price"], fitted.moments["price_missing"]
    assert price.mean == pytest.approx(1.0)
    assert price.std == pytest.approx(0.5**0.5)
    assert flag.mean == 0.25
    assert flag.std == pytest.approx((0.25 * 0.75) ** 0.5)


def test_moments_are_of_clipped_values() -> None:
    moments = fit(candidate={"price": [1e9, 1e9, -5.0, -5.0]}).moments["price"]

    assert moments.mean == pytest.approx(np.log1p(100.0) / 2)


def test_request_moments_count_once_per_impression() -> None:
    fitted = fit(request={"trips": [1.0, 5.0]}, request_of=[0, 1, 1, 1])

    assert fitted.moments["trips"].mean == 4.0


def test_constant_column_is_not_blown_up() -> None:
    moments = fit(candidate={"price": [3.0] * 4}).moments

    assert (moments["price"].std, moments["price_missing"].std) == (1.0, 1.0)


def test_nearly_constant_column_is_scaled_by_no_less_than_the_floor() -> None:
    prices = np.full(1000, 3.0)
    prices[0] = 3.001

    assert fit(candidate={"price": prices}, num_rows=1000).moments["price"].std == 0.03


def test_column_of_nothing_is_missing_everywhere() -> None:
    moments = fit(candidate={"price": [None] * 4}).moments

    assert (moments["price"].mean, moments["price"].std) == (0.0, 1.0)
    assert (moments["price_missing"].mean, moments["price_missing"].std) == (1.0, 1.0)


def test_match_moments_are_of_log_counts_and_log_days() -> None:
    fitted = fit(
        candidate={
            "bought_count": np.array([np.expm1(1.0), np.expm1(3.0), np.nan, 4.0]),
            "bought_last_time": np.array([NOW, NOW - np.expm1(2.0) * DAY, np.nan, NOW + 1]),
        }
    )

    # The last is after the request: it does not count.
    assert fitted.moments["bought_count"].mean == pytest.approx(2.0)
    assert fitted.moments["bought_days"].mean == pytest.approx(1.0, abs=1e-6)
    assert fitted.moments["bought_missing"].mean == 0.5


def test_columns_that_are_not_there_have_no_moments() -> None:
    assert fit().moments == {}


def test_encoded_training_columns_are_standardised() -> None:
    rng = np.random.default_rng(0)
    prices = np.where(rng.random(500) < 0.3, np.nan, rng.lognormal(1.0, 1.0, 500))
    candidate = {"price": prices, "brand": ["a"] * 500}
    fitted = fit(candidate=candidate, num_rows=500)
    encoder = Encoder(fitted)

    dense = encoder.candidate_block(candidate, time=np.full(500, NOW)).dense

    for name in ("price", "price_missing"):
        column = dense[:, encoder.candidate_layout.dense_columns.index(name)].astype(np.float64)
        assert column.mean() == pytest.approx(0.0, abs=1e-5)
        assert column.std() == pytest.approx(1.0, abs=1e-5)


def test_log_only_feature_is_fitted_on_what_was_logged() -> None:
    position = {"source": "log_only", "serving_value": 1.0, "scope": "cross"}

    fitted = fit(candidate={"price": [0.0, np.expm1(4.0)] * 2}, price=position)

    assert fitted.moments["price"].mean == pytest.approx(2.0)
