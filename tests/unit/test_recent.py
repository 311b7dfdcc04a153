"""Statistics of a user's newest events, each by hand on four events, and what may not be given."""

from typing import Any

import numpy as np
import pytest
from tiny import DAY, NOON

from model.contract import recent as recent_module
from model.contract.blocks import layouts
from model.contract.columns import Ragged
from model.contract.encode import Encoder
from model.contract.errors import EncodeError
from model.contract.ids import NO_KEY, hash_ids, key_of
from model.contract.recent import RecentColumn, RecentRow, recent_statistics
from model.contract.spec import FittedSchema, Recent, parse_schema

HOUR = 3600
FEATURE = Recent(
    name="visits", column="lines", context="shop", windows_days=(7, 30), large=20.0, max_length=100
)
# Wednesday 2023-11-15 12:00 UTC; values e^k - 1, so that log1p is k. Newest first.
#   3, 1 day ago (Tuesday 12:00), at a
#   1, 7 days ago (Wednesday 12:00), nowhere
#   2, 13 days and 22 hours ago (Wednesday 14:00), at b
#   5, 40 days and 3 hours ago (Friday 09:00), at a
LOGS = [3.0, 1.0, 2.0, 5.0]
AGES = [DAY, 7 * DAY, 13 * DAY + 22 * HOUR, 40 * DAY + 3 * HOUR]
SHOPS = ["a", None, "b", "a"]


def statistics(
    logs: list[float] = LOGS,
    ages: list[float] = AGES,
    shops: list[str | None] = SHOPS,
    *,
    here: str | None = "a",
    utc_offset: float = 0.0,
    feature: Recent = FEATURE,
) -> dict[str, float]:
    """Of one request at NOON, without the feature's name; the same beside another request."""
    events = Ragged(
        values=np.expm1(np.array(logs, np.float64)),
        times=NOON - np.array(ages, np.float64),
        offsets=np.array([0, len(logs)], np.int64),
    )
    found = RecentRow(feature).statistics(
        np.asarray(events.values),
        events.times,
        hash_ids(shops),
        time=NOON,
        utc_offset=utc_offset,
        here=key_of(here),
    )
    both = recent_statistics(
        feature,
        RecentColumn(
            events=Ragged(
                values=np.tile(events.values, 2),
                times=np.tile(events.times, 2),
                offsets=np.array([0, len(logs), 2 * len(logs)], np.int64),
            ),
            keys=hash_ids(2 * shops),
        ),
        time=np.array([NOON, NOON - DAY]),
        utc_offset=np.array([utc_offset, 0.0]),
        here=hash_ids([here, here]),
    )
    np.testing.assert_array_equal(both[:, 0], found)
    names = [name.removeprefix("visits_") for name in feature.statistics]
    return dict(zip(names, found, strict=True))


