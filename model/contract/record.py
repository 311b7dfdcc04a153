"""The user record: what the online store holds of one user, as raw values in versioned msgpack.

Raw, never encoded: every bundle can read it, so that a swap, a canary and a roll-back share one
store. A field that is absent is missing; a field that the schema does not know is ignored.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

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


# Made for every request: a struct is made in a fifth of the time of a frozen dataclass.
class MatchEntries(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a user did with the values of one attribute.

    Attributes:
        keys: uint64 [k], ascending `hash_id` of the values, no repeats.
        counts: uint32 [k], events per value.
        last_times: int64 [k], unix seconds of the last event per value.
    """

    keys: Keys
    counts: Counts
    last_times: Times


class HistoryEntries(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A user's newest events of one kind, newest first: ids [k] and unix seconds int64 [k]."""

    ids: tuple[str | int, ...]
    times: Times


class RecentEntries(msgspec.Struct, frozen=True, kw_only=True, eq=False):
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


class MatchTable(Mapping[str, MatchEntries]):
    """The entries of all match features of one record, one after another. Immutable.

    Before, between and behind them stands an end, which is a NO_KEY that was seen 0 times: so all
    features are searched, compared and gathered as one array, and a place past the last key of one
    is never the first key of the next.
    """

    __slots__ = ("_counts", "_keys", "_last_times", "_spans")

    def __init__(
        self, keys: Keys, counts: Counts, last_times: Times, spans: Mapping[str, tuple[int, int]]
    ) -> None:
        """Checks the keys.

        Args:
            keys: uint64 [K], ends among them, as are
            counts: uint32 [K] and
            last_times: int64 [K].
            spans: where the entries of each feature begin and stop, by its name.

        Raises:
            RecordError: keys of a feature are not strictly ascending.
        """
        self._keys, self._last_times, self._spans = keys, last_times, spans
        # The end behind each feature is the one key that may be no larger than that before it.
        if np.count_nonzero(keys[1:] <= keys[:-1]) != len(spans):
            for name, (start, stop) in spans.items():
                _require_ascending(name, keys[start:stop])
            # A feature begins with a NO_KEY of its own, which stands for no value.
            counts = np.where(keys == NO_KEY, np.uint32(0), counts)
        self._counts = counts

    def __getitem__(self, name: str) -> MatchEntries:
        span = slice(*self._spans[name])
        return MatchEntries(
            keys=self._keys[span], counts=self._counts[span], last_times=self._last_times[span]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    @classmethod
    def of(cls, matches: Mapping[str, MatchEntries]) -> "MatchTable":
        """Entries that were checked; those of a record that was read are a table already."""
        if isinstance(matches, cls):
            return matches
        return _join({name: _wire_match(entries) for name, entries in matches.items()})

    def find(self, names: Sequence[str], keys: Keys) -> npt.NDArray[np.float64]:
        """`look_up` in m features at once, each for its column of keys [n, m].

        Returns:
            Counts, 0 where there is none, and last times, of no meaning there: [2, m, n].
        """
        wanted = np.ascontiguousarray(keys.T)
        places = np.zeros(wanted.shape, np.intp)  # the first end
        for j, name in enumerate(names):
            span = self._spans.get(name)
            if span is not None:
                start, stop = span
                np.add(self._keys[start:stop].searchsorted(wanted[j]), start, out=places[j])
        numbers = np.empty((2, len(self._keys)), np.float64)
        numbers[0], numbers[1] = self._counts, self._last_times
        found: npt.NDArray[np.float64] = numbers.take(places, axis=1)
        # A wanted NO_KEY may be at an end, whose count is 0.
        found[0] *= self._keys.take(places) == wanted
        return found


class UserRecord(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One user's record.

    Attributes:
        updated_at: unix seconds as of which the record was made.
        features: scalar raw values by raw column name; times as unix seconds.
        matches: by match feature name.
        histories: by history feature name.
        recents: by recent feature name.
    """

    updated_at: float
    features: Mapping[str, RawValue] = {}
    matches: Mapping[str, MatchEntries] = {}
    histories: Mapping[str, HistoryEntries] = {}
    recents: Mapping[str, RecentEntries] = {}


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


_KEY, _COUNT, _TIME, _VALUE = (np.dtype(name) for name in ("<u8", "<u4", "<i8", "<f4"))
_BITS = np.dtype("<u4")
_FOUR_ZEROS, _EIGHT_ZEROS = bytes(4), bytes(8)
_INFINITY_BITS = 0x7F800000  # of float32; those of a smaller number of 0 or more are less

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
            matches={name: _wire_match(entries) for name, entries in record.matches.items()},
            histories={
                name: _WireHistory(
                    ids=list(history.ids), times=history.times.astype(_TIME).tobytes()
                )
                for name, history in record.histories.items()
            },
            # Left out where there is none: such a record's bytes stay those of earlier releases.
            recents={
                name: _WireRecent(
                    values=entries.values.astype(_VALUE).tobytes(),
                    times=entries.times.astype(_TIME).tobytes(),
                    keys=entries.keys.astype(_KEY).tobytes(),
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
    histories: dict[str, HistoryEntries] = {}
    recents: dict[str, RecentEntries] = {}
    try:
        for name, history in wire.histories.items():
            histories[name] = HistoryEntries(
                ids=tuple(history.ids), times=np.frombuffer(history.times, _TIME)
            )
        for name, recent in (wire.recents or {}).items():
            recents[name] = RecentEntries(
                values=np.frombuffer(recent.values, _VALUE),
                times=np.frombuffer(recent.times, _TIME),
                keys=np.frombuffer(recent.keys, _KEY),
            )
    except ValueError as exc:
        raise RecordError(f"an array's length does not fit its type: {exc}") from exc
    _check_events(histories, recents)
    return UserRecord(
        updated_at=wire.updated_at,
        features=wire.features,
        matches=_join(wire.matches),
        histories=histories,
        recents=recents,
    )


def _wire_match(entries: MatchEntries) -> _WireMatch:
    return _WireMatch(
        keys=entries.keys.astype(_KEY).tobytes(),
        counts=entries.counts.astype(_COUNT).tobytes(),
        last_times=entries.last_times.astype(_TIME).tobytes(),
    )


def _join(matches: Mapping[str, _WireMatch]) -> MatchTable:
    # An end before, between and behind the features.
    keys, counts, last_times = [b""], [b""], [b""]
    spans = {}
    start = 1
    for name, entries in matches.items():
        number = len(entries.counts) // 4
        if not (
            len(entries.keys) == 8 * number
            and len(entries.counts) == 4 * number
            and len(entries.last_times) == 8 * number
        ):
            raise _misfit(name, entries)
        keys.append(entries.keys)
        counts.append(entries.counts)
        last_times.append(entries.last_times)
        spans[name] = start, start + number
        start += number + 1
    for parts in (keys, counts, last_times):
        parts.append(b"")
    return MatchTable(
        np.frombuffer(_EIGHT_ZEROS.join(keys), _KEY),
        np.frombuffer(_FOUR_ZEROS.join(counts), _COUNT),
        np.frombuffer(_EIGHT_ZEROS.join(last_times), _TIME),
        spans,
    )


def _misfit(name: str, entries: _WireMatch) -> RecordError:
    fits = not (len(entries.keys) % 8 or len(entries.counts) % 4 or len(entries.last_times) % 8)
    reason = "the three arrays differ in length" if fits else "an array's length fits no number"
    return RecordError(f"match {name!r}: {reason}", where=name)


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


def _check(record: UserRecord) -> None:
    for name, entries in record.matches.items():
        if not len(entries.keys) == len(entries.counts) == len(entries.last_times):
            raise RecordError(f"match {name!r}: the three arrays differ in length", where=name)
        _require_ascending(name, entries.keys)
    _check_events(record.histories, record.recents)


def _check_events(
    histories: Mapping[str, HistoryEntries], recents: Mapping[str, RecentEntries]
) -> None:
    for name, history in histories.items():
        if len(history.ids) != len(history.times):
            raise RecordError(f"history {name!r}: ids and times differ in length", where=name)
    for name, recent in recents.items():
        _check_recent(name, recent)


def _check_recent(name: str, entries: RecentEntries) -> None:
    if len(entries.values) != len(entries.times) or len(entries.keys) not in (
        0,
        len(entries.times),
    ):
        raise RecordError(f"recent {name!r}: the arrays differ in length", where=name)
    if not _are_of_zero_or_more(entries.values):
        raise RecordError(f"recent {name!r}: a value is no number of 0 or more", where=name)
    if np.count_nonzero(entries.times[1:] > entries.times[:-1]):
        raise RecordError(f"recent {name!r}: the newest event is not the first", where=name)


def _are_of_zero_or_more(values: npt.NDArray[np.float32]) -> bool:
    # The bits of such numbers, but for -0.0, are all below those of infinity, NaN and less than 0.
    if not np.count_nonzero(values.view(_BITS) >= _INFINITY_BITS):
        return True
    return bool((values >= 0).all() and (values < np.inf).all())


def _require_ascending(name: str, keys: Keys) -> None:
    if np.count_nonzero(keys[1:] <= keys[:-1]):
        raise RecordError(f"match {name!r}: keys are not strictly ascending", where=name)
