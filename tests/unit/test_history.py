"""Against brute force over small random tables, and by hand where a rule has an edge."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from model.contract.encode import Encoder
from model.contract.errors import LogError
from model.contract.ids import canonical_ids, hash_id, hash_ids
from model.contract.log_spec import EventStatistic
from model.contract.record import UserRecord, look_up, pack_record, unpack_record
from model.contract.spec import (
    FittedSchema,
    History,
    Match,
    Numeric,
    Recent,
    Schema,
    parse_schema,
    raw_columns,
)
from model.history import AsOf
from model.logs import TIME, USER
from model.tables import Tables, recent_features
from service.features import Candidates, FeatureSource
from service.items import empty_item_table

DAY = 86_400
PERIOD_START = 7_200
SEEDS = range(4)
LAGS = (0, 2 * DAY)

COUNT = {"event": "buy", "aggregate": "count"}
MEAN = {"event": "buy", "aggregate": "mean", "column": "price"}
LAST = {"event": "buy", "aggregate": "last_time"}
ITEM_COUNT = {**COUNT, "attribute": "brand", "whole_periods": 2}
ITEM_MEAN = {**MEAN, "attribute": "item_id", "whole_periods": 3}
ITEM_USERS = {**COUNT, "aggregate": "users", "attribute": "item_id"}
BRAND_USERS = {**COUNT, "aggregate": "users", "attribute": "brand"}
BRAND_WEEK = {**ITEM_COUNT, "whole_periods": 7}
BRAND_MEAN = {**MEAN, "attribute": "brand", "whole_periods": 5}


def schema(lag: int = 0, **changes: Any) -> Schema:
    def feature(name: str, scope: str, **fields: Any) -> dict[str, Any]:
        source = {"user": "store", "item": "items"}[scope]
        return {"name": name, "scope": scope, "source": source, "kind": "numeric", **fields}

    return parse_schema(
        {
            "availability_lag_s": lag,
            "period_days": 2,
            "period_start": PERIOD_START,
            "steps": [
                {"name": "click", "label": "click"},
                {"name": "conversion", "label": "bought"},
            ],
            "features": [
                feature("item_id", "item", kind="hashed", num_buckets=50),
                feature("brand", "item", kind="categorical"),
                feature("brand_sales", "item", statistic=ITEM_COUNT),
                feature("item_price", "item", statistic=ITEM_MEAN),
                feature("item_users", "item", statistic=ITEM_USERS),
                feature("brand_users", "item", statistic=BRAND_USERS),
                feature("brand_week", "item", statistic=BRAND_WEEK),
                feature("brand_price", "item", statistic=BRAND_MEAN),
                feature("town", "user", kind="categorical"),
                feature("purchases", "user", statistic=COUNT),
                feature("mean_price", "user", statistic=MEAN),
                feature("last_purchase", "user", kind="elapsed", statistic=LAST),
                {"name": "recent", "kind": "history", "of": "item_id", "max_length": 3},
                {
                    "name": "recent_brands",
                    "kind": "history",
                    "of": "brand",
                    "max_length": 4,
                    "events": ["buy"],
                },
                {
                    "name": "shop",
                    "kind": "hashed",
                    "scope": "context",
                    "source": "request",
                    "num_buckets": 9,
                },
                {
                    "name": "baskets",
                    "kind": "recent",
                    "column": "price",
                    "context": "shop",
                    "windows_days": [3],
                    "large": 5,
                    "max_length": 5,
                },
                {
                    "name": "buys",
                    "kind": "recent",
                    "column": "price",
                    "events": ["buy"],
                    "max_length": 4,
                },
                {"name": "seen_item", "kind": "match", "attribute": "item_id"},
                {
                    "name": "bought_brand",
                    "kind": "match",
                    "attribute": "brand",
                    "events": ["buy"],
                },
                {
                    "name": "bought_lately",
                    "kind": "match",
                    "attribute": "brand",
                    "events": ["buy"],
                    "max_age_days": 5,
                },
            ],
            **changes,
        }
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """Random events, items whose brand changes, users; and the same as rows of Python values."""

    as_of: AsOf
    events: list[dict[str, Any]]
    items: list[dict[str, Any]]
    log: pl.DataFrame

    @property
    def lag(self) -> int:
        return self.as_of.schema.availability_lag_s

    def brand(self, item: int, time: float) -> str | None:
        valid = [row for row in self.items if row["item_id"] == item and row["time"] <= time]
        return max(valid, key=lambda row: row["time"])["brand"] if valid else None

    def key(self, attribute: str, event: dict[str, Any]) -> object:
        item, time = event["item_id"], event["time"]
        return item if attribute == "item_id" else self.brand(item, time)

    def before(self, user: int, time: float, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The user's events strictly before a time less the lag, in the file's order."""
        return [
            event
            for event in self.events
            if event["user_id"] == user
            and event["time"] < time - self.lag
            and (not names or event["event"] in names)
        ]


