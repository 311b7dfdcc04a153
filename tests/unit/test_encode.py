from typing import Any

import numpy as np
import pytest
import tiny
from tiny import DAY, NOON

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.columns import Dictionary, Ragged
from model.contract.encode import Encoder
from model.contract.errors import EncodeError
from model.contract.ids import NO_KEY
from model.contract.spec import FittedSchema, Moments, parse_schema
from model.contract.store_columns import StoreColumns
from model.contract.times import parse_time

ENCODER = Encoder(tiny.fitted_schema())
TRAINING_ENCODER = Encoder(tiny.fitted_schema(), serving=False)
# Codes by hand: 0 padding, 1 missing, 2 unknown, 3 the first of a vocabulary.
PADDING, MISSING, UNKNOWN, FIRST = 0, 1, 2, 3


def requests(time: float = NOON, **columns: list[Any]) -> RequestBlock:
    num_rows = len(next(iter(columns.values()))) if columns else 1
    return ENCODER.request_block(columns, time=np.full(num_rows, time))


def candidates(*, time: float = NOON, encoder: Encoder = ENCODER, **columns: Any) -> CandidateBlock:
    num_rows = len(next(iter(columns.values()))) if columns else 1
    return encoder.candidate_block(columns, time=np.full(num_rows, time))


def code(name: str, value: object, *, encoder: Encoder = ENCODER) -> int:
    return int(encoder.encode_ids(name, [value])[0])


def dense(name: str, block: RequestBlock | CandidateBlock) -> list[float]:
    """One dense column by name, rounded to what float32 holds."""
    is_request = isinstance(block, RequestBlock)
    layout = ENCODER.request_layout if is_request else ENCODER.candidate_layout
    column = block.dense[:, layout.dense_columns.index(name)]
    return [float(value) for value in column.astype(np.float64).round(5)]


def time_codes(text: str, *, zone: str = "Europe/Berlin") -> tuple[int, int]:
    """Hour and weekday (Monday 0) of a request, without the first code."""
    fitted = FittedSchema(
        schema=parse_schema({**tiny.SCHEMA_CONTENT, "time_zone": zone}),
        vocabularies=tiny.VOCABULARIES,
        moments={},
    )
    encoder = Encoder(fitted)
    block = encoder.request_block({}, time=np.array([parse_time(text)]))
    hour, weekday = (encoder.request_layout.ids.index(name) for name in ("hour", "weekday"))
    return int(block.ids[0, hour]) - FIRST, int(block.ids[0, weekday]) - FIRST


@pytest.mark.parametrize(
    ("value", "expected"),
    [("acme", 3), ("bolt", 4), ("7", 5), (7, 5), (7.0, 5), (b"acme", 3), ("ACME", UNKNOWN)],
)
def test_categorical_value_has_its_place_in_the_vocabulary(value: object, expected: int) -> None:
    assert code("brand", value) == expected


@pytest.mark.parametrize("value", [None, "", float("nan"), np.float32("nan")])
def test_missing_categorical_value_is_not_unknown(value: object) -> None:
    assert code("brand", value) == MISSING


def test_missing_categorical_value_takes_the_default() -> None:
    assert code("loyalty", None) == 3  # "none"
    assert code("loyalty", "silver") == UNKNOWN


# XXH64 of "123" is 13969215623426084738, 80 modulo 97; of "acme" 3938960829757561303, 66 modulo 97.
@pytest.mark.parametrize(("value", "expected"), [(123, 83), ("123", 83), ("acme", 69)])
def test_hashed_value_falls_into_its_bucket(value: object, expected: int) -> None:
    assert code("item_id", value) == expected


def test_missing_hashed_value_has_its_own_code() -> None:
    assert code("item_id", None) == MISSING


def test_codes_of_a_feature_fill_its_table() -> None:
    sizes = {name: ENCODER.table_size(name) for name in ("brand", "item_id", "hour", "weekday")}

    assert sizes == {"brand": 6, "item_id": 100, "hour": 27, "weekday": 10}


def test_ids_lie_within_their_tables() -> None:
    block = candidates(item_id=list(range(-500, 500)), brand=[f"b{i}" for i in range(1000)])

    sizes = [ENCODER.table_size(name) for name in ENCODER.candidate_layout.ids]
    assert (block.ids > PADDING).all()
    assert (block.ids < sizes).all()


