from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract.errors import RecordError
from model.contract.ids import NO_KEY, hash_id, hash_ids
from model.contract.record import (
    HistoryEntries,
    MatchEntries,
    MatchTable,
    RecentEntries,
    UserRecord,
    look_up,
    pack_record,
    unpack_record,
)

# In the README: made at 1500000000, age "45-54", item 123 bought 3 times, last at 1499000000.
VECTOR = (
    "85ae7265636f72645f76657273696f6e01aa757064617465645f6174cb41d65a0bc0000000a8666561747572657381a3"
    "616765a534352d3534a76d61746368657381ab626f756768745f6974656d83a46b657973c408820f26f1989fdcc1a663"
    "6f756e7473c40403000000aa6c6173745f74696d6573c408c0ec585900000000a9686973746f7269657380"
)
# As above, without matches, with a history `recent` of item 123 at 1499000000 before item "b" at 5.
HISTORY_VECTOR = (
    "85ae7265636f72645f76657273696f6e01aa757064617465645f6174cb41d65a0bc0000000a8666561747572657380"
    "a76d61746368657380a9686973746f7269657381a6726563656e7482a36964739"
    "27ba162a574696d6573c410c0ec5859000000000500000000000000"
)
# As above, with a recent event of value 1 at 1499000000 in the place of key 258 instead.
RECENT_VECTOR = (
    "86ae7265636f72645f76657273696f6e01aa757064617465645f6174cb41d65a0bc0000000a8666561747572657380"
    "a76d61746368657380a9686973746f7269657380a7726563656e747381a5747269707383a676616c756573c404"
    "0000803fa574696d6573c408c0ec585900000000a46b657973c4080201000000000000"
)


def entries(keys: list[int], counts: list[int], times: list[int]) -> MatchEntries:
    return MatchEntries(
        keys=np.array(keys, np.uint64),
        counts=np.array(counts, np.uint32),
        last_times=np.array(times, np.int64),
    )


def full_record() -> UserRecord:
    return UserRecord(
        updated_at=1_500_000_000.0,
        features={"age": "45-54", "trips": 12, "rate": 0.25, "town": None},
        matches={"bought": entries([3, 2**64 - 1], [7, 2**32 - 1], [-5, 2**62])},
        histories={"recent": HistoryEntries(ids=(5, "b"), times=np.array([9, 4], np.int64))},
        recents={"trips": recent([2.5, 0.0], [9, -4], [2**64 - 1, NO_KEY]), "calls": recent()},
    )


def recent(
    values: Sequence[float] = (), times: Sequence[int] = (), keys: Sequence[int] = ()
) -> RecentEntries:
    return RecentEntries(
        values=np.array(values, np.float32),
        times=np.array(times, np.int64),
        keys=np.array(keys, np.uint64),
    )


def wire(**changes: object) -> bytes:
    """A valid record's map with fields replaced."""
    fields: dict[str, object] = {
        "record_version": 1,
        "updated_at": 1.5e9,
        "features": {},
        "matches": {},
        "histories": {},
    }
    return msgspec.msgpack.encode({**fields, **changes})


def match_bytes(**changes: bytes) -> dict[str, object]:
    fields = {"keys": b"\1" + bytes(7), "counts": b"\1" + bytes(3), "last_times": bytes(8)}
    return {"matches": {"bought": {**fields, **changes}}}


def test_packing_the_documented_record_gives_the_documented_bytes() -> None:
    record = UserRecord(
        updated_at=1_500_000_000.0,
        features={"age": "45-54"},
        matches={"bought_item": entries([hash_id("123")], [3], [1_499_000_000])},
    )

    assert pack_record(record).hex() == VECTOR


def test_unpacking_the_documented_bytes_gives_the_documented_record() -> None:
    record = unpack_record(bytes.fromhex(VECTOR))

    bought = record.matches["bought_item"]
    assert (record.updated_at, record.features) == (1_500_000_000.0, {"age": "45-54"})
    assert bought.keys.tolist() == [13969215623426084738]
    assert bought.counts.tolist() == [3]
    assert bought.last_times.tolist() == [1_499_000_000]
    assert record.histories == {}