def make_world(
    path: Path, seed: int, *, lag: int = 0, ids: type = int, period_days: int = 2
) -> World:
    """Times are whole hours of a fortnight, so that many events share an instant."""
    rng = np.random.default_rng(seed)
    num_events, num_rows = 150, 80
    hours = rng.integers(0, 14 * 24, num_events).tolist()
    prices = [None if x < 0.2 else round(float(x) * 10, 2) for x in rng.random(num_events)]
    events = {
        "user_id": rng.integers(0, 4, num_events).tolist(),
        "item_id": rng.integers(0, 6, num_events).tolist(),
        "event": [["buy", "view"][i] for i in rng.integers(0, 2, num_events)],
        "time": [hour * 3600 for hour in hours],
        "price": prices,
        "shop": [["s1", "s2", "3", None][i] for i in rng.integers(0, 4, num_events)],
    }
    items = {
        "item_id": [0, 0, 1, 1, 2, 3, 4],  # item 5 has no attributes
        "brand": ["a", "b", "b", "a", "c", None, "c"],
        "time": [0, 5 * DAY, 0, 9 * DAY, 0, 0, 7 * DAY],  # item 4 comes later
        "size": [1, 2, 3, 4, 5, 6, 7],
    }
    users = {
        "user_id": [0, 1, 1, 9],
        "town": ["x", "y", "z", None],
        "time": [0, 0, 6 * DAY, 0],
    }
    for name, columns in (("events", events), ("items", items), ("users", users)):
        keys = {key: columns[key] for key in ("user_id", "item_id") if key in columns}
        typed = {key: [ids(value) for value in values] for key, values in keys.items()}
        pl.DataFrame({**columns, **typed}).write_parquet(path / f"{name}.parquet")
    described = schema(lag, period_days=period_days)
    tables = Tables.read(
        events=path / "events.parquet",
        items=path / "items.parquet",
        users=path / "users.parquet",
        schema=described,
    )
    log = pl.DataFrame(
        {
            USER: rng.integers(0, 6, num_rows),  # 4 and 5 have no events
            TIME: rng.integers(-24, 17 * 24, num_rows) * 3600.0,
            "item_id": rng.integers(0, 7, num_rows),
            "brand": [["a", "b", "c", "other", None][i] for i in rng.integers(0, 5, num_rows)],
        }
    )
    return World(
        as_of=AsOf(tables, schema=described),
        events=[dict(zip(events, row, strict=True)) for row in zip(*events.values(), strict=True)],
        items=[dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)],
        log=log,
    )


@pytest.fixture(params=[(seed, lag) for seed in SEEDS for lag in LAGS])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    seed, lag = request.param
    return make_world(tmp_path, seed, lag=lag)


def match_feature(world: World, name: str) -> Match:
    feature = world.as_of.schema.feature(name)
    assert isinstance(feature, Match)
    return feature


def history_feature(world: World, name: str) -> History:
    feature = world.as_of.schema.feature(name)
    assert isinstance(feature, History)
    return feature


def brute_match(
    world: World, feature: Match, user: int, time: float, key: object
) -> tuple[float, float]:
    occasions = {
        event["time"]
        for event in world.before(user, time, feature.events)
        if key is not None and world.key(feature.attribute, event) == key
    }
    return (len(occasions), max(occasions)) if occasions else (np.nan, np.nan)


@pytest.mark.parametrize("name", ["seen_item", "bought_brand"])
def test_matches_are_counted_by_hand(world: World, name: str) -> None:
    feature = match_feature(world, name)
    keys = world.log[feature.attribute]

    counts, last_times = world.as_of.matches(feature, world.log, keys)

    expected = [
        brute_match(world, feature, user, time, key)
        for user, time, key in zip(world.log[USER], world.log[TIME], keys, strict=True)
    ]
    np.testing.assert_array_equal(counts, [count for count, _ in expected])
    np.testing.assert_array_equal(last_times, [last for _, last in expected])
    assert np.isfinite(counts).any()
    assert np.isnan(counts).any()


