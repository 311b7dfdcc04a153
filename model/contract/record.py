"""The user record: what the online store holds of one user, as raw values in versioned msgpack.

Raw, never encoded: every bundle can read it, so that a swap, a canary and a roll-back share one
store. A field that is absent is missing; a field that the schema does not know is ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from model.contract.errors import RecordError
from model.contract.ids import NO_KEY
from model.contract.spec import RawValue

RECORD_VERSION = 1

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.uint32]
Times = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MatchEntries:
    """What a user did with the values of one attribute.

    Attributes:
        keys: uint64 [k], ascending `hash_id` of the values, no repeats.
        counts: uint32 [k], events per value.
        last_times: int64 [k], unix seconds of the last event per value.
    """

    keys: Keys
    counts: Counts
    last_times: Times


@dataclass(frozen=True, kw_only=True)
class HistoryEntries:
    """A user's newest events of one kind, newest first: ids [k] and unix seconds int64 [k]."""

    ids: tuple[str | int, ...]
    times: Times


@dataclass(frozen=True, kw_only=True)
class RecentEntries:
    """A user's newest events of one recent feature, newest first.

    Attributes:
        values: float32 [k], the number of each.
        times: int64 [k], unix seconds.
        keys: uint64 [k], `hash_id` of each one's context value, NO_KEY for none; empty without a
            context.
    """

    values: npt.NDArray[np.float32]
    times: Times
    keys: Keys


@dataclass(frozen=True, kw_only=True)
class UserRecord:
    """One user's record.

    Attributes:
        updated_at: unix seconds as of which the record was made.
        features: scalar raw values by raw column name; times as unix seconds.
        matches: by match feature name.
        histories: by history feature name.
        recents: by recent feature name.
    """

    updated_at: float
    features: Mapping[str, RawValue] = field(default_factory=dict)
    matches: Mapping[str, MatchEntries] = field(default_factory=dict)
    histories: Mapping[str, HistoryEntries] = field(default_factory=dict)
    recents: Mapping[str, RecentEntries] = field(default_factory=dict)


class _WireMatch(msgspec.Struct):
    keys: bytes
    counts: bytes
    last_times: bytes


class _WireHistory(msgspec.Struct):
    ids: list[str | int]
    times: bytes


class _WireRecent(msgspec.Struct):
    values: bytes
    times: bytes
    keys: bytes


class _WireRecord(msgspec.Struct):
    record_version: int
    updated_at: float
    features: dict[str, str | int | float | None] = {}
    matches: dict[str, _WireMatch] = {}
    histories: dict[str, _WireHistory] = {}
    recents: dict[str, _WireRecent] | msgspec.UnsetType = msgspec.UNSET


class _WireVersion(msgspec.Struct):
    record_version: int


_END = np.array([NO_KEY], np.uint64)
_NO_TIME = np.zeros(1, np.int64)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_WireRecord)
_VERSION_DECODER = msgspec.msgpack.Decoder(_WireVersion)


def pack_record(record: UserRecord) -> bytes:
    """The record's bytes.

    Raises:
        RecordError: arrays of one entry differ in length, or keys are not strictly ascending.
    """
    _check(record)
    return _ENCODER.encode(
        _WireRecord(
            record_version=RECORD_VERSION,
            updated_at=record.updated_at,
            features=dict(record.features),
            matches={
                name: _WireMatch(
                    keys=entries.keys.astype("<u8").tobytes(),
                    counts=entries.counts.astype("<u4").tobytes(),
                    last_times=entries.last_times.astype("<i8").tobytes(),
                )
                for name, entries in record.matches.items()
            },
            histories={
                name: _WireHistory(
                    ids=list(history.ids), times=history.times.astype("<i8").tobytes()
                )
                for name, history in record.histories.items()
            },
            # Left out where there is none: such a record's bytes stay those of earlier releases.
            recents={
                name: _WireRecent(
                    values=entries.values.astype("<f4").tobytes(),
                    times=entries.times.astype("<i8").tobytes(),
                    keys=entries.keys.astype("<u8").tobytes(),
                )
                for name, entries in record.recents.items()
            }
            or msgspec.UNSET,
        )
    )