def test_readme_quotes_the_vector() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()

    assert VECTOR in readme.replace("\n", "")


def test_history_is_a_list_of_ids_beside_little_endian_times() -> None:
    history = HistoryEntries(ids=(123, "b"), times=np.array([1_499_000_000, 5], np.int64))

    packed = pack_record(UserRecord(updated_at=1.5e9, histories={"recent": history}))

    assert packed.hex() == HISTORY_VECTOR


def test_round_trip_keeps_every_value_and_type() -> None:
    before = full_record()

    after = unpack_record(pack_record(before))

    assert after.updated_at == before.updated_at
    assert after.features == {"age": "45-54", "trips": 12, "rate": 0.25, "town": None}
    bought = after.matches["bought"]
    assert [a.dtype for a in (bought.keys, bought.counts, bought.last_times)] == ["u8", "u4", "i8"]
    assert bought.keys.tolist() == [3, 2**64 - 1]
    assert bought.counts.tolist() == [7, 2**32 - 1]
    assert bought.last_times.tolist() == [-5, 2**62]
    assert after.histories["recent"].ids == (5, "b")
    assert after.histories["recent"].times.tolist() == [9, 4]


def test_round_trip_keeps_recent_events() -> None:
    after = unpack_record(pack_record(full_record()))

    trips = after.recents["trips"]
    assert [a.dtype for a in (trips.values, trips.times, trips.keys)] == ["f4", "i8", "u8"]
    assert trips.values.tolist() == [2.5, 0.0]
    assert trips.times.tolist() == [9, -4]
    assert trips.keys.tolist() == [2**64 - 1, NO_KEY]
    assert len(after.recents["calls"].times) == 0


def test_recent_events_are_little_endian_bytes() -> None:
    packed = pack_record(
        UserRecord(updated_at=1.5e9, recents={"trips": recent([1.0], [1_499_000_000], [258])})
    )

    assert packed.hex() == RECENT_VECTOR


def test_recent_events_may_have_no_context() -> None:
    record = UserRecord(updated_at=0.0, recents={"trips": recent([1.0, 2.0], [5, 4])})

    assert unpack_record(pack_record(record)).recents["trips"].keys.tolist() == []


def test_a_record_without_recent_events_does_not_name_them() -> None:
    """So its bytes are those of releases that did not know them."""
    assert b"recents" not in pack_record(UserRecord(updated_at=0.0))
    assert unpack_record(wire()).recents == {}


def test_absent_fields_are_empty() -> None:
    record = unpack_record(msgspec.msgpack.encode({"record_version": 1, "updated_at": 7}))

    assert record.updated_at == 7.0
    assert (record.features, record.matches, record.histories) == ({}, {}, {})


def test_extra_fields_are_ignored() -> None:
    assert unpack_record(wire(colour={"deep": [1, {"x": 2}]})).updated_at == 1.5e9


