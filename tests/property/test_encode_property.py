"""Encoding column by column is encoding row by row, whatever the values."""

from typing import Any

import numpy as np
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DAY, NOON

from model.contract.columns import Dictionary
from model.contract.encode import Encoder
from model.contract.ids import canonical_ids, hash_id, hash_ids
from model.contract.record import RecentEntries, look_up

ENCODER = Encoder(tiny.fitted_schema())
TRAINING_ENCODER = Encoder(tiny.fitted_schema(), serving=False)

ids = st.one_of(
    st.none(),
    st.sampled_from(["acme", "bolt", "7", "25-34", "gold", "none", "0", ""]),
    st.integers(-(2**70), 2**70),
    st.integers(-5, 100).map(float),
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.binary(max_size=4),
    st.just(float("nan")),
)
amounts = st.one_of(st.none(), st.integers(-10, 10**6), st.floats(-1e6, 1e6), st.just(float("nan")))
times = st.one_of(st.none(), st.floats(NOON - 400 * DAY, NOON + 400 * DAY))
histories = st.one_of(st.none(), st.lists(st.tuples(ids, times), max_size=7))

stores = st.one_of(st.none(), st.sampled_from(["1", "2", 2.0, 3, ""]))
ages = st.one_of(st.integers(-30, 400 * 24).map(lambda h: h * 3600.0), st.floats(-1e5, 3e7))
visits = st.one_of(
    st.none(), st.lists(st.tuples(st.floats(0, 1e6, width=32), ages, stores), max_size=8)
)

REQUEST_VALUES = {
    **dict.fromkeys(("age_band", "loyalty"), ids),
    "store_id": st.one_of(stores, ids),
    **dict.fromkeys(("trips", "basket"), amounts),
    "last_trip": times,
    "recent": histories,
    "visits": visits,
}
CANDIDATE_VALUES = {
    **dict.fromkeys(("item_id", "brand", "display"), ids),
    **dict.fromkeys(("price", "discount", "position"), amounts),
    **{f"bought_{name}_count": amounts for name in ("item", "brand")},
    **{f"bought_{name}_last_time": times for name in ("item", "brand")},
}
request_rows = st.lists(st.fixed_dictionaries(REQUEST_VALUES), min_size=1, max_size=6)
candidate_rows = st.lists(st.fixed_dictionaries(CANDIDATE_VALUES), min_size=1, max_size=6)
seconds = st.floats(NOON - 3 * 365 * DAY, NOON + 3 * 365 * DAY)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if "recent" in columns:
        recent = columns.pop("recent")
        columns["recent"] = [None if h is None else [v for v, _ in h] for h in recent]
        columns["recent_time"] = [None if h is None else [t for _, t in h] for h in recent]
        newest_first = [v and sorted(v, key=lambda visit: visit[1]) for v in columns.pop("visits")]
        for name, part in (("visits", 0), ("visits_time", 1), ("visits_store_id", 2)):
            columns[name] = [v and [visit[part] for visit in v] for v in newest_first]
        columns["visits_time"] = [t and [NOON - age for age in t] for t in columns["visits_time"]]
    return columns


@settings(max_examples=80, deadline=None)
@given(rows=request_rows, time=seconds, serving=st.booleans())
def test_a_block_of_requests_is_its_requests_one_by_one(
    rows: list[dict[str, Any]], time: float, serving: bool
) -> None:
    encoder = ENCODER if serving else TRAINING_ENCODER
    at = time + np.arange(len(rows)) * 5000.0

    together = encoder.request_block(columns_of(rows), time=at)

    for i, row in enumerate(rows):
        alone = encoder.request_block(columns_of([row]), time=at[i : i + 1])
        np.testing.assert_array_equal(together.ids[i], alone.ids[0])
        np.testing.assert_array_equal(together.dense[i], alone.dense[0])
        np.testing.assert_array_equal(together.history[i], alone.history[0])


def stored_recents(columns: dict[str, list[Any]]) -> dict[str, RecentEntries]:
    """The visits of one row as a record holds them, with times in whole seconds."""
    if columns["visits"][0] is None:
        return {}
    return {
        "visits": RecentEntries(
            values=np.array(columns["visits"][0], np.float32),
            times=np.array(columns["visits_time"][0], np.float64).astype(np.int64),
            keys=hash_ids(canonical_ids(columns["visits_store_id"][0])),
        )
    }