def test_user_statistics_are_counted_by_hand(world: World) -> None:
    count, mean, last = (
        world.as_of.user_statistic(EventStatistic.model_validate(statistic), world.log)
        for statistic in (COUNT, MEAN, LAST)
    )

    for i, (user, time) in enumerate(zip(world.log[USER], world.log[TIME], strict=True)):
        before = world.before(user, time, ("buy",))
        prices = [event["price"] for event in before if event["price"] is not None]
        assert count[i] == len(before)
        np.testing.assert_allclose(mean[i], np.mean(prices) if prices else np.nan, rtol=1e-12)
        newest = max((event["time"] for event in before), default=np.nan)
        np.testing.assert_array_equal(last[i], newest)


def end_of_periods(world: World, time: float) -> int:
    """Start of the period in which the lag before a time is."""
    length = world.as_of.schema.period_days * DAY
    return int(PERIOD_START + (time - world.lag - PERIOD_START) // length * length)


def brute_item_statistic(
    world: World, statistic: EventStatistic, key: object, time: float
) -> float:
    end = end_of_periods(world, time)
    periods = statistic.whole_periods
    start = -np.inf if periods is None else end - periods * world.as_of.schema.period_days * DAY
    events = [
        event
        for event in world.events
        if event["event"] == "buy"
        and start <= event["time"] < end
        and key is not None
        and world.key(str(statistic.attribute), event) == key
    ]
    if statistic.aggregate == "mean":
        prices = [event["price"] for event in events if event["price"] is not None]
        return float(np.mean(prices)) if prices else np.nan
    if key is None:
        return np.nan
    return len({e["user_id"] for e in events}) if statistic.aggregate == "users" else len(events)


ITEM_STATISTICS = (ITEM_COUNT, ITEM_MEAN, ITEM_USERS, BRAND_USERS, BRAND_WEEK, BRAND_MEAN)


@pytest.mark.parametrize("statistic", ITEM_STATISTICS)
@pytest.mark.parametrize(
    ("seed", "lag", "period_days"), [(0, 0, 2), (1, 2 * DAY, 2), (2, 0, 1), (3, 5 * 3600, 1)]
)
def test_item_statistics_cover_whole_periods_before(
    tmp_path: Path, seed: int, lag: int, period_days: int, statistic: dict[str, Any]
) -> None:
    world = make_world(tmp_path, seed, lag=lag, period_days=period_days)
    parsed = EventStatistic.model_validate(statistic)
    keys, times = world.log[str(parsed.attribute)], world.log[TIME].to_numpy()

    found = world.as_of.item_statistic(parsed, keys, times)

    expected = [
        brute_item_statistic(world, parsed, key, time)
        for key, time in zip(keys, times, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert len(set(found[np.isfinite(found)])) > 3


def test_users_are_counted_once_however_often_they_buy(tmp_path: Path) -> None:
    """Also over periods; who bought in the period under way is not told yet."""
    events = {
        "user_id": [1, 1, 2, 1, 3, None],
        "item_id": [7, 7, 7, 7, 7, 7],
        "time": [PERIOD_START + hour * 3600 for hour in (0, 1, 2, 50, 97, 1)],
    }
    as_of = hand_made(tmp_path, events=events)
    statistic = EventStatistic.model_validate(ITEM_USERS)
    days = np.array([0.0, 1.9, 2.0, 4.5, 6.0])

    found = as_of.item_statistic(statistic, pl.Series([7] * 5), PERIOD_START + days * DAY)

    assert found.tolist() == [0.0, 0.0, 2.0, 2.0, 3.0]


def test_users_become_known_after_the_lag(tmp_path: Path) -> None:
    events = {"item_id": [7], "time": [PERIOD_START + DAY]}
    as_of = hand_made(tmp_path, events=events, lag=3600)
    statistic = EventStatistic.model_validate(ITEM_USERS)
    times = PERIOD_START + 2.0 * DAY + np.array([3599.0, 3600.0])

    assert as_of.item_statistic(statistic, pl.Series([7, 7]), times).tolist() == [0.0, 1.0]


def test_a_count_of_no_key_is_missing_and_of_an_unheard_one_nothing(tmp_path: Path) -> None:
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [PERIOD_START]})
    keys, time = pl.Series([7, None, 8]), np.full(3, PERIOD_START + 2.0 * DAY)

    for statistic in (ITEM_USERS, {**COUNT, "attribute": "item_id", "whole_periods": 1}):
        found = as_of.item_statistic(EventStatistic.model_validate(statistic), keys, time)
        np.testing.assert_array_equal(found, [1.0, np.nan, 0.0])


def test_a_price_that_is_no_number_does_not_spoil_later_periods(tmp_path: Path) -> None:
    events = {
        "item_id": [7, 7, 7],
        "time": [PERIOD_START, PERIOD_START + 2 * DAY, PERIOD_START + 4 * DAY],
        "price": [float("nan"), 4.0, 6.0],
    }
    as_of = hand_made(tmp_path, events=events)
    statistic = EventStatistic.model_validate({**ITEM_MEAN, "whole_periods": 2})
    days = np.array([2.0, 4.0, 6.0])

    found = as_of.item_statistic(statistic, pl.Series([7] * 3), PERIOD_START + days * DAY)

    np.testing.assert_array_equal(found, [np.nan, 4.0, 5.0])


def recent_feature(world: World, name: str) -> Recent:
    feature = world.as_of.schema.feature(name)
    assert isinstance(feature, Recent)
    return feature


def brute_recent(
    world: World, feature: Recent, user: int, time: float
) -> list[tuple[float, float, int]]:
    """Values, times and context keys, newest first; of one instant, the later line is the newer."""
    before = [e for e in world.before(user, time, feature.events) if e["price"] is not None]
    newest = sorted(before, key=lambda event: event["time"])[::-1][: feature.max_length]
    return [(float(np.float32(e["price"])), float(e["time"]), hash_id(e["shop"])) for e in newest]


@pytest.mark.parametrize("name", ["baskets", "buys"])
def test_recent_events_are_the_newest_first(world: World, name: str) -> None:
    feature = recent_feature(world, name)

    found = world.as_of.recent(feature, world.log)

    assert tuple(found) == tuple(
        column for column in raw_columns(feature) if column != f"{name}_time"
    )
    events, lengths = found[name], []
    keys = np.asarray(found["baskets_shop"].values) if feature.context else None
    for i, (user, time) in enumerate(zip(world.log[USER], world.log[TIME], strict=True)):
        expected = brute_recent(world, feature, user, time)
        part = slice(events.offsets[i], events.offsets[i + 1])
        assert np.asarray(events.values)[part].tolist() == [value for value, _, _ in expected]
        assert events.times[part].tolist() == [at for _, at, _ in expected]
        if keys is not None:
            assert keys[part].tolist() == [key for _, _, key in expected]
        lengths.append(len(expected))
    assert {0, feature.max_length} <= set(lengths)
    assert np.asarray(events.values).dtype == np.float32


@pytest.mark.parametrize("as_of", [-DAY, DAY, 9 * DAY, 9 * DAY + 3600, 30 * DAY])
def test_record_s_recent_events_encode_to_the_log_s_row(world: World, as_of: int) -> None:
    """Through the bytes of the record and the service's own encoding."""
    schema = world.as_of.schema
    fitted = FittedSchema(schema=schema, vocabularies={"brand": ("b",), "town": ("x",)}, moments={})
    encoder = Encoder(fitted)
    source = FeatureSource(encoder, empty_item_table(encoder))
    records = dict(world.as_of.user_records(float(as_of), max_keys=100))
    log = pl.DataFrame({USER: list(range(4)), TIME: [float(as_of)] * 4})
    columns: dict[str, Any] = {"shop": ["3"] * 4}
    for name in ("baskets", "buys"):
        columns |= world.as_of.recent(recent_feature(world, name), log)
    logged = encoder.request_block(columns, time=log[TIME].to_numpy()).dense
    names = [n for f in recent_features(schema) for n in f.statistics]
    places = [encoder.request_layout.dense_columns.index(name) for name in names]

    for user in range(4):
        record = through_bytes(records[user]) if user in records else None
        encoded = source.encode(
            user_id=user,
            time=float(as_of),
            context={"shop": 3},
            user_features={},
            candidates=Candidates(item_ids=[1]),
            record=record,
        )
        dense = encoded.blocks.request.dense[0]
        np.testing.assert_array_equal(dense[places], logged[user, places])
        flags = [len(encoder.request_layout.value_columns) + place for place in places]
        np.testing.assert_array_equal(dense[flags], logged[user, flags])
    assert as_of < 9 * DAY or (logged[:, places] != 0).any()


def test_recent_events_are_whole_seconds_and_float32(tmp_path: Path) -> None:
    """As a record holds them, so that a log's row has the same."""
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [1000.75], "price": [0.1]})

    found = as_of.recent(as_of.schema.feature("buys"), log_of([2000.0, 1000.75]))["buys"]  # type: ignore[arg-type]  # a recent one

    assert found.times.tolist() == [1000.0]
    assert np.asarray(found.values).tolist() == [float(np.float32(0.1))]
    assert found.offsets.tolist() == [0, 1, 1]