def recent_bytes(**changes: bytes) -> dict[str, object]:
    fields = {"values": bytes(4), "times": bytes(8), "keys": bytes(8)}
    return {"recents": {"trips": {**fields, **changes}}}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a user record"),
        (b"\xc1", "not a user record"),
        (b"\x80", "record_version"),
        (b"[]", "not a user record"),
        (wire()[:-1], "truncated"),
        (wire() + b"\0", "not a user record"),
        (wire(record_version=2), "record_version 2 is not known, expected 1"),
        (wire(record_version="1"), "record_version"),
        (wire(updated_at="today"), "updated_at"),
        (wire(updated_at=float("nan")), "updated_at"),
        (wire(updated_at=float("inf")), "updated_at"),
        (wire(features={"x": [1]}), "features"),
        (wire(features=[1]), "features"),
        (wire(matches={"bought": 1}), "matches"),
        (wire(matches={"bought": {"keys": b"", "counts": b""}}), "last_times"),
        (wire(**match_bytes(keys=bytes(7))), "length"),
        (wire(**match_bytes(keys=bytes(16))), "differ in length"),
        (wire(**match_bytes(counts=bytes(5))), "length"),
        (wire(**match_bytes(counts=bytes(8))), "differ in length"),
        (wire(**match_bytes(last_times=b"")), "differ in length"),
        (
            wire(**match_bytes(keys=bytes(16), counts=bytes(8), last_times=bytes(16))),
            "not strictly ascending",
        ),
        (wire(histories={"recent": {"ids": [1], "times": b""}}), "differ in length"),
        (wire(histories={"recent": {"ids": [1], "times": bytes(9)}}), "length"),
        (wire(histories={"recent": {"ids": [[1]], "times": bytes(8)}}), "ids"),
        (wire(**recent_bytes(values=bytes(3))), "length"),
        (wire(**recent_bytes(values=bytes(8))), "'trips'.*differ in length"),
        (wire(**recent_bytes(times=bytes(7))), "length"),
        (wire(**recent_bytes(times=b"")), "'trips'.*differ in length"),
        (wire(**recent_bytes(keys=bytes(9))), "length"),
        (wire(**recent_bytes(keys=bytes(16))), "'trips'.*differ in length"),
        (wire(**recent_bytes(values=b"\0\0\x80\xbf")), "'trips'.*no number of 0 or more"),
        (wire(**recent_bytes(values=b"\0\0\xc0\x7f")), "'trips'.*no number of 0 or more"),
        (wire(**recent_bytes(values=b"\0\0\x80\x7f")), "'trips'.*no number of 0 or more"),
        (wire(recents={"trips": {"values": b"", "times": b""}}), "keys"),
        (wire(recents={"trips": 1}), "recents"),
        (wire(recents=None), "recents"),
        (wire(features={"x": "a"}).replace(b"\xa1a", b"\xa1\xff"), "UTF-8"),
    ],
)
def test_damage_is_a_record_error_that_names_it(data: bytes, named: str) -> None:
    with pytest.raises(RecordError, match=named):
        unpack_record(data)


def test_endless_nesting_is_a_record_error() -> None:
    data = wire()
    nested = b"\x86" + data[1:] + b"\xa1x" + b"\x91" * 100_000 + b"\0"

    with pytest.raises(RecordError, match="nested"):
        unpack_record(nested)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (UserRecord(updated_at=0.0, matches={"m": entries([1, 1], [1, 1], [1, 1])}), "ascending"),
        (UserRecord(updated_at=0.0, matches={"m": entries([2, 1], [1, 1], [1, 1])}), "ascending"),
        (UserRecord(updated_at=0.0, matches={"m": entries([1, 2], [1], [1, 1])}), "length"),
        (
            UserRecord(
                updated_at=0.0, histories={"m": HistoryEntries(ids=(1,), times=np.zeros(2, "i8"))}
            ),
            "length",
        ),
        (UserRecord(updated_at=0.0, recents={"m": recent([1.0], [1, 2])}), "length"),
        (UserRecord(updated_at=0.0, recents={"m": recent([1.0], [1], [1, 2])}), "length"),
        (UserRecord(updated_at=0.0, recents={"m": recent([-1.0], [1])}), "0 or more"),
        (UserRecord(updated_at=0.0, recents={"m": recent([np.nan], [1])}), "0 or more"),
        (UserRecord(updated_at=0.0, recents={"m": recent([1.0, 1.0], [2, 3])}), "newest event"),
    ],
)
def test_a_record_that_could_not_be_read_is_not_written(record: UserRecord, named: str) -> None:
    with pytest.raises(RecordError, match=f"'m'.*{named}"):
        pack_record(record)


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, len(pack_record(full_record())) - 1),
    replacement=st.binary(max_size=6),
    cut=st.integers(0, 6),
)
def test_mutated_bytes_never_raise_anything_but_record_error(
    position: int, replacement: bytes, cut: int
) -> None:
    data = pack_record(full_record())
    mutated = data[:position] + replacement + data[position + cut :]

    try:
        unpack_record(mutated)
    except RecordError as error:
        assert str(error)  # noqa: PT017  # both endings are right


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_never_raise_anything_but_record_error(data: bytes) -> None:
    try:
        unpack_record(data)
    except RecordError as error:
        assert str(error)  # noqa: PT017  # both endings are right


