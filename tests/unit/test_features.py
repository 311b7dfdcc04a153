"""What one request encodes to; expected blocks come from the encoder on plain columns."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tiny

from model.contract.blocks import Blocks
from model.contract.errors import RecordError
from model.contract.record import HistoryEntries, UserRecord
from model.contract.spec import PADDING_CODE
from service.errors import InvalidRequest
from service.features import Candidates, EncodedRequest, FeatureSource, GivenColumn, Id
from service.items import empty_item_table
from service.state import ServingState


@pytest.fixture
def source(tiny_state: ServingState) -> FeatureSource:
    return tiny_state.features


def encode(
    source: FeatureSource,
    *,
    user_id: Id = 7,
    time: float = tiny.NOON,
    context: Mapping[str, object] | None = None,
    user_features: Mapping[str, object] | None = None,
    candidates: Candidates | None = None,
    record: UserRecord | None = None,
) -> EncodedRequest:
    return source.encode(
        user_id=user_id,
        time=time,
        context=context or {},
        user_features=user_features or {},
        candidates=candidates or Candidates(item_ids=[1]),
        record=record,
    )


def columns(item_ids: list[Any], **given: list[Any]) -> Candidates:
    return Candidates(
        item_ids=item_ids,
        columns={name: GivenColumn(values=values) for name, values in given.items()},
        is_columnar=True,
    )


def some(item_ids: list[Any], **given: tuple[list[int], list[Any]]) -> Candidates:
    return Candidates(
        item_ids=item_ids,
        columns={
            name: GivenColumn(values=values, rows=rows) for name, (rows, values) in given.items()
        },
        has_objects=True,
    )


def expect(
    state: ServingState, request: dict[str, Any], candidate: dict[str, Any], *, time: float
) -> Blocks:
    num_rows = len(candidate["item_id"])
    return Blocks(
        request=state.encoder.request_block(request, time=np.array([time])),
        candidate=state.encoder.candidate_block(candidate, time=np.full(num_rows, time)),
        request_of=np.zeros(num_rows, np.int64),
    )


def assert_same(actual: EncodedRequest, expected: Blocks) -> None:
    feeds = actual.blocks.feeds()
    assert set(feeds) == set(expected.feeds())
    for name, array in expected.feeds().items():
        np.testing.assert_array_equal(feeds[name], array, err_msg=name)
        assert feeds[name].dtype == array.dtype


RECORD_COLUMNS = {
    "age_band": ["35-44"],
    "trips": [40],
    "last_trip": [tiny.NOON - 3 * tiny.DAY],
    "recent": [[3, 1]],
    "recent_time": [[tiny.NOON - 2 * tiny.DAY, tiny.NOON - 12 * tiny.DAY]],
    "visits": [[4.0, 25.0, 7.5]],
    "visits_time": [[tiny.NOON - days * tiny.DAY for days in (2, 9, 40)]],
    "visits_store_id": [["31", None, "8"]],
}


def test_record_and_item_table_are_used(tiny_state: ServingState, source: FeatureSource) -> None:
    encoded = encode(source, record=tiny.record(), candidates=Candidates(item_ids=[1, "2", 3.0]))

    candidate = {
        "item_id": [1, 2, 3],
        "brand": ["acme", "bolt", "7"],
        "price": [2.5, None, 99.0],
        "bought_item_count": [3, None, 1],
        "bought_item_last_time": [tiny.NOON - 12 * tiny.DAY, None, tiny.NOON - 2 * tiny.DAY],
        "bought_brand_count": [9, None, None],
        "bought_brand_last_time": [tiny.NOON - 2 * tiny.DAY, None, None],
    }
    assert_same(encoded, expect(tiny_state, RECORD_COLUMNS, candidate, time=tiny.NOON))
    assert encoded.ignored == ()


def test_without_record_all_of_it_is_missing(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(source)

    candidate = {"item_id": [1], "brand": ["acme"], "price": [2.5]}
    assert_same(encoded, expect(tiny_state, {}, candidate, time=tiny.NOON))


def test_context_and_inline_user_features_are_used(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source,
        context={"store_id": 31, "basket": 8.5},
        user_features={
            "trips": 2,
            "loyalty": "gold",
            "recent": [4],
            "recent_time": [tiny.NOON - 1],
        },
        record=tiny.record(matches={}),
    )

    request = {
        **RECORD_COLUMNS,
        "store_id": ["31"],
        "basket": [8.5],
        "trips": [2],
        "loyalty": ["gold"],
        "recent": [[4]],
        "recent_time": [[tiny.NOON - 1]],
    }
    candidate = {"item_id": [1], "brand": ["acme"], "price": [2.5]}
    assert_same(encoded, expect(tiny_state, request, candidate, time=tiny.NOON))


def test_inline_null_is_missing_whatever_the_record_says(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source,
        user_features={"age_band": None, "recent": None, "trips": None},
        record=tiny.record(matches={}),
    )

    replaced = ("age_band", "recent", "recent_time", "trips")
    request = {name: RECORD_COLUMNS[name] for name in RECORD_COLUMNS if name not in replaced}
    candidate = {"item_id": [1], "brand": ["acme"], "price": [2.5]}
    assert_same(encoded, expect(tiny_state, request, candidate, time=tiny.NOON))


def test_inline_history_without_times_counts_in_full(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(source, user_features={"recent": [5, "6"]})

    codes = tiny_state.encoder.encode_ids("item_id", ["5", "6"]).tolist()
    assert encoded.blocks.request.history[0].tolist() == [*codes, PADDING_CODE, PADDING_CODE]


def test_stored_events_after_the_request_do_not_count(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    time = tiny.NOON - 5 * tiny.DAY  # Before the purchase of item 3 and of brand acme.

    encoded = encode(
        source, time=time, record=tiny.record(), candidates=Candidates(item_ids=[1, 3])
    )

    request = {
        **RECORD_COLUMNS,
        "last_trip": [None],
        "recent": [[1]],
        "recent_time": [[tiny.NOON - 12 * tiny.DAY]],
    }
    candidate = {
        "item_id": [1, 3],
        "brand": ["acme", "7"],
        "price": [2.5, 99.0],
        "bought_item_count": [3, None],
        "bought_item_last_time": [tiny.NOON - 12 * tiny.DAY, None],
    }
    assert_same(encoded, expect(tiny_state, request, candidate, time=time))


def test_columns_override_the_item_table(tiny_state: ServingState, source: FeatureSource) -> None:
    encoded = encode(
        source,
        candidates=columns(
            [1, 2], display=["5", None], discount=[0.5, None], price=[7, 8], brand=[None, "acme"]
        ),
    )

    candidate = {
        "item_id": [1, 2],
        "brand": [None, "acme"],
        "price": [7, 8],
        "display": ["5", None],
        "discount": [0.5, None],
    }
    assert_same(encoded, expect(tiny_state, {}, candidate, time=tiny.NOON))


def test_features_of_some_candidates_leave_the_others(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source,
        candidates=some([1, 2, 3], display=([2], ["5"]), price=([0, 2], [None, 4.5])),
    )

    candidate = {
        "item_id": [1, 2, 3],
        "brand": ["acme", "bolt", "7"],
        "price": [None, None, 4.5],
        "display": [None, None, "5"],
    }
    assert_same(encoded, expect(tiny_state, {}, candidate, time=tiny.NOON))


def test_other_brand_inline_is_matched_with_the_record(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source, record=tiny.record(), candidates=some([1, 2, 2], brand=([0, 1], ["bolt", "acme"]))
    )

    candidate = {
        "item_id": [1, 2, 2],
        "brand": ["bolt", "acme", "bolt"],
        "price": [2.5, None, None],
        "bought_item_count": [3, None, None],
        "bought_item_last_time": [tiny.NOON - 12 * tiny.DAY, None, None],
        "bought_brand_count": [None, 9, None],
        "bought_brand_last_time": [None, tiny.NOON - 2 * tiny.DAY, None],
    }
    assert_same(encoded, expect(tiny_state, RECORD_COLUMNS, candidate, time=tiny.NOON))


def test_inline_matches_override_the_record_where_given(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source,
        record=tiny.record(),
        candidates=some(
            [1, 1, 3],
            bought_item_count=([1, 2], [5, None]),
            bought_item_last_time=([1, 2], [tiny.NOON - 60, None]),
        ),
    )

    candidate = {
        "item_id": [1, 1, 3],
        "brand": ["acme", "acme", "7"],
        "price": [2.5, 2.5, 99.0],
        "bought_item_count": [3, 5, None],
        "bought_item_last_time": [tiny.NOON - 12 * tiny.DAY, tiny.NOON - 60, None],
        "bought_brand_count": [9, 9, None],
        "bought_brand_last_time": [tiny.NOON - 2 * tiny.DAY] * 2 + [None],
    }
    assert_same(encoded, expect(tiny_state, RECORD_COLUMNS, candidate, time=tiny.NOON))


def test_inline_matches_work_without_a_record(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(
        source,
        candidates=columns(
            [1, 9], bought_brand_count=[2, 1], bought_brand_last_time=[tiny.NOON - 5, tiny.NOON]
        ),
    )

    candidate = {
        "item_id": [1, 9],
        "brand": ["acme", None],
        "price": [2.5, None],
        "bought_brand_count": [2, 1],
        "bought_brand_last_time": [tiny.NOON - 5, tiny.NOON],
    }
    assert_same(encoded, expect(tiny_state, {}, candidate, time=tiny.NOON))
    assert encoded.is_known.tolist() == [True, False]


def test_recent_events_are_the_record_s_only(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    given = {"visits": [9.0], "visits_time": [tiny.NOON - 1], "visits_last": 2.0}

    encoded = encode(source, user_features=given, record=tiny.record(matches={}))

    assert encoded.ignored == ("visits", "visits_last", "visits_time")
    candidate = {"item_id": [1], "brand": ["acme"], "price": [2.5]}
    assert_same(encoded, expect(tiny_state, RECORD_COLUMNS, candidate, time=tiny.NOON))


def test_recent_events_are_told_where_the_request_is(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    names = tiny_state.encoder.request_layout.dense_columns

    here, elsewhere = (
        encode(source, context={"store_id": store}, record=tiny.record()).blocks.request.dense[0]
        for store in (31, 32)
    )

    assert here[names.index("visits_here_count")] == np.float32(np.log1p(1))
    assert here[names.index("visits_here_days")] == np.float32(np.log1p(2))
    assert elsewhere[names.index("visits_here_count")] == 0
    assert elsewhere[names.index("visits_here_days_missing")] == 1


def test_position_is_fixed_and_told_as_ignored(
    tiny_state: ServingState, source: FeatureSource
) -> None:
    encoded = encode(source, candidates=columns([1], position=[9]))

    assert encoded.ignored == ("position",)
    candidate = {"item_id": [1], "brand": ["acme"], "price": [2.5], "position": [1]}
    assert_same(encoded, expect(tiny_state, {}, candidate, time=tiny.NOON))


def test_names_that_are_no_features_there_are_ignored_and_told(source: FeatureSource) -> None:
    encoded = encode(
        source,
        context={"trips": 3, "weather": "rain"},  # trips is the user's, not the context's
        user_features={"store_id": 31, "mood": {"deeply": ["nested"]}},
        candidates=columns([1], colour=["red"], weather=["rain"]),
    )

    assert encoded.ignored == ("colour", "mood", "store_id", "trips", "weather")


def test_user_id_is_a_feature_if_the_schema_says_so(tiny_state: ServingState) -> None:
    from model.contract.encode import Encoder
    from model.contract.spec import FittedSchema

    content = dict(tiny.SCHEMA_CONTENT)
    user_id = {"name": "user_id", "kind": "hashed", "scope": "user", "source": "request"}
    content["features"] = [*content["features"], {**user_id, "num_buckets": 1000}]
    encoder = Encoder(
        FittedSchema.model_validate(
            {"schema": content, "vocabularies": tiny.VOCABULARIES, "moments": {}}
        )
    )

    encoded = encode(FeatureSource(encoder, empty_item_table(encoder)), user_id=7.0)

    expected = encoder.request_block({"user_id": ["7"]}, time=np.array([tiny.NOON]))
    np.testing.assert_array_equal(encoded.blocks.request.ids, expected.ids)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"context": {"store_id": [1]}}, "context.store_id"),
        ({"context": {"basket": "much"}}, "context.basket"),
        ({"context": {"basket": True}}, "context.basket"),
        ({"user_features": {"trips": {}}}, "user_features.trips"),
        ({"user_features": {"age_band": 1.5}}, "user_features.age_band"),
        ({"user_features": {"recent": 5}}, "user_features.recent"),
        ({"user_features": {"recent": [1, 2, False]}}, "user_features.recent[2]"),
        ({"user_features": {"recent_time": [1]}}, "user_features.recent_time"),
        ({"user_features": {"recent": [1], "recent_time": []}}, "user_features.recent_time"),
        ({"user_features": {"recent": [1], "recent_time": 5}}, "user_features.recent_time"),
        (
            {"user_features": {"recent": [1, 2], "recent_time": [1, "2"]}},
            "user_features.recent_time[1]",
        ),
        ({"time": 1e15}, "time"),
        ({"candidates": Candidates(item_ids=[1, 2.5])}, "candidates[1]"),
        ({"candidates": Candidates(item_ids=[""])}, "candidates[0]"),
        ({"candidates": columns([1, None])}, "candidates.item_id[1]"),
        ({"candidates": columns([1, 2], display=["1", True])}, "candidates.display[1]"),
        ({"candidates": columns([1, 2], price=["1", 2])}, "candidates.price[0]"),
        ({"candidates": columns([1, 2], price=[1, 10**400])}, "candidates.price[1]"),
        ({"candidates": some([1, 2], item_id=([], []))}, None),
        ({"candidates": some([1, 2, 3], price=([1, 2], [1, []]))}, "candidates[2].price"),
        ({"candidates": some([1, 2, 3], brand=([2], [0.5]))}, "candidates[2].brand"),
        ({"candidates": columns([1], bought_item_count=[1])}, "candidates.bought_item_count"),
        (
            {"candidates": some([1, 2], bought_item_last_time=([1], [5]))},
            "candidates[1].bought_item_last_time",
        ),
        (
            {
                "candidates": some(
                    [1, 2],
                    bought_item_count=([0, 1], [1, 1]),
                    bought_item_last_time=([1], [5]),
                )
            },
            "candidates[0].bought_item_count",
        ),
        (
            {
                "candidates": columns(
                    [1, 2], bought_item_count=[1, "x"], bought_item_last_time=[5, 5]
                )
            },
            "candidates.bought_item_count[1]",
        ),
    ],
)
def test_value_that_does_not_fit_is_refused_by_its_path(
    source: FeatureSource, changes: dict[str, Any], field: str | None
) -> None:
    if field is None:
        encode(source, **changes)
        return
    with pytest.raises(InvalidRequest) as caught:
        encode(source, record=tiny.record(), **changes)

    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"trips": "many"}},
        {"features": {"age_band": 1.5}},
        {"histories": {"recent": HistoryEntries(ids=(0.5,), times=np.array([0]))}},  # type: ignore[arg-type]  # not representable on the wire
    ],
)
def test_value_of_the_record_that_does_not_fit_is_the_record_s_fault(
    source: FeatureSource, changes: dict[str, Any]
) -> None:
    with pytest.raises(RecordError):
        encode(source, record=tiny.record(**changes))


def test_inline_value_replaces_a_bad_one_of_the_record(source: FeatureSource) -> None:
    record = tiny.record(features={"trips": "many"})

    encode(source, record=record, user_features={"trips": 3})