@settings(max_examples=150, deadline=None)
@given(row=st.fixed_dictionaries(REQUEST_VALUES), time=seconds, serving=st.booleans())
def test_a_row_by_itself_is_a_row_of_a_block(
    row: dict[str, Any], time: float, serving: bool
) -> None:
    encoder = ENCODER if serving else TRAINING_ENCODER
    columns = columns_of([row])
    recents = stored_recents(columns)
    if recents:
        columns["visits_time"] = [recents["visits"].times.tolist()]
    lists = {name: column for name, column in columns.items() if isinstance(column[0], list)}

    block = encoder.request_block(columns, time=np.array([time]))
    alone = encoder.row.encode(
        {name: column[0] for name, column in columns.items() if name not in lists},
        time=time,
        recents=recents,
        histories={name: lists[name] for name in ("recent", "recent_time") if name in lists},
    )

    for name in ("ids", "dense", "history"):
        expected = getattr(block, name)
        assert getattr(alone, name).tobytes() == expected.tobytes()
        assert getattr(alone, name).dtype == expected.dtype


@settings(max_examples=80, deadline=None)
@given(rows=candidate_rows, time=seconds, serving=st.booleans())
def test_a_block_of_candidates_is_its_candidates_one_by_one(
    rows: list[dict[str, Any]], time: float, serving: bool
) -> None:
    encoder = ENCODER if serving else TRAINING_ENCODER
    at = time + np.arange(len(rows)) * 5000.0

    together = encoder.candidate_block(columns_of(rows), time=at)

    for i, row in enumerate(rows):
        alone = encoder.candidate_block(columns_of([row]), time=at[i : i + 1])
        np.testing.assert_array_equal(together.ids[i], alone.ids[0])
        np.testing.assert_array_equal(together.dense[i], alone.dense[0])


@settings(max_examples=80, deadline=None)
@given(rows=request_rows, candidates=candidate_rows, time=seconds)
def test_every_code_is_in_its_table_and_every_number_finite(
    rows: list[dict[str, Any]], candidates: list[dict[str, Any]], time: float
) -> None:
    request = ENCODER.request_block(columns_of(rows), time=np.full(len(rows), time))
    candidate = ENCODER.candidate_block(columns_of(candidates), time=np.full(len(candidates), time))

    for block, layout in (
        (request, ENCODER.request_layout),
        (candidate, ENCODER.candidate_layout),
    ):
        sizes = [ENCODER.table_size(name) for name in layout.ids]
        assert (block.ids >= 1).all()
        assert (block.ids < sizes).all()
        assert np.isfinite(block.dense).all()
    assert (request.history >= 0).all()
    assert (request.history < ENCODER.table_size("item_id")).all()


@settings(max_examples=80, deadline=None)
@given(values=st.lists(ids, min_size=1, max_size=8), data=st.data())
def test_a_dictionary_column_is_its_list(values: list[Any], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(-1, len(values) - 1), max_size=12))
    as_list = [None if i < 0 else values[i] for i in index]

    for name in ("brand", "loyalty", "item_id"):
        dictionary = Dictionary(values=values, index=np.array(index, np.int64))
        codes = ENCODER.encode_ids(name, dictionary)
        assert codes.tolist() == ENCODER.encode_ids(name, as_list).tolist()


@settings(max_examples=80, deadline=None)
@given(
    seen=st.dictionaries(
        st.integers(0, 40).map(str), st.tuples(st.integers(1, 9), st.integers(0, 10**9))
    ),
    asked=st.lists(st.integers(0, 60).map(str), max_size=20),
)
def test_look_up_is_a_dictionary(seen: dict[str, tuple[int, float]], asked: list[str]) -> None:
    keys = np.array([hash_id(value) for value in asked], np.uint64)

    counts, last_times = look_up(tiny.match_entries(seen), keys)

    expected = [seen.get(value, (np.nan, np.nan)) for value in asked]
    np.testing.assert_array_equal(counts, [count for count, _ in expected])
    np.testing.assert_array_equal(last_times, [time for _, time in expected])