# (log1p(2.5) - 1.2) / 0.7; limits are 0 and 1000: (log1p(0) - 1.2) / 0.7, (log1p(1000) - 1.2) / 0.7
@pytest.mark.parametrize(
    ("value", "expected"), [(2.5, 0.07538), (-3, -1.71429), (5000, 8.15536), (1000, 8.15536)]
)
def test_numeric_value_is_clipped_logged_and_standardised(value: float, expected: float) -> None:
    block = candidates(price=[value])

    assert dense("price", block) == [expected]
    assert dense("price_missing", block) == [0.0]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_missing_number_is_zero_and_says_so(value: float | None) -> None:
    block = candidates(price=[value])

    assert dense("price", block) == [0.0]
    assert dense("price_missing", block) == [1.0]


def test_missing_number_takes_the_default_and_is_not_missing() -> None:
    block = requests(basket=[None, 5])

    assert dense("basket", block) == [3.0, 5.0]
    assert dense("basket_missing", block) == [0.0, 0.0]


def test_missing_flags_are_standardised_too() -> None:
    fitted = tiny.fitted_schema()
    moments = {**fitted.moments, "price_missing": Moments(mean=0.2, std=0.4)}
    encoder = Encoder(
        FittedSchema(schema=tiny.schema(), vocabularies=tiny.VOCABULARIES, moments=moments)
    )

    block = candidates(encoder=encoder, price=[None, 1.0])

    assert dense("price_missing", block) == [2.0, -0.5]


# log1p of 3 days, of 0, of a quarter of a day
@pytest.mark.parametrize(
    ("stored", "expected"), [(NOON - 3 * DAY, 1.38629), (NOON, 0.0), (NOON - 21_600, 0.22314)]
)
def test_elapsed_is_days_before_the_request(stored: float, expected: float) -> None:
    block = requests(last_trip=[stored])

    assert dense("last_trip", block) == [expected]
    assert dense("last_trip_missing", block) == [0.0]


def test_stored_time_after_the_request_is_ignored() -> None:
    block = requests(last_trip=[NOON + 1])

    assert dense("last_trip", block) == [0.0]
    assert dense("last_trip_missing", block) == [1.0]


@pytest.mark.parametrize(
    ("text", "hour", "weekday"),
    [
        ("2023-11-15T12:00:00Z", 13, 2),  # Wednesday, winter: one hour ahead
        ("2023-07-15T12:00:00Z", 14, 5),  # Saturday, summer: two
        ("2023-11-12T22:59:59Z", 23, 6),  # Sunday's last second
        ("2023-11-12T23:00:00Z", 0, 0),  # Monday's first
        ("2024-03-31T00:59:59Z", 1, 6),  # clocks jump from 2 to 3 a second later
        ("2024-03-31T01:00:00Z", 3, 6),
        ("2024-10-27T00:59:59Z", 2, 6),  # the hour from 2 to 3 comes twice
        ("2024-10-27T01:00:00Z", 2, 6),
        ("2024-10-27T02:00:00Z", 3, 6),
        ("1969-12-31T23:30:00Z", 0, 3),  # Thursday, before 1970
    ],
)
def test_time_parts_are_local_with_daylight_saving(text: str, hour: int, weekday: int) -> None:
    assert time_codes(text) == (hour, weekday)


@pytest.mark.parametrize(
    ("text", "zone", "hour", "weekday"),
    [
        ("2023-11-15T18:14:59Z", "Asia/Kathmandu", 23, 2),  # 5 h 45 min ahead
        ("2023-11-15T18:15:00Z", "Asia/Kathmandu", 0, 3),
        ("2023-11-15T04:59:59Z", "America/New_York", 23, 1),
        ("2023-11-15T12:00:00Z", "UTC", 12, 2),
    ],
)
def test_time_parts_follow_the_schema_s_zone(text: str, zone: str, hour: int, weekday: int) -> None:
    assert time_codes(text, zone=zone) == (hour, weekday)


@pytest.mark.parametrize("time", [1e15, -1e15, np.nan])
def test_time_outside_the_calendar_is_refused(time: float) -> None:
    with pytest.raises(EncodeError, match="feature 'time'"):
        requests(time)


def test_history_is_cut_to_its_length_and_padded() -> None:
    times = [[NOON - 1 - i for i in range(5)], [NOON - 1], []]
    block = requests(recent=[[123, 123, "acme", "acme", 123], ["acme"], []], recent_time=times)

    assert block.history.tolist() == [[83, 83, 69, 69], [69, 0, 0, 0], [0, 0, 0, 0]]