def test_look_up_finds_counts_and_times_in_the_order_asked() -> None:
    table = entries([10, 20, 30], [1, 2, 3], [100, 200, 300])

    counts, times = look_up(table, np.array([30, 10, 30], np.uint64))

    assert counts.tolist() == [3.0, 1.0, 3.0]
    assert times.tolist() == [300.0, 100.0, 300.0]


@pytest.mark.parametrize("key", [0, 5, 15, 35, 2**64 - 1])
def test_look_up_of_what_is_not_there_is_nan(key: int) -> None:
    counts, times = look_up(entries([10, 20, 30], [1, 2, 3], [1, 2, 3]), np.array([key], np.uint64))

    assert np.isnan([counts[0], times[0]]).all()


def test_look_up_of_no_key_finds_nothing_even_where_it_stands() -> None:
    counts, _ = look_up(entries([NO_KEY, 10], [1, 2], [1, 2]), np.array([NO_KEY], np.uint64))

    assert np.isnan(counts).all()


@pytest.mark.parametrize("table", [None, entries([], [], [])])
def test_look_up_without_entries_is_nan(table: MatchEntries | None) -> None:
    counts, times = look_up(table, hash_ids(["1", "2"]))

    assert np.isnan(counts).all()
    assert np.isnan(times).all()
    assert len(counts) == len(times) == 2


def table(**matches: MatchEntries) -> MatchTable:
    return MatchTable.of(
        unpack_record(pack_record(UserRecord(updated_at=0.0, matches=matches))).matches
    )


def test_a_table_finds_in_each_feature_what_look_up_finds() -> None:
    matches = {
        "a": entries([10, 20], [1, 2], [100, 200]),
        "empty": entries([], [], []),
        "b": entries([5, 20, 2**64 - 1], [3, 4, 5], [300, 400, 500]),
    }
    names = ("b", "absent", "a", "empty")
    keys = np.array([NO_KEY, 5, 10, 15, 20, 2**64 - 1], np.uint64)

    counts, times = table(**matches).find(names, np.repeat(keys[:, None], 4, axis=1))

    for j, name in enumerate(names):
        expected_counts, expected_times = look_up(matches.get(name), keys)
        found = ~np.isnan(expected_counts)
        assert counts[j].tolist() == np.nan_to_num(expected_counts).tolist()
        assert times[j, found].tolist() == expected_times[found].tolist()


def test_a_key_of_the_next_feature_is_not_of_the_one_before() -> None:
    both = table(a=entries([1], [1], [1]), b=entries([2], [2], [2]))

    counts, _ = both.find(("a", "b"), np.array([[2, 1]], np.uint64))

    assert counts.tolist() == [[0.0], [0.0]]


def test_a_table_finds_no_key_nowhere_even_where_it_stands() -> None:
    stored = table(a=entries([NO_KEY, 10], [7, 2], [1, 2]), b=entries([NO_KEY], [7], [1]))

    counts, _ = stored.find(("a", "b"), np.array([[NO_KEY, NO_KEY], [10, 10]], np.uint64))

    assert counts.tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_keys_are_checked_feature_by_feature() -> None:
    """The second may begin below the first's last key; within the third one stands twice."""
    first = {"keys": bytes(7) + b"\1", "counts": bytes(4), "last_times": bytes(8)}
    second = {"keys": b"\1" + bytes(7), "counts": bytes(4), "last_times": bytes(8)}
    third = {"keys": (b"\1" + bytes(7)) * 2, "counts": bytes(8), "last_times": bytes(16)}

    assert list(unpack_record(wire(matches={"a": first, "b": second})).matches) == ["a", "b"]
    with pytest.raises(RecordError, match="'c': keys are not strictly ascending"):
        unpack_record(wire(matches={"a": first, "b": second, "c": third}))


def test_minus_zero_is_a_value_of_a_recent_event() -> None:
    record = unpack_record(wire(**recent_bytes(values=b"\0\0\0\x80")))

    assert record.recents["trips"].values.tolist() == [0.0]