def unpack_record(data: bytes) -> UserRecord:
    """Reads a record's bytes; the arrays are views of them.

    Raises:
        RecordError: not such a record, of another version, or its arrays do not fit each other.
    """
    try:
        try:
            wire = _DECODER.decode(data)
            version = wire.record_version
        except msgspec.ValidationError:
            # A record of another version may look otherwise, and its version says more.
            version = _VERSION_DECODER.decode(data).record_version
            if version == RECORD_VERSION:
                raise
        if version != RECORD_VERSION:
            raise RecordError(
                f"record_version {version} is not known, expected {RECORD_VERSION}",
                where="record_version",
            )
    except msgspec.MsgspecError as exc:
        raise RecordError(f"not a user record: {exc}", where="record") from exc
    except UnicodeDecodeError as exc:
        raise RecordError("not a user record: text is not UTF-8", where="record") from exc
    except RecursionError as exc:
        raise RecordError("not a user record: nested too deeply", where="record") from exc
    if not math.isfinite(wire.updated_at):
        raise RecordError("updated_at is not a finite number", where="updated_at")
    try:
        matches = {
            name: MatchEntries(
                keys=np.frombuffer(entries.keys, "<u8"),
                counts=np.frombuffer(entries.counts, "<u4"),
                last_times=np.frombuffer(entries.last_times, "<i8"),
            )
            for name, entries in wire.matches.items()
        }
        histories = {
            name: HistoryEntries(ids=tuple(entry.ids), times=np.frombuffer(entry.times, "<i8"))
            for name, entry in wire.histories.items()
        }
        recents = {
            name: RecentEntries(
                values=np.frombuffer(recent.values, "<f4"),
                times=np.frombuffer(recent.times, "<i8"),
                keys=np.frombuffer(recent.keys, "<u8"),
            )
            for name, recent in (wire.recents or {}).items()
        }
    except ValueError as exc:
        raise RecordError(f"an array's length does not fit its type: {exc}") from exc
    record = UserRecord(
        updated_at=wire.updated_at,
        features=wire.features,
        matches=matches,
        histories=histories,
        recents=recents,
    )
    _check(record)
    return record


def look_up(
    entries: MatchEntries | None, keys: Keys
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Counts and last times (unix seconds) of `keys`, float64 [n] each, NaN where there is none.

    `keys` may hold NO_KEY, which matches nothing. O(n log k).
    """
    counts = np.full(len(keys), np.nan)
    times = np.full(len(keys), np.nan)
    if entries is None or not len(entries.keys):
        return counts, times
    position = np.searchsorted(entries.keys, keys)
    position[position == len(entries.keys)] = 0
    found = (entries.keys[position] == keys) & (keys != NO_KEY)
    counts[found] = entries.counts[position[found]]
    times[found] = entries.last_times[position[found]]
    return counts, times


def look_up_many(
    entries: Sequence[MatchEntries | None], keys: Keys
) -> tuple[npt.NDArray[np.float64], Times]:
    """`look_up` of m attributes at once, of keys [n, m].

    The entries are put one after another, so that all but the search is done once.

    Returns:
        Counts [m, n], 0 where there is none, and last times [m, n], of no meaning there.
    """
    wanted = np.ascontiguousarray(keys.T)
    position = np.zeros(wanted.shape, np.intp)
    present = []
    start = 0
    for j, entry in enumerate(entries):
        if entry is not None and len(entry.keys):
            # A place past the end is one of _END, which no key that counts is equal to.
            np.add(entry.keys.searchsorted(wanted[j]), start, out=position[j])
            present.append(entry)
            start += len(entry.keys) + 1
        else:
            wanted[j] = NO_KEY
    if not present:
        return np.zeros(wanted.shape, np.float64), np.zeros(wanted.shape, np.int64)
    stored = np.concatenate([part for e in present for part in (e.keys, _END)])
    counts = np.concatenate([part for e in present for part in (e.counts, _END)])
    times = np.concatenate([part for e in present for part in (e.last_times, _NO_TIME)])
    is_there = (stored.take(position) == wanted) & (wanted != NO_KEY)
    return np.where(is_there, counts.take(position), 0.0), times.take(position)


def _check(record: UserRecord) -> None:
    for name, entries in record.matches.items():
        _check_match(name, entries)
    for name, history in record.histories.items():
        if len(history.ids) != len(history.times):
            raise RecordError(f"history {name!r}: ids and times differ in length", where=name)
    for name, recent in record.recents.items():
        _check_recent(name, recent)


def _check_recent(name: str, entries: RecentEntries) -> None:
    if len(entries.values) != len(entries.times) or len(entries.keys) not in (
        0,
        len(entries.times),
    ):
        raise RecordError(f"recent {name!r}: the arrays differ in length", where=name)
    # The least and the largest, as NaN is neither above 0 nor below infinity.
    if len(entries.values) and not (entries.values.min() >= 0 and entries.values.max() < np.inf):
        raise RecordError(f"recent {name!r}: a value is no number of 0 or more", where=name)
    if (entries.times[1:] > entries.times[:-1]).any():
        raise RecordError(f"recent {name!r}: the newest event is not the first", where=name)


def _check_match(name: str, entries: MatchEntries) -> None:
    if not len(entries.keys) == len(entries.counts) == len(entries.last_times):
        raise RecordError(f"match {name!r}: the three arrays differ in length", where=name)
    if (entries.keys[1:] <= entries.keys[:-1]).any():
        raise RecordError(f"match {name!r}: keys are not strictly ascending", where=name)