def test_history_tells_padding_missing_and_unknown_apart() -> None:
    encoder = Encoder(
        FittedSchema(
            schema=parse_schema(
                {
                    **tiny.SCHEMA_CONTENT,
                    "features": [
                        {
                            "name": "brand",
                            "kind": "categorical",
                            "scope": "item",
                            "source": "items",
                        },
                        {"name": "recent", "kind": "history", "of": "brand", "max_length": 4},
                    ],
                }
            ),
            vocabularies={"brand": ("acme",)},
            moments={},
        )
    )

    block = encoder.request_block({"recent": [["acme", "unheard", None]]}, time=np.array([NOON]))

    assert block.history.tolist() == [[FIRST, UNKNOWN, MISSING, PADDING]]


def test_history_after_the_request_is_skipped_not_left_blank() -> None:
    block = requests(recent=[[1, 123, 2]], recent_time=[[NOON + 1, NOON, NOON + 5]])

    assert block.history.tolist() == [[83, 0, 0, 0]]


def test_history_without_times_counts_whole() -> None:
    assert requests(recent=[["acme", 123], None]).history.tolist() == [[69, 83, 0, 0], [0] * 4]


def test_ragged_history_equals_lists() -> None:
    ragged = Ragged(
        values=[123, "acme", 123],
        times=np.array([NOON - 1, NOON + 1, NOON]),
        offsets=np.array([0, 2, 2, 3]),
    )

    block = ENCODER.request_block({"recent": ragged}, time=np.full(3, NOON))

    as_lists = requests(
        recent=[[123, "acme"], None, [123]], recent_time=[[NOON - 1, NOON + 1], None, [NOON]]
    )
    assert block.history.tolist() == as_lists.history.tolist()


# (log1p(3) - 0.8) / 0.5, and log1p(12) as it has no moments
def test_match_is_log_count_and_log_days() -> None:
    block = candidates(bought_item_count=[3], bought_item_last_time=[NOON - 12 * DAY])

    assert dense("bought_item_count", block) == [1.17259]
    assert dense("bought_item_days", block) == [2.56495]
    assert dense("bought_item_missing", block) == [0.0]


@pytest.mark.parametrize(
    ("count", "last_time"),
    [
        (None, None),
        (0, NOON - DAY),
        (3, NOON + 1),  # after the request
        (3, None),
        (None, NOON - DAY),
        (float("nan"), float("nan")),
    ],
)
def test_match_without_an_earlier_event_is_missing(
    count: float | None, last_time: float | None
) -> None:
    block = candidates(bought_item_count=[count], bought_item_last_time=[last_time])

    assert dense("bought_item_count", block) == [0.0]
    assert dense("bought_item_days", block) == [0.0]
    assert dense("bought_item_missing", block) == [1.0]


def test_match_at_the_instant_of_the_request_is_zero_days_old() -> None:
    block = candidates(bought_item_count=[1], bought_item_last_time=[NOON])

    assert dense("bought_item_days", block) == [0.0]
    assert dense("bought_item_missing", block) == [0.0]


def test_match_older_than_max_age_days_is_missing() -> None:
    days = [90, 90.001]
    block = candidates(
        bought_brand_count=[1, 1], bought_brand_last_time=[NOON - d * DAY for d in days]
    )

    assert dense("bought_brand_missing", block) == [0.0, 1.0]


def test_count_without_its_last_time_is_refused() -> None:
    with pytest.raises(EncodeError, match="bought_item_last_time must be given together"):
        candidates(bought_item_count=[3])


def test_log_only_feature_is_fixed_when_serving() -> None:
    assert dense("position", candidates(position=[7, None])) == [1.0, 1.0]
    assert dense("position", candidates(price=[1.0])) == [1.0]


def test_log_only_feature_is_read_when_training() -> None:
    block = candidates(encoder=TRAINING_ENCODER, position=[7, None])

    assert dense("position", block) == [7.0, 0.0]
    assert dense("position_missing", block) == [0.0, 1.0]


