"""Histories and statistics as of a time, for logs, user records and item snapshots alike.

Everything counts events strictly before `time - availability_lag`. Tables of running totals are
made once; a log looks up the last row before each impression, a record takes the last row before T:
the same totals.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.columns import Ragged
from model.contract.errors import LogError
from model.contract.ids import canonical_ids, hash_ids
from model.contract.log_spec import EventStatistic
from model.contract.record import HistoryEntries, MatchEntries, RecentEntries, UserRecord
from model.contract.spec import (
    History,
    Match,
    Numeric,
    RawValue,
    Recent,
    Schema,
    raw_columns,
)
from model.item_statistics import item_totals, item_values
from model.logs import (
    EVENT,
    ITEM,
    KEY,
    TIME,
    USER,
    integral_ids,
    same_type,
    unix_seconds,
)
from model.tables import Tables, listed_history, recent_features

Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint64]


class AsOf:
    """Looks raw columns up as of a time."""

    def __init__(self, tables: Tables, *, schema: Schema) -> None:
        self.schema = schema
        self.tables = tables
        self._totals: dict[tuple[str, tuple[str, ...]], pl.DataFrame] = {}
        self._item_totals: dict[tuple[str | None, ...], pl.DataFrame] = {}
        self._recent: dict[str, tuple[pl.DataFrame, Keys | None]] = {}

    def attribute_rows(
        self, table: pl.DataFrame, on: str, ids: pl.Series, time: Floats
    ) -> npt.NDArray[np.int64]:
        """Row of `table` valid for each id at each time, int64 [n], -1 where there is none."""
        left = pl.DataFrame({on: ids, TIME: time}).with_row_index("_n")
        right = table.select(on, *([TIME] if TIME in table.columns else [])).with_row_index("_row")
        left, right = same_type(left, right, on)
        if TIME in table.columns:
            joined = left.sort(TIME).join_asof(
                right.sort(TIME), on=TIME, by=on, check_sortedness=False
            )
        else:
            joined = left.join(right, on=on, how="left")
        rows = joined.sort("_n")["_row"].cast(pl.Int64).fill_null(-1)
        return rows.to_numpy()

    def matches(self, feature: Match, log: pl.DataFrame, keys: pl.Series) -> tuple[Floats, Floats]:
        """Counts and last times (unix seconds) of each row's key, NaN where there is none.

        Args:
            feature: the match feature.
            log: columns USER and TIME, in the order of the answer.
            keys: each row's value of the feature's attribute.
        """
        found = self._last_before(
            self._running(feature.attribute, feature.events), log.with_columns(keys.alias(KEY))
        )
        # Whole seconds, as a record holds them.
        return _float(found["_count"]), np.floor(_float(found["_last"]))

    def user_statistic(self, statistic: EventStatistic, log: pl.DataFrame) -> Floats:
        """One statistic of each row's user as of its time, float64 [n]."""
        found = self._last_before(self._user_running(statistic), log)
        return self._user_value(statistic, found)

    def item_statistic(self, statistic: EventStatistic, keys: pl.Series, time: Floats) -> Floats:
        """One statistic of each row's attribute value as of its time, float64 [n]."""
        key = (statistic.event, statistic.aggregate, statistic.column, statistic.attribute)
        if key not in self._item_totals:
            keyed = self._keyed(str(statistic.attribute), (statistic.event,))
            self._item_totals[key] = item_totals(keyed, statistic, schema=self.schema)
        return item_values(self._item_totals[key], statistic, keys, time, schema=self.schema)

    def history(self, feature: History, log: pl.DataFrame) -> Ragged:
        """The newest events' values of each row's user, newest first, or the user table's lists."""
        users = self.tables.users
        if users is not None and feature.name in users.columns:
            time = log[TIME].to_numpy()
            rows = self.attribute_rows(users, self.schema.log.user_id, _user_ids(log, self), time)
            return listed_history(users, feature, rows)
        events = self._keyed(feature.of, feature.events).sort(USER, TIME, maintain_order=True)
        rows, offsets = self._newest(events, log, feature.max_length)
        return Ragged(
            values=events[KEY].gather(rows).to_list(),
            times=events[TIME].to_numpy()[rows],
            offsets=offsets,
        )

    def recent(self, feature: Recent, log: pl.DataFrame) -> dict[str, Ragged]:
        """The newest events' numbers, times and context keys, by raw column name, newest first."""
        events, keys = self._recent_events(feature)
        rows, offsets = self._newest(events, log, feature.max_length)
        # As the record holds them: whole seconds and float32, so that both sides see equal numbers.
        times = np.floor(events[TIME].to_numpy()[rows])
        values = events[feature.column].cast(pl.Float32).to_numpy()

        def ragged(flat: npt.NDArray[Any]) -> Ragged:  # Any: numbers, or keys as uint64
            return Ragged(values=flat[rows], times=times, offsets=offsets)

        names = raw_columns(feature)
        columns = {names[0]: ragged(values)}
        if keys is not None:
            columns[names[2]] = ragged(keys)
        return columns

    def _recent_events(self, feature: Recent) -> tuple[pl.DataFrame, Keys | None]:
        """Events with a number, by user and time, and the keys of their context values."""
        if feature.name not in self._recent:
            events = self._events(feature.events)
            events = events.filter(pl.col(feature.column).is_not_null())
            events = events.sort(USER, TIME, maintain_order=True)
            keys = None
            if feature.context is not None:
                distinct, index = _distinct(events[feature.context])
                keys = hash_ids(canonical_ids(distinct))[index]
            self._recent[feature.name] = events.select(USER, TIME, feature.column), keys
        return self._recent[feature.name]

    def _newest(
        self, events: pl.DataFrame, log: pl.DataFrame, max_length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows of `events` (by user, then time) before each log row, newest first, and offsets."""
        running = events.select(
            USER,
            TIME,
            pl.int_range(pl.len()).over(USER).alias("_count") + 1,
            pl.int_range(pl.len()).alias("_end") + 1,
        )
        running = running.group_by(USER, TIME, maintain_order=True).last().sort(TIME)
        found = self._last_before(running, log)
        end = found["_end"].fill_null(0).to_numpy().astype(np.int64)
        count = found["_count"].fill_null(0).to_numpy().astype(np.int64)
        lengths = np.minimum(count, max_length)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return np.repeat(end, lengths) - 1 - place, offsets

    def item_snapshot(self, as_of: float) -> pl.DataFrame:
        """Every item's raw features as of a time: what the service's item table is made from."""
        items = self._items()
        name = self.schema.log.item_id
        ids = items[name].unique(maintain_order=True)
        time = np.full(len(ids), as_of)
        rows = self.attribute_rows(items, name, ids, time)
        snapshot = items.drop(TIME, strict=False)[np.maximum(rows, 0)].filter(pl.Series(rows >= 0))
        time = np.full(len(snapshot), as_of)
        for feature in self.schema.features:
            if isinstance(feature, Numeric) and feature.scope == "item" and feature.statistic:
                keys = snapshot[str(feature.statistic.attribute)]
                values = self.item_statistic(feature.statistic, keys, time)
                snapshot = snapshot.with_columns(pl.Series(feature.name, values).fill_nan(None))
        return snapshot

    def user_records(
        self, as_of: float, *, max_keys: int, only: pl.Series | None = None
    ) -> Iterator[tuple[object, UserRecord]]:
        """Every known user's record as of a time, with at most `max_keys` newest keys per match.

        With `only`, the records of those of them that are known.
        """
        known = self._known_users(as_of)
        if only is not None:
            known = known.filter(known.is_in(only.cast(known.dtype).implode()))
        log = pl.DataFrame({USER: known, TIME: np.full(len(known), as_of)})
        scalars = self._user_scalars(log)
        matches = {
            f.name: self._match_entries(f, as_of, max_keys, known) for f in _matches(self.schema)
        }
        histories = {
            f.name: self.history(f, log) for f in self.schema.features if isinstance(f, History)
        }
        recents = {f.name: self.recent(f, log) for f in recent_features(self.schema)}
        for i, user in enumerate(known.to_list()):
            yield (
                user,
                UserRecord(
                    updated_at=as_of,
                    features={
                        name: values[i] for name, values in scalars.items() if values[i] is not None
                    },
                    matches={n: by_user[user] for n, by_user in matches.items() if user in by_user},
                    histories={
                        name: _entries(ragged, i)
                        for name, ragged in histories.items()
                        if ragged.offsets[i] < ragged.offsets[i + 1]
                    },
                    recents={
                        name: entries
                        for name, columns in recents.items()
                        if len((entries := _recent_entries(columns, i)).times)
                    },
                ),
            )

    def _known_users(self, as_of: float) -> pl.Series:
        parts = []
        if self.tables.events is not None:
            before = self.tables.events.filter(
                pl.col(TIME) < as_of - self.schema.availability_lag_s
            )
            parts.append(before[USER].unique())
        if self.tables.users is not None:
            users = self.tables.users[self.schema.log.user_id].alias(USER)
            parts.append(users.cast(parts[0].dtype) if parts else users)
        if not parts:
            raise LogError("neither events nor user attributes are given: there is no record")
        return pl.concat(parts).drop_nulls().unique().sort()

    def _user_scalars(self, log: pl.DataFrame) -> dict[str, list[RawValue]]:
        scalars: dict[str, list[RawValue]] = {}
        users, time = self.tables.users, log[TIME].to_numpy()
        if users is not None:
            rows = self.attribute_rows(users, self.schema.log.user_id, _user_ids(log, self), time)
        for feature in self.schema.features:
            if feature.scope != "user" or isinstance(feature, History | Recent):
                continue
            statistic = getattr(feature, "statistic", None)
            if statistic is not None:
                values = pl.Series(self.user_statistic(statistic, log)).fill_nan(None)
                scalars[feature.name] = values.to_list()
            elif users is not None and feature.name in users.columns:
                column = users[feature.name]
                if column.dtype.is_temporal():
                    column = pl.Series(unix_seconds(column)).fill_nan(None)
                taken = column.gather(np.maximum(rows, 0)).to_list()
                scalars[feature.name] = [
                    value if row >= 0 else None for value, row in zip(taken, rows, strict=True)
                ]
        return scalars

    def _match_entries(
        self, feature: Match, as_of: float, max_keys: int, users: pl.Series
    ) -> dict[object, MatchEntries]:
        cutoff = as_of - self.schema.availability_lag_s
        running = self._running(feature.attribute, feature.events)
        wanted = running[USER].is_in(users.cast(running[USER].dtype).implode())
        latest = running.filter(wanted, pl.col(TIME) < cutoff).group_by(USER, KEY).last()
        if feature.max_age_days is not None:
            latest = latest.filter(pl.col("_last") >= as_of - feature.max_age_days * 86400.0)
        distinct = latest[KEY].unique()
        hashes = pl.DataFrame({KEY: distinct, "_hash": hash_ids(canonical_ids(distinct.to_list()))})
        # By hash among equally new ones, so that the same tables give the same record.
        latest = latest.join(hashes, on=KEY).sort("_last", "_hash", descending=[True, False])
        latest = latest.group_by(USER).head(max_keys).sort(USER, "_hash")
        return {
            user: MatchEntries(
                keys=part["_hash"].to_numpy(),
                counts=part["_count"].cast(pl.UInt32).to_numpy(),
                last_times=part["_last"].cast(pl.Int64).to_numpy(),
            )
            for (user,), part in latest.partition_by(USER, as_dict=True).items()
        }

    def _items(self) -> pl.DataFrame:
        if self.tables.items is None:
            raise LogError("no item attributes are given: there is no item snapshot")
        return self.tables.items

    def _events(self, names: tuple[str, ...]) -> pl.DataFrame:
        if self.tables.events is None:
            raise LogError("a feature is made from events, but no events are given")
        events = self.tables.events
        return events.filter(pl.col(EVENT).is_in(names)) if names else events

    def _keyed(self, attribute: str, names: tuple[str, ...]) -> pl.DataFrame:
        """Events with the value of an item attribute in KEY; those without one left out."""
        events = self._events(names)
        if attribute == self.schema.log.item_id:
            keyed = events.with_columns(pl.col(ITEM).alias(KEY))
        else:
            items = self._items()
            if attribute not in items.columns:
                raise LogError(f"the item attributes have no column {attribute!r}")
            rows = self.attribute_rows(
                items, self.schema.log.item_id, _item_ids(events, self), events[TIME].to_numpy()
            )
            keys = items[attribute].gather(np.maximum(rows, 0))
            keys = integral_ids(keys, path=None)
            keyed = events.with_columns(keys.alias(KEY)).filter(pl.Series(rows >= 0))
        return keyed.filter(pl.col(KEY).is_not_null())

    def _running(self, attribute: str, names: tuple[str, ...]) -> pl.DataFrame:
        """Running count of occasions per user and key: USER, KEY, TIME, _count, _last.

        Events of one instant are one occasion: ten yoghurts in one basket were bought once.
        """
        cached = self._totals.get((attribute, names))
        if cached is None:
            cached = (
                self._keyed(attribute, names)
                .select(USER, KEY, TIME)
                .unique()
                .sort(TIME)
                .with_columns(
                    pl.int_range(1, pl.len() + 1).over(USER, KEY).alias("_count"),
                    pl.col(TIME).alias("_last"),
                )
                .select(USER, KEY, TIME, "_count", "_last")
            )
            self._totals[attribute, names] = cached
        return cached

    def _user_running(self, statistic: EventStatistic) -> pl.DataFrame:
        events = self._events((statistic.event,))
        value = pl.col(statistic.column) if statistic.column is not None else pl.lit(None)
        return (
            events.group_by(USER, TIME)
            .agg(
                pl.len().alias("_n"),
                value.cast(pl.Float64).sum().alias("_sum"),
                value.is_not_null().sum().alias("_given"),
            )
            .sort(TIME)
            .with_columns(
                pl.col("_n", "_sum", "_given").cum_sum().over(USER),
                pl.col(TIME).alias("_last"),
            )
        )

    def _user_value(self, statistic: EventStatistic, found: pl.DataFrame) -> Floats:
        if statistic.aggregate == "count":
            return _float(found["_n"].fill_null(0))
        if statistic.aggregate == "last_time":
            return _float(found["_last"])
        return _float(found["_sum"] / found["_given"])

    def _last_before(self, running: pl.DataFrame, log: pl.DataFrame) -> pl.DataFrame:
        """The running row strictly before each log row's time less the lag, in the log's order."""
        by = [USER, KEY] if KEY in running.columns else [USER]
        left = log.select(
            pl.int_range(pl.len()).alias("_position"),
            (pl.col(TIME) - self.schema.availability_lag_s).alias(TIME),
            *by,
        )
        for name in by:
            left, running = same_type(left, running, name)
        joined = left.sort(TIME).join_asof(
            running,
            on=TIME,
            by=by,
            allow_exact_matches=False,
            coalesce=True,
            check_sortedness=False,
        )
        return joined.sort("_position")


def _matches(schema: Schema) -> list[Match]:
    return [feature for feature in schema.features if isinstance(feature, Match)]


def _user_ids(log: pl.DataFrame, owner: AsOf) -> pl.Series:
    return log[USER].alias(owner.schema.log.user_id)


def _item_ids(events: pl.DataFrame, owner: AsOf) -> pl.Series:
    return events[ITEM].alias(owner.schema.log.item_id)


def _entries(ragged: Ragged, i: int) -> HistoryEntries:
    start, stop = int(ragged.offsets[i]), int(ragged.offsets[i + 1])
    values = ragged.values
    assert isinstance(values, list)
    return HistoryEntries(
        ids=tuple(values[start:stop]), times=ragged.times[start:stop].astype(np.int64)
    )


def _recent_entries(columns: dict[str, Ragged], i: int) -> RecentEntries:
    events, *keys = columns.values()
    part = slice(int(events.offsets[i]), int(events.offsets[i + 1]))
    return RecentEntries(
        values=np.asarray(events.values, np.float32)[part],
        times=events.times[part].astype(np.int64),
        keys=np.asarray(keys[0].values if keys else [], np.uint64)[part],
    )


def _distinct(series: pl.Series) -> tuple[list[object], npt.NDArray[np.int64]]:
    """Distinct values, null among them if it is there, and each row's place among them."""
    distinct = series.unique(maintain_order=True)
    places = distinct.to_frame("v").with_row_index("i")
    joined = series.to_frame("v").join(
        places, on="v", how="left", maintain_order="left", nulls_equal=True
    )
    return distinct.to_list(), joined["i"].to_numpy().astype(np.int64)


def _float(series: pl.Series) -> Floats:
    return series.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