def test_a_user_without_recent_events_has_none_in_the_record(tmp_path: Path) -> None:
    as_of = hand_made(
        tmp_path,
        events={"item_id": [7, 7], "time": [10, 20], "price": [None, float("nan")]},
        items={"item_id": [7], "brand": ["a"]},
    )

    record = dict(as_of.user_records(100.0, max_keys=1))[1]

    assert record.recents == {}
    assert record.features["purchases"] == 2.0


@pytest.mark.parametrize("ids", [[1.0, float("nan"), 2.0], [1, None, 2], ["1", None, "2"]])
def test_recent_context_is_one_id_whatever_its_type(tmp_path: Path, ids: list[Any]) -> None:
    events = {"item_id": [7] * 3, "time": [1, 2, 3], "shop": ids}
    as_of = hand_made(tmp_path, events=events)

    found = as_of.recent(as_of.schema.feature("baskets"), log_of([9.0]))  # type: ignore[arg-type]  # a recent one

    assert np.asarray(found["baskets_shop"].values).tolist() == hash_ids(["2", None, "1"]).tolist()


@pytest.mark.parametrize(
    ("price", "reason"),
    [
        (["cheap", "dear"], "column 'price' is String, expected numbers"),
        ([1.0, float("inf")], "column 'price' holds an infinite number"),
    ],
)
def test_a_column_of_events_that_is_no_number_is_named(
    tmp_path: Path, price: list[Any], reason: str
) -> None:
    with pytest.raises(LogError, match=f"events.parquet: {reason}"):
        hand_made(tmp_path, events={"item_id": [7, 7], "time": [1, 2], "price": price})