@pytest.mark.parametrize("serving", [True, False])
def test_absent_columns_are_all_missing(serving: bool) -> None:
    encoder = Encoder(tiny.fitted_schema(), serving=serving)
    names = [
        *("age_band", "loyalty", "trips", "last_trip", "recent", "store_id", "basket"),
        *("visits", "visits_time", "visits_store_id"),
        *("item_id", "brand", "price", "display", "discount", "position"),
        *("bought_item_count", "bought_item_last_time"),
        *("bought_brand_count", "bought_brand_last_time"),
    ]
    nulls = {name: [None, None] for name in names}
    time = np.full(2, NOON)

    absent, null = encoder.request_block({}, time=time), encoder.request_block(nulls, time=time)
    absent_candidate, null_candidate = (
        encoder.candidate_block(columns, time=time) for columns in ({}, nulls)
    )

    np.testing.assert_array_equal(absent.ids, null.ids)
    np.testing.assert_array_equal(absent.dense, null.dense)
    np.testing.assert_array_equal(absent.history, null.history)
    np.testing.assert_array_equal(absent_candidate.ids, null_candidate.ids)
    np.testing.assert_array_equal(absent_candidate.dense, null_candidate.dense)


def test_columns_of_no_feature_are_ignored() -> None:
    block = candidates(price=[2.5], colour=["red"])

    np.testing.assert_array_equal(block.dense, candidates(price=[2.5]).dense)


def test_request_features_among_candidate_columns_are_ignored() -> None:
    assert candidates(price=[2.5], trips=["not a number"]).dense.shape == (1, 12)


def test_no_rows_give_blocks_of_no_rows() -> None:
    none: dict[str, list[Any]] = {"trips": [], "recent": [], "visits": [], "visits_time": []}
    block = ENCODER.request_block(none, time=np.zeros(0))

    assert block.ids.shape == (0, 5)
    assert block.dense.shape == (0, 34)  # 3 numbers and 14 of visits, a flag of each
    assert block.history.shape == (0, 4)


def test_dtypes_and_layout_are_what_onnx_takes() -> None:
    block = requests(trips=[1, 2])
    arrays = (block.ids, block.dense, block.history)

    assert [array.dtype for array in arrays] == [np.int64, np.float32, np.int64]
    assert all(array.flags.c_contiguous for array in arrays)


def test_dictionary_column_encodes_as_the_list_it_stands_for() -> None:
    dictionary = Dictionary(
        values=["bolt", "acme", 7.0], index=np.array([1, -1, 2, 0, 1], np.int64)
    )

    codes = ENCODER.encode_ids("brand", dictionary)

    assert codes.tolist() == [3, MISSING, 5, 4, 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([7, 8]), [5, UNKNOWN]),
        (np.array([7.0, np.nan]), [5, MISSING]),
        (np.array(["acme", ""]), [3, MISSING]),
        (np.array([b"acme", None], object), [3, MISSING]),
    ],
)
def test_numpy_column_encodes_as_the_list_it_stands_for(
    values: np.ndarray, expected: list[int]
) -> None:
    assert ENCODER.encode_ids("brand", values).tolist() == expected


@pytest.mark.parametrize(
    ("columns", "feature", "row"),
    [
        ({"price": [1.0, "2.5"]}, "price", 1),
        ({"price": [True]}, "price", 0),
        ({"price": [float("inf")]}, "price", 0),
        ({"price": [1.0, -1e31]}, "price", 1),
        ({"price": [10**400]}, "price", 0),
        ({"price": np.array([1.0, np.inf])}, "price", 1),
        ({"price": np.array([True])}, "price", 0),
        ({"brand": ["acme", 1.5]}, "brand", 1),
        ({"brand": [["acme"]]}, "brand", 0),
        ({"brand": [False]}, "brand", 0),
        ({"item_id": [{}]}, "item_id", 0),
        ({"item_id": ["\ud800"]}, "item_id", 0),
        (
            {"bought_item_count": ["3"], "bought_item_last_time": [NOON]},
            "bought_item_count",
            0,
        ),
        (
            {"bought_item_count": [3], "bought_item_last_time": ["today"]},
            "bought_item_last_time",
            0,
        ),
    ],
)
def test_wrong_candidate_value_is_named_with_its_row(
    columns: dict[str, Any], feature: str, row: int
) -> None:
    with pytest.raises(EncodeError) as caught:
        candidates(**columns)

    assert (caught.value.feature, caught.value.row) == (feature, row)


