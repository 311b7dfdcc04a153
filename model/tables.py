"""The tables beside a log: events, item attributes, user attributes, read and checked."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.columns import Ragged
from model.contract.errors import LogError
from model.contract.log_spec import EventStatistic
from model.contract.spec import Elapsed, History, Numeric, Recent, Schema
from model.logs import EVENT, ITEM, TIME, USER, integral_ids, read_table, unix_seconds


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Events, item attributes and user attributes of a run; any may be absent."""

    events: pl.DataFrame | None
    items: pl.DataFrame | None
    users: pl.DataFrame | None

    @classmethod
    def read(
        cls, *, events: Path | None, items: Path | None, users: Path | None, schema: Schema
    ) -> "Tables":
        """Reads them and checks the columns that the schema's features name.

        Raises:
            LogError: a column is missing.
        """
        log = schema.log
        event_frame = None
        if events is not None:
            raw = read_table(events)
            _require(raw, (log.user_id, log.item_id, log.time, "event"), events)
            values = {s.column for s in _statistics(schema) if s.column is not None}
            values |= {recent.column for recent in recent_features(schema)}
            contexts = {r.context for r in recent_features(schema) if r.context is not None}
            _require(raw, sorted(values | contexts), events)
            event_frame = raw.with_columns(
                *(_numbers(raw[name], path=events) for name in sorted(values - contexts)),
                *(integral_ids(raw[name], path=events) for name in sorted(contexts)),
                integral_ids(raw[log.user_id], path=events).alias(USER),
                integral_ids(raw[log.item_id], path=events).alias(ITEM),
                pl.Series(TIME, unix_seconds(raw[log.time])),
                pl.col("event").alias(EVENT),
            ).sort(TIME, maintain_order=True)
        return cls(
            events=event_frame,
            items=_attributes(items, log.item_id, log.time),
            users=_attributes(users, log.user_id, log.time),
        )


def recent_features(schema: Schema) -> list[Recent]:
    return [feature for feature in schema.features if isinstance(feature, Recent)]


def listed_history(users: pl.DataFrame, feature: History, rows: npt.NDArray[np.int64]) -> Ragged:
    """A history that the user attributes have as a column of lists of ids.

    An id may take several places of a list: the mean over the places then weighs it so. The times
    are those from which the lists are valid, in whole seconds as a record holds them, or 0.

    Args:
        users: user attributes, with a column of the feature's name.
        feature: the history; longer lists lose their end.
        rows: of `users`, -1 for none, int64 [n].

    Raises:
        LogError: the column holds no lists of ids.
    """
    column = users[feature.name]
    if not isinstance(column.dtype, pl.List):
        raise LogError(f"user attribute {feature.name!r} is {column.dtype}, expected lists of ids")
    # A null row at the end, for users that have none.
    extended = pl.concat([column, pl.Series(column.name, [None], dtype=column.dtype)])
    taken = extended.gather(np.where(rows < 0, len(column), rows)).list.head(feature.max_length)
    lengths = taken.list.len().fill_null(0).to_numpy().astype(np.int64)
    times = np.zeros(len(rows))
    if TIME in users.columns and len(users):
        times = np.floor(users[TIME].to_numpy()[np.maximum(rows, 0)])
    values = taken.filter(pl.Series(lengths > 0)).explode()
    return Ragged(
        values=integral_ids(values, path=None).to_list(),
        times=np.repeat(times, lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _statistics(schema: Schema) -> Iterator[EventStatistic]:
    for feature in schema.features:
        if isinstance(feature, Numeric | Elapsed) and feature.statistic is not None:
            yield feature.statistic


def _numbers(series: pl.Series, *, path: Path) -> pl.Series:
    """Float64, null for NaN: one in a running total would be in all that follow."""
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        raise LogError(
            f"{path}: column {series.name!r} is {series.dtype}, expected numbers", path=path
        )
    numbers = series.cast(pl.Float64).fill_nan(None)
    if numbers.is_infinite().any():
        raise LogError(f"{path}: column {series.name!r} holds an infinite number", path=path)
    return numbers


def _attributes(path: Path | None, key: str, time: str) -> pl.DataFrame | None:
    """Attributes by id, from a time on when the table has a time column."""
    if path is None:
        return None
    frame = read_table(path)
    _require(frame, (key,), path)
    frame = frame.with_columns(integral_ids(frame[key], path=path))
    if time in frame.columns:
        return frame.with_columns(pl.Series(TIME, unix_seconds(frame[time]))).drop(time)
    if frame[key].is_duplicated().any():
        raise LogError(f"{path}: a {key!r} is there twice, without a {time!r} column", path=path)
    return frame


def _require(frame: pl.DataFrame, names: "tuple[str, ...] | list[str]", path: Path) -> None:
    for name in names:
        if name not in frame.columns:
            raise LogError(f"{path} has no column {name!r}", path=path)