@pytest.mark.parametrize("name", ["recent", "recent_brands"])
def test_histories_are_the_newest_first(world: World, name: str) -> None:
    feature = history_feature(world, name)

    ragged = world.as_of.history(feature, world.log)

    for i, (user, time) in enumerate(zip(world.log[USER], world.log[TIME], strict=True)):
        before = [
            (world.key(feature.of, event), event["time"])
            for event in world.before(user, time, feature.events)
        ]
        before = [(key, at) for key, at in before if key is not None]
        # Of one instant, the later line of the file is the newer.
        expected = sorted(before, key=lambda pair: pair[1])[::-1][: feature.max_length]
        part = slice(ragged.offsets[i], ragged.offsets[i + 1])
        got = list(zip(ragged.values[part], ragged.times[part], strict=True))  # type: ignore[index]  # a list
        assert got == expected


@pytest.mark.parametrize("as_of", [5 * DAY, 9 * DAY + 3600, 30 * DAY])
def test_records_answer_what_the_log_says_at_the_same_time(world: World, as_of: int) -> None:
    records = dict(world.as_of.user_records(float(as_of), max_keys=100))
    log = pl.DataFrame(
        [(user, float(as_of), key) for user in range(4) for key in range(7)],
        schema=[USER, TIME, "item_id"],
        orient="row",
    ).with_columns(pl.Series("brand", ["a", "b", "c", "other", None, "a", "b"] * 4))

    for name in ("seen_item", "bought_brand"):
        feature = match_feature(world, name)
        keys = log[feature.attribute]
        counts, last_times = world.as_of.matches(feature, log, keys)
        hashes = hash_ids(canonical_ids(keys.to_list()))
        for user in range(4):
            rows = slice(user * 7, user * 7 + 7)
            entries = through_bytes(records[user]).matches.get(name) if user in records else None
            got = look_up(entries, hashes[rows])
            np.testing.assert_array_equal(got[0], counts[rows])
            np.testing.assert_array_equal(got[1], last_times[rows])


def test_record_s_histories_and_scalars_are_the_log_s(world: World) -> None:
    as_of = 9.0 * DAY
    log = pl.DataFrame({USER: list(range(4)), TIME: [as_of] * 4})
    recent = world.as_of.history(history_feature(world, "recent"), log)
    purchases = world.as_of.user_statistic(EventStatistic.model_validate(COUNT), log)
    last = world.as_of.user_statistic(EventStatistic.model_validate(LAST), log)

    records = dict(world.as_of.user_records(as_of, max_keys=100))

    for user in range(4):
        record = through_bytes(records[user])
        part = slice(recent.offsets[user], recent.offsets[user + 1])
        assert list(record.histories["recent"].ids) == recent.values[part]  # type: ignore[index]  # a list
        assert record.histories["recent"].times.tolist() == recent.times[part].tolist()
        assert record.features["purchases"] == purchases[user]
        assert record.features["last_purchase"] == last[user]
        assert record.updated_at == as_of


def through_bytes(record: UserRecord) -> UserRecord:
    return unpack_record(pack_record(record))