@pytest.mark.parametrize(
    ("columns", "feature"),
    [
        ({"trips": ["40"]}, "trips"),
        ({"last_trip": ["2023-11-15T12:00:00Z"]}, "last_trip"),
        ({"recent": ["123"]}, "recent"),
        ({"recent": [5]}, "recent"),
        ({"recent": [[True]]}, "recent"),
        ({"recent": [[1, 2]], "recent_time": [[NOON]]}, "recent"),
        ({"recent": [[1]], "recent_time": [NOON]}, "recent"),
        ({"recent": [[1]], "recent_time": [["today"]]}, "recent_time"),
        ({"age_band": [1.5]}, "age_band"),
    ],
)
def test_wrong_request_value_is_named(columns: dict[str, Any], feature: str) -> None:
    with pytest.raises(EncodeError) as caught:
        requests(**columns)

    assert caught.value.feature == feature


@pytest.mark.parametrize("name", ["trips", "recent"])
def test_column_of_a_wrong_form_is_refused(name: str) -> None:
    column = Dictionary(values=["a"], index=np.array([0], np.int64))

    with pytest.raises(EncodeError, match=f"feature '{name}'"):
        ENCODER.request_block({name: column}, time=np.array([NOON]))


def test_list_column_for_one_id_is_refused() -> None:
    ragged = Ragged(values=["a"], times=np.zeros(1), offsets=np.array([0, 1]))

    with pytest.raises(EncodeError, match="expected one id, got a list"):
        ENCODER.encode_ids("brand", ragged)


def test_inputs_are_not_changed() -> None:
    price, time = np.array([5000.0, np.nan]), np.full(2, NOON)

    ENCODER.candidate_block({"price": price}, time=time)

    assert price[0] == 5000.0
    assert time.tolist() == [NOON, NOON]


def test_blocks_do_not_share_their_default_rows() -> None:
    candidates(price=[1.0]).dense[:] = 99.0

    assert dense("price", candidates(price=[2.5])) == [0.07538]


def test_match_keys_are_hashes_of_the_candidates_attributes() -> None:
    keys = ENCODER.match_keys({"item_id": [123, None], "brand": ["acme", "acme"]}, num_rows=2)

    assert keys.tolist() == [
        [0xC1DC9F98F1260F82, 0x36AA6413121E41D7],
        [NO_KEY, 0x36AA6413121E41D7],
    ]


def test_match_keys_without_the_attribute_match_nothing() -> None:
    keys = ENCODER.match_keys({"brand": ["acme"]}, num_rows=1)

    assert keys.tolist() == [[NO_KEY, 0x36AA6413121E41D7]]


def test_store_columns_turn_a_row_into_one_without_a_record() -> None:
    stored = {
        "age_band": ["65+"],
        "trips": [40],
        "last_trip": [NOON - DAY],
        "recent": [[123, "acme"]],
        "visits": [[4.0, 25.0]],
        "visits_time": [[NOON - DAY, NOON - 3 * DAY]],
        "visits_store_id": [["31", "8"]],
    }
    asked = {"loyalty": ["gold"], "store_id": ["31"], "basket": [9]}
    matches = {
        f"bought_{name}_{part}": [value]
        for name in ("item", "brand")
        for part, value in (("count", 3), ("last_time", NOON - DAY))
    }
    known = {"item_id": ["123"], "brand": ["acme"], "price": [2.5], "discount": [0.5]}
    columns = StoreColumns.of(ENCODER)

    request = requests(**stored, **asked)
    request.ids[:, columns.request_ids] = columns.request_id_values
    request.dense[:, columns.request_dense] = columns.request_dense_values
    request.history[:, columns.request_history] = 0
    candidate = candidates(**known, **matches)
    candidate.dense[:, columns.candidate_dense] = columns.candidate_dense_values

    without = requests(**asked)
    np.testing.assert_array_equal(request.ids, without.ids)
    np.testing.assert_array_equal(request.dense, without.dense)
    np.testing.assert_array_equal(request.history, without.history)
    np.testing.assert_array_equal(candidate.dense, candidates(**known).dense)


def test_feeds_leave_out_inputs_of_no_width() -> None:
    fitted = FittedSchema(
        schema=parse_schema(
            {
                "steps": tiny.SCHEMA_CONTENT["steps"],
                "features": [
                    {"name": "hour", "kind": "time_part", "part": "hour"},
                    {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"},
                ],
            }
        ),
        vocabularies={"brand": ("acme",)},
        moments={},
    )
    encoder = Encoder(fitted)

    blocks = Blocks(
        request=encoder.request_block({}, time=np.array([NOON])),
        candidate=encoder.candidate_block({"brand": ["acme"]}, time=np.array([NOON])),
        request_of=np.zeros(1, np.int64),
    )

    assert set(blocks.feeds()) == {"request_ids", "candidate_ids", "request_of"}