# Their mean is 11 / 4; a mean of n of them is (sum + 2 * 11/4) / (n + 2).
BY_HAND = {
    "count_7": np.log(3),  # the limit itself is within
    "mean_7": 2.0,
    "count_30": np.log(4),
    "mean_30": 2.0,
    "last": 3.0,
    "gap": np.log(7),  # six days
    "hour_count": np.log(4),  # 12, 12 and 14 o'clock; not 9
    "hour_mean": (6 + 5.5) / 5,
    "weekday_count": np.log(3),
    "weekday_mean": (3 + 5.5) / 4,
    "large_days": np.log(41.125),  # e^5 - 1; e^3 - 1 is 19.1
    "here_count": np.log(3),
    "here_mean": (8 + 5.5) / 4,
    "here_days": np.log(2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_statistic_by_hand(name: str) -> None:
    assert statistics()[name] == pytest.approx(BY_HAND[name], abs=1e-12)


def test_statistics_are_those_that_the_schema_names() -> None:
    assert {f"visits_{name}" for name in BY_HAND} == set(FEATURE.statistics)
    assert {f"visits_{name}" for name in statistics()} == set(FEATURE.statistics)


def test_without_context_and_large_there_are_no_such_statistics() -> None:
    feature = Recent(name="visits", column="lines", windows_days=(7, 30))

    found = statistics(feature=feature)

    absent = {"large_days", "here_count", "here_mean", "here_days"}
    assert set(found) == set(BY_HAND) - absent
    assert {f"visits_{name}" for name in found} == set(feature.statistics)


def test_a_feature_may_have_no_windows() -> None:
    feature = Recent(name="visits", column="lines", windows_days=())

    assert statistics(feature=feature)["hour_count"] == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("hours", "is_near"), [(-2.0, True), (2.0, True), (-2.01, False), (2.01, False), (12, False)]
)
def test_hours_go_round_midnight(hours: float, is_near: bool) -> None:
    """The request is at 23:00 local time; two hours later is one o'clock of another day."""
    found = statistics([1.0], [5 * DAY - hours * HOUR], ["a"], utc_offset=11 * HOUR)

    assert found["hour_count"] == (pytest.approx(np.log(2)) if is_near else 0.0)


@pytest.mark.parametrize(
    ("utc_offset", "ages", "is_same"),
    [
        (0, 7 * DAY + 12 * HOUR, True),  # Wednesday 00:00
        (0, 7 * DAY + 12 * HOUR + 1, False),  # Tuesday's last second
        (HOUR, 7 * DAY + 13 * HOUR, True),  # one hour ahead, the day begins an hour earlier
        (-5 * HOUR, 7 * DAY + 8 * HOUR, False),  # 4:00 UTC is still Tuesday in New York
        (-5 * HOUR, 7 * DAY + 7 * HOUR, True),
        (13 * HOUR, 7 * DAY + 12 * HOUR, False),  # the request is on Thursday 1:00
    ],
)
def test_weekday_is_that_of_local_time(utc_offset: float, ages: float, is_same: bool) -> None:
    found = statistics([1.0], [ages], ["a"], utc_offset=utc_offset)

    assert found["weekday_count"] == (pytest.approx(np.log(2)) if is_same else 0.0)


def test_a_mean_of_nothing_is_the_user_s_own_mean() -> None:
    found = statistics([3.0, 1.0], [DAY + 6 * HOUR, 2 * DAY + 6 * HOUR], ["a", "b"], here="c")

    own = {name: found[name] for name in ("hour_mean", "weekday_mean", "here_mean")}
    assert own == pytest.approx(dict.fromkeys(own, 2.0))
    assert [found[f"{name}_count"] for name in ("hour", "weekday", "here")] == [0.0, 0.0, 0.0]
    assert np.isnan(found["here_days"])


def test_a_mean_of_one_event_is_shrunk_to_the_user_s_own() -> None:
    found = statistics([4.0, 1.0], [DAY, DAY], ["a", "b"])

    assert found["here_mean"] == pytest.approx((4.0 + 2 * 2.5) / 3)


def test_without_events_everything_is_missing() -> None:
    assert all(np.isnan(value) for value in statistics([], [], []).values())


def test_of_one_event_there_is_no_gap() -> None:
    found = statistics([4.0], [40 * DAY], ["a"])

    missing = {name for name, value in found.items() if np.isnan(value)}
    assert missing == {"gap", "mean_7", "mean_30"}
    assert (found["count_30"], found["last"]) == (0.0, 4.0)


def test_without_a_large_event_its_age_is_missing() -> None:
    assert np.isnan(statistics([2.0, 1.0], [DAY, DAY], ["a", "a"])["large_days"])


@pytest.mark.parametrize("here", [None, "unheard"])
def test_no_context_is_like_no_event_s(here: str | None) -> None:
    """The second event has none either: no key is not the same place as no key."""
    found = statistics(here=here)

    assert found["here_count"] == 0.0
    assert np.isnan(found["here_days"])
    assert hash_ids([None])[0] == NO_KEY


def test_events_after_the_request_are_ignored() -> None:
    later = statistics([9.0, 9.0, *LOGS], [-DAY, -1, *AGES], ["a", "a", *SHOPS])

    assert later == statistics()


def test_an_event_at_the_request_s_time_counts() -> None:
    assert statistics([9.0, *LOGS], [0, *AGES], ["b", *SHOPS])["last"] == pytest.approx(9.0)


def test_only_the_newest_count() -> None:
    """Those after the request take no place."""
    short = FEATURE.model_copy(update={"max_length": 2})

    found = statistics([9.0, *LOGS], [-DAY, *AGES], ["a", *SHOPS], feature=short)

    assert found == pytest.approx(statistics(LOGS[:2], AGES[:2], SHOPS[:2]), nan_ok=True)
    assert found["count_30"] == pytest.approx(np.log(3))


def test_a_log_in_parts_is_the_log_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    lengths = [0, 3, 0, 5, 1, 4, 0]
    offsets = np.cumsum([0, *lengths])
    ages = np.concatenate([np.sort(rng.random(n) * 60 * DAY) for n in lengths])
    column = RecentColumn(
        events=Ragged(values=rng.random(len(ages)), times=NOON - ages, offsets=offsets),
        keys=rng.integers(0, 3, len(ages)).astype(np.uint64),
    )
    time, utc_offset = NOON + np.arange(7.0) * HOUR, np.arange(7.0) * HOUR
    here = np.array([1, 2, 0, 1, 2, 0, 1], np.uint64)

    whole, parts = [], []
    for found, chunk in ((whole, 100), (parts, 2)):
        monkeypatch.setattr(recent_module, "CHUNK_REQUESTS", chunk)
        found.append(
            recent_statistics(FEATURE, column, time=time, utc_offset=utc_offset, here=here)
        )

    assert whole[0].shape == (len(FEATURE.statistics), 7)
    np.testing.assert_array_equal(parts[0], whole[0])


def encoder(**changes: Any) -> Encoder:
    visits = {"name": "visits", "kind": "recent", "column": "lines", "context": "shop"}
    shop = {"name": "shop", "kind": "hashed", "scope": "context", "source": "request"}
    item = {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"}
    content = {
        "time_zone": "America/New_York",
        "steps": [{"name": "a", "label": "a"}, {"name": "b", "label": "b"}],
        "features": [{**visits, **changes}, {**shop, "num_buckets": 9}, item],
    }
    return Encoder(FittedSchema(schema=parse_schema(content), vocabularies={}, moments={}))


def dense(encoder: Encoder, time: float = NOON, **columns: Any) -> dict[str, float]:
    """Dense columns of one request by name."""
    block = encoder.request_block(columns, time=np.array([time]))
    values = block.dense[0].astype(np.float64).tolist()
    return dict(zip(encoder.request_layout.dense_columns, values, strict=True))


VISITS = {"visits": [[2.0, 5.0]], "visits_time": [[NOON - DAY, NOON - 2 * DAY]]}


def test_every_statistic_is_a_dense_column_with_a_flag() -> None:
    layout, _ = layouts(encoder().schema)

    names = encoder().schema.feature("visits").statistics  # type: ignore[union-attr]  # a recent one
    assert layout.numerics == names
    assert layout.dense_columns == (*names, *(f"{name}_missing" for name in names))


def test_context_is_compared_as_ids_are() -> None:
    """123 as a number, as a fraction of none, and as text; null, NaN and "" are none of them."""
    given = {
        "visits": [[1.0] * 5],
        "visits_time": [[NOON - DAY] * 5],
        "visits_shop": [["123", 123.0, None, "", float("nan")]],
    }

    found = dense(encoder(), **given, shop=[123])

    assert found["visits_here_count"] == pytest.approx(np.log(3))
    assert dense(encoder(), **given, shop=[None])["visits_here_count"] == 0.0


def test_local_time_is_that_of_the_schema_s_zone() -> None:
    """4:30 UTC on Wednesday is Tuesday 23:30 in New York, where the request is on Wednesday."""
    at = NOON - 7 * DAY - 7.5 * HOUR

    found = dense(encoder(), visits=[[1.0]], visits_time=[[at]])

    assert found["visits_weekday_count"] == 0.0


def test_an_event_of_exactly_large_is_large() -> None:
    """0.7 as float32 is less than 0.7."""
    found = dense(encoder(large=0.7), visits=[[0.7]], visits_time=[[NOON]])

    assert found["visits_large_days_missing"] == 0.0


def test_an_unknown_user_is_like_one_without_events() -> None:
    absent = dense(encoder(), shop=["1"])

    assert absent["visits_count_7_missing"] == 1.0
    assert dense(encoder(), shop=["1"], visits=[None], visits_time=[None]) == absent
    assert dense(encoder(), shop=["1"], visits=[[]], visits_time=[[]], visits_shop=[[]]) == absent
    assert dense(encoder(), NOON - 9 * DAY, **VISITS, shop=["1"]) == absent


def test_missing_events_of_one_row_leave_the_others() -> None:
    block = encoder().request_block(
        {
            "visits": [None, [2.0, 5.0], []],
            "visits_time": [None, VISITS["visits_time"][0], []],
            "visits_shop": [None, ["1", "2"], []],
            "shop": ["1", "1", "1"],
        },
        time=np.full(3, NOON),
    )

    alone = dense(encoder(), **VISITS, visits_shop=[["1", "2"]], shop=["1"])
    np.testing.assert_array_equal(block.dense[1], np.array(list(alone.values()), np.float32))
    np.testing.assert_array_equal(block.dense[0], block.dense[2])


@pytest.mark.parametrize(
    ("changes", "feature", "reason"),
    [
        ({"visits": [[2.0, -1.0]]}, "visits", "numbers of 0 or more"),
        ({"visits": [[2.0, None]]}, "visits", "numbers of 0 or more"),
        ({"visits": [["2", 1.0]]}, "visits", "expected a number, got '2'"),
        ({"visits": [[True, 1.0]]}, "visits", "expected a number, got True"),
        ({"visits": [[2.0, float("inf")]]}, "visits", "finite number"),
        ({"visits": [[2.0, 1e31]]}, "visits", "finite number"),
        ({"visits": [3.0]}, "visits", "expected a list"),
        ({"visits": [[2.0]]}, "visits", "a list of 1 times"),
        ({"visits_time": [None]}, "visits_time", "a time for every event of visits"),
        ({"visits_time": [[NOON, None]]}, "visits_time", "a time for every event of visits"),
        ({"visits_time": [[NOON - 2, NOON - 1]]}, "visits_time", "the newest event first"),
        ({"visits_shop": [["1"]]}, "visits_shop", "one value per event"),
        ({"visits_shop": [None]}, "visits_shop", "one value per event"),
        ({"visits_shop": [["1", 1.5]]}, "visits_shop", "expected an id"),
    ],
)
def test_events_that_do_not_fit_are_refused(
    changes: dict[str, Any], feature: str, reason: str
) -> None:
    with pytest.raises(EncodeError, match=reason) as caught:
        encoder().request_block({**VISITS, "shop": ["1"], **changes}, time=np.array([NOON]))

    assert caught.value.feature == feature


def test_times_are_refused_where_they_are_absent() -> None:
    with pytest.raises(EncodeError, match=r"'visits_time'.*a time for every event"):
        encoder().request_block({"visits": [[1.0]]}, time=np.array([NOON]))


def test_context_values_of_another_row_are_not_taken() -> None:
    """As many as there are events, but not of the same requests."""
    columns = {
        "visits": [[1.0], [1.0, 2.0]],
        "visits_time": [[NOON], [NOON, NOON]],
        "visits_shop": [["1", "2"], ["1"]],
    }

    with pytest.raises(EncodeError, match=r"'visits_shop'.*one value per event"):
        encoder().request_block(columns, time=np.full(2, NOON))


def test_the_next_row_s_newest_event_may_be_newer() -> None:
    columns = {"visits": [[1.0], [], [2.0]], "visits_time": [[NOON - DAY], [], [NOON]]}

    block = encoder().request_block(columns, time=np.full(3, NOON))

    last = encoder().request_layout.dense_columns.index("visits_last")
    expected = np.log([2.0, 1.0, 3.0]).astype(np.float32)
    np.testing.assert_allclose(block.dense[:, last], expected, rtol=1e-6)


def test_two_recent_features_stand_side_by_side() -> None:
    schema = encoder().schema.model_dump(mode="json")
    other = {**schema["features"][0], "name": "orders", "context": None}
    schema["features"].insert(0, other)
    both = Encoder(
        FittedSchema.model_validate({"schema": schema, "vocabularies": {}, "moments": {}})
    )

    orders = {"orders": [[9.0]], "orders_time": [[NOON]]}
    found = dense(both, **VISITS, **orders, shop=["1"])

    assert found["orders_last"] == pytest.approx(np.log(10))
    assert found["visits_last"] == pytest.approx(np.log(3))
    assert "orders_here_count" not in found