@pytest.mark.parametrize("ids", [float, str])
def test_ids_of_another_type_in_the_tables_are_the_same_ids(tmp_path: Path, ids: type) -> None:
    """The log's ids are integers."""
    (tmp_path / "other").mkdir()
    plain = make_world(tmp_path, 1)
    other = make_world(tmp_path / "other", 1, ids=ids)
    log = plain.log

    for name in ("seen_item", "bought_brand"):
        feature = match_feature(plain, name)
        keys = log[feature.attribute]
        np.testing.assert_array_equal(
            other.as_of.matches(feature, log, keys), plain.as_of.matches(feature, log, keys)
        )
    statistic = EventStatistic.model_validate(ITEM_MEAN)
    np.testing.assert_array_equal(
        other.as_of.item_statistic(statistic, log["item_id"], log[TIME].to_numpy()),
        plain.as_of.item_statistic(statistic, log["item_id"], log[TIME].to_numpy()),
    )
    recent = history_feature(plain, "recent")
    values = [
        canonical_ids(world.as_of.history(recent, log).values)  # type: ignore[arg-type]  # a list
        for world in (plain, other)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("ids", [float, str])
def test_records_do_not_depend_on_the_type_of_ids(tmp_path: Path, ids: type) -> None:
    (tmp_path / "other").mkdir()
    plain, other = (
        {
            canonical_ids([user])[0]: through_bytes(record)
            for user, record in world.as_of.user_records(9.0 * DAY, max_keys=100)
        }
        for world in (make_world(tmp_path, 2), make_world(tmp_path / "other", 2, ids=ids))
    )

    assert set(plain) == set(other)
    for user, record in plain.items():
        assert other[user].features == record.features
        for name, entries in record.matches.items():
            assert other[user].matches[name].keys.tolist() == entries.keys.tolist()
            assert other[user].matches[name].counts.tolist() == entries.counts.tolist()
        recent = [r.histories["recent"].ids for r in (record, other[user]) if r.histories]
        assert all(canonical_ids(ids) == canonical_ids(recent[0]) for ids in recent)


def hand_made(
    path: Path,
    *,
    events: dict[str, Any],
    items: dict[str, Any] | None = None,
    users: dict[str, Any] | None = None,
    lag: int = 0,
    described: Schema | None = None,
) -> AsOf:
    """Tables by hand; events get a user 1 and an event `buy` where they do not say."""
    length = len(events["time"])
    columns = {"user_id": [1] * length, "event": ["buy"] * length, "price": [1.0] * length}
    columns["shop"] = ["s1"] * length
    tables = {"events": {**columns, **events}, "items": items, "users": users}
    paths = {}
    for name, content in tables.items():
        paths[name] = None if content is None else path / f"{name}.parquet"
        if content is not None:
            pl.DataFrame(content).write_parquet(path / f"{name}.parquet")
    described = schema(lag) if described is None else described
    return AsOf(Tables.read(**paths, schema=described), schema=described)


def log_of(times: list[float], *, user: int = 1) -> pl.DataFrame:
    return pl.DataFrame({USER: [user] * len(times), TIME: times})


def test_events_count_strictly_before(tmp_path: Path) -> None:
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [1000]})
    log = log_of([999.0, 1000.0, 1000.5, 1001.0])

    counts, _ = as_of.matches(schema().feature("seen_item"), log, pl.Series([7] * 4))  # type: ignore[arg-type]  # a match

    assert counts.tolist()[2:] == [1.0, 1.0]
    assert np.isnan(counts[:2]).all()


def test_events_become_known_after_the_lag(tmp_path: Path) -> None:
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [1000]}, lag=60)
    log = log_of([1060.0, 1061.0])

    counts, last_times = as_of.matches(as_of.schema.feature("seen_item"), log, pl.Series([7, 7]))  # type: ignore[arg-type]  # a match

    assert np.isnan(counts[0])
    assert (counts[1], last_times[1]) == (1.0, 1000.0)


def test_events_of_one_instant_are_one_occasion(tmp_path: Path) -> None:
    events = {"item_id": [7, 7, 7, 8], "time": [10, 10, 20, 10]}
    as_of = hand_made(tmp_path, events=events)

    counts, _ = as_of.matches(schema().feature("seen_item"), log_of([30.0] * 2), pl.Series([7, 8]))  # type: ignore[arg-type]  # a match

    assert counts.tolist() == [2.0, 1.0]


def test_an_item_s_attribute_is_that_of_the_event_s_time(tmp_path: Path) -> None:
    items = {"item_id": [7, 7], "brand": ["old", "new"], "time": [0, 100]}
    as_of = hand_made(tmp_path, events={"item_id": [7] * 3, "time": [99, 100, 101]}, items=items)

    counts, _ = as_of.matches(
        schema().feature("bought_brand"),  # type: ignore[arg-type]  # a match
        log_of([200.0] * 2),
        pl.Series(["old", "new"]),
    )

    assert counts.tolist() == [1.0, 2.0]


def test_attributes_without_times_hold_always(tmp_path: Path) -> None:
    items = {"item_id": [7], "brand": ["a"]}
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [5]}, items=items)

    rows = as_of.attribute_rows(
        as_of.tables.items,  # type: ignore[arg-type]  # given above
        "item_id",
        pl.Series([8, 7]),
        np.array([-1e9, -1e9]),
    )

    assert rows.tolist() == [-1, 0]


def test_attribute_rows_are_those_valid_at_the_time(tmp_path: Path) -> None:
    items = {"item_id": [7, 7], "brand": ["old", "new"], "time": [0, 100]}
    as_of = hand_made(tmp_path, events={"item_id": [7], "time": [5]}, items=items)

    rows = as_of.attribute_rows(
        as_of.tables.items,  # type: ignore[arg-type]  # given above
        "item_id",
        pl.Series([7, 7, 7, 7]),
        np.array([100.0, -1.0, 0.0, 99.0]),
    )

    assert rows.tolist() == [1, -1, 0, 0]


def test_records_keep_the_newest_keys_in_hash_order(tmp_path: Path) -> None:
    events = {"item_id": [1, 2, 3, 4, 1], "time": [10, 20, 30, 40, 25]}
    as_of = hand_made(tmp_path, events=events, items={"item_id": [1], "brand": ["a"]})

    record = dict(as_of.user_records(100.0, max_keys=2))[1]

    entries = record.matches["seen_item"]
    assert sorted(entries.keys.tolist()) == sorted(hash_ids(["3", "4"]).tolist())
    assert (entries.keys[1:] > entries.keys[:-1]).all()


def test_records_leave_out_what_is_older_than_max_age_days(tmp_path: Path) -> None:
    events = {"item_id": [1, 2], "time": [0, 1]}
    items = {"item_id": [1, 2], "brand": ["a", "b"]}
    as_of = hand_made(tmp_path, events=events, items=items)

    record = dict(as_of.user_records(5.0 * DAY + 1, max_keys=10))[1]

    assert record.matches["bought_lately"].keys.tolist() == hash_ids(["b"]).tolist()
    assert len(record.matches["bought_brand"].keys) == 2


def test_known_users_are_those_with_attributes_or_earlier_events(tmp_path: Path) -> None:
    as_of = hand_made(
        tmp_path,
        events={"user_id": [1, 2], "item_id": [7, 7], "time": [10, 50]},
        items={"item_id": [7], "brand": ["a"]},
        users={"user_id": [3], "town": ["x"]},
    )

    records = dict(as_of.user_records(50.0, max_keys=10))

    assert sorted(records) == [1, 3]  # type: ignore[type-var]  # integers
    assert records[3].features["town"] == "x"
    assert records[3].matches == {}


def test_records_of_some_users_only(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)

    everyone = dict(world.as_of.user_records(9.0 * DAY, max_keys=10))
    some = dict(world.as_of.user_records(9.0 * DAY, max_keys=10, only=pl.Series([2, 77])))

    assert list(some) == [2]
    assert pack_record(some[2]) == pack_record(everyone[2])


def test_records_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    world = make_world(tmp_path, 3)

    first, second = (
        [pack_record(record) for _, record in world.as_of.user_records(9.0 * DAY, max_keys=2)]
        for _ in range(2)
    )

    assert first == second


def test_records_have_the_users_attributes_as_of_the_time(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)

    towns = {
        as_of: dict(world.as_of.user_records(as_of, max_keys=1))[1].features["town"]
        for as_of in (6.0 * DAY - 1, 6.0 * DAY)
    }

    assert list(towns.values()) == ["y", "z"]


def test_item_snapshot_has_every_item_as_of_the_time(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)

    snapshot = world.as_of.item_snapshot(5.0 * DAY).sort("item_id")

    assert snapshot["item_id"].to_list() == [0, 1, 2, 3]  # item 4 comes on day 7
    assert snapshot["brand"].to_list() == ["b", "b", "c", None]
    assert snapshot["size"].to_list() == [2, 3, 5, 6]
    assert TIME not in snapshot.columns


def test_item_snapshot_has_the_log_s_statistics(world: World) -> None:
    as_of = 9.0 * DAY
    snapshot = world.as_of.item_snapshot(as_of)
    time = np.full(len(snapshot), as_of)

    statistics = {
        f.name: f.statistic
        for f in world.as_of.schema.features
        if isinstance(f, Numeric) and f.scope == "item" and f.statistic is not None
    }
    assert len(statistics) == len(ITEM_STATISTICS)
    for name, parsed in statistics.items():
        logged = world.as_of.item_statistic(parsed, snapshot[str(parsed.attribute)], time)
        np.testing.assert_array_equal(
            snapshot[name].cast(pl.Float64).fill_null(np.nan).to_numpy(), logged
        )


def test_snapshot_rows_encode_like_rows_of_the_log(tmp_path: Path) -> None:
    world = make_world(tmp_path, 0)
    encoder = Encoder(
        FittedSchema(schema=world.as_of.schema, vocabularies={"brand": ("b", "c")}, moments={})
    )
    snapshot = world.as_of.item_snapshot(9.0 * DAY).sort("item_id")

    block = encoder.candidate_block(
        {name: snapshot[name].to_list() for name in ("item_id", "brand", "brand_sales")},
        time=np.full(len(snapshot), 9.0 * DAY),
    )

    assert block.ids[:, encoder.candidate_layout.ids.index("brand")].tolist() == [3, 2, 4, 1, 4]


@pytest.mark.parametrize("missing", ["user_id", "item_id", "time", "event", "price", "shop"])
def test_a_missing_event_column_is_named(tmp_path: Path, missing: str) -> None:
    make_world(tmp_path, 0)
    pl.read_parquet(tmp_path / "events.parquet").drop(missing).write_parquet(
        tmp_path / "cut.parquet"
    )

    with pytest.raises(LogError, match=f"cut.parquet has no column '{missing}'"):
        Tables.read(events=tmp_path / "cut.parquet", items=None, users=None, schema=schema())


def test_an_item_that_is_there_twice_without_times_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": [1, 1]}).write_parquet(tmp_path / "items.parquet")

    with pytest.raises(LogError, match="a 'item_id' is there twice, without a 'time' column"):
        Tables.read(events=None, items=tmp_path / "items.parquet", users=None, schema=schema())


def test_features_of_events_need_events(tmp_path: Path) -> None:
    as_of = AsOf(Tables(events=None, items=None, users=None), schema=schema())

    with pytest.raises(LogError, match="made from events, but no events are given"):
        as_of.matches(schema().feature("seen_item"), log_of([1.0]), pl.Series([1]))  # type: ignore[arg-type]  # a match


def test_an_attribute_that_no_item_has_is_named(tmp_path: Path) -> None:
    as_of = hand_made(
        tmp_path, events={"item_id": [1], "time": [1]}, items={"item_id": [1], "size": [3]}
    )

    with pytest.raises(LogError, match="the item attributes have no column 'brand'"):
        as_of.matches(schema().feature("bought_brand"), log_of([2.0]), pl.Series(["a"]))  # type: ignore[arg-type]  # a match


def test_a_snapshot_needs_items(tmp_path: Path) -> None:
    as_of = hand_made(tmp_path, events={"item_id": [1], "time": [1]})

    with pytest.raises(LogError, match="there is no item snapshot"):
        as_of.item_snapshot(10.0)


def test_records_need_events_or_users() -> None:
    as_of = AsOf(Tables(events=None, items=None, users=None), schema=schema())

    with pytest.raises(LogError, match="there is no record"):
        list(islice(as_of.user_records(1.0, max_keys=1), 1))


def test_a_user_s_time_stamp_is_unix_seconds_in_the_record(tmp_path: Path) -> None:
    declared = parse_schema(
        {
            "steps": [{"name": "a", "label": "a"}, {"name": "b", "label": "b"}],
            "features": [
                {"name": "signup", "kind": "elapsed", "scope": "user", "source": "store"},
                {
                    "name": "item_id",
                    "kind": "hashed",
                    "scope": "item",
                    "source": "items",
                    "num_buckets": 9,
                },
            ],
        }
    )
    users = pl.DataFrame(
        {
            "user_id": [1],
            "signup": pl.Series([1_500_000_000_000_000]).cast(pl.Datetime("us", "UTC")),
        }
    )
    users.write_parquet(tmp_path / "users.parquet")
    tables = Tables.read(events=None, items=None, users=tmp_path / "users.parquet", schema=declared)

    records = dict(AsOf(tables, schema=declared).user_records(1_600_000_000.0, max_keys=9))

    assert through_bytes(records[1]).features == {"signup": 1_500_000_000.0}
