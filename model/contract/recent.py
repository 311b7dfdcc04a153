"""Numbers about a user's newest events as of a request, for `Recent` features."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.columns import Floats, Ids, Ragged
from model.contract.spec import Recent
from model.contract.times import SECONDS_PER_DAY

NEAR_HOURS = 2.0  # events within so many hours of the request's time of day are "at this hour"
PRIOR_EVENTS = 2.0  # a mean of few events leans on the user's own mean as if by so many more

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class RecentColumn:
    """Events of R requests' users, newest first.

    Attributes:
        events: flat values [total] (numbers) and times (unix seconds), offsets [R + 1].
        keys: uint64 [total], hash of the event's context value; None without a context.
    """

    events: Ragged
    keys: Keys | None


def recent_statistics(
    feature: Recent, column: RecentColumn, *, time: Floats, utc_offset: Floats, here: Keys | None
) -> dict[str, Floats]:
    """The feature's statistics by name, float64 [R] each, NaN where there is nothing to tell.

    Counts and days are log1p'd, means are of log1p of the values. A mean of the events at this
    hour, on this weekday or here is shrunk to that of all the user's events.

    Args:
        feature: says which statistics.
        column: its events; those after the request's time are left out.
        time: unix seconds of the requests [R].
        utc_offset: seconds [R] to add for local time.
        here: key of each request's context value [R]; None without a context.
    """
    seen = _Seen.of(column, time, max_length=feature.max_length)
    local = time + utc_offset
    hour = np.abs(_clock(seen.times + utc_offset[seen.row]) - _clock(local)[seen.row])
    near = np.minimum(hour, 24.0 - hour) <= NEAR_HOURS
    same_day = _weekday(seen.times + utc_offset[seen.row]) == _weekday(local)[seen.row]
    parts: dict[str, Floats] = {}
    for days in feature.windows_days:
        within = seen.age_days <= days
        parts[f"count_{days}"] = seen.count(within)
        parts[f"mean_{days}"] = seen.mean(within)
    parts["last"] = seen.at(0, np.log1p(seen.values))
    parts["gap"] = np.log1p(seen.at(1, seen.age_days) - seen.at(0, seen.age_days))
    parts["hour_count"], parts["hour_mean"] = seen.count(near), seen.shrunk_mean(near)
    parts["weekday_count"], parts["weekday_mean"] = seen.count(same_day), seen.shrunk_mean(same_day)
    if feature.large is not None:
        parts["large_days"] = seen.days_since(seen.values >= feature.large)
    if feature.context is not None:
        matching = np.zeros(len(seen.row), np.bool_)
        if here is not None and seen.keys is not None:
            matching = (seen.keys == here[seen.row]) & (seen.keys != 0)
        parts["here_count"], parts["here_mean"] = seen.count(matching), seen.shrunk_mean(matching)
        parts["here_days"] = seen.days_since(matching)
    return {f"{feature.name}_{name}": values for name, values in parts.items()}


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Events up to each request's time, flat: row of each, its place among its row's."""

    num_rows: int
    row: Ids
    place: Ids
    values: Floats
    times: Floats
    age_days: Floats
    keys: Keys | None

    @classmethod
    def of(cls, column: RecentColumn, time: Floats, *, max_length: int) -> "_Seen":
        events = column.events
        row = np.repeat(np.arange(len(time)), np.diff(events.offsets))
        keep = np.flatnonzero(events.times <= time[row])
        row = row[keep]
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(time)))[:-1]])
        place = np.arange(len(row)) - starts[row]
        fits = place < max_length
        keep, row, place = keep[fits], row[fits], place[fits]
        times = events.times[keep]
        return cls(
            num_rows=len(time),
            row=row,
            place=place,
            values=np.asarray(events.values, np.float64)[keep],
            times=times,
            age_days=(time[row] - times) / SECONDS_PER_DAY,
            keys=None if column.keys is None else column.keys[keep],
        )

    def count(self, mask: npt.NDArray[np.bool_]) -> Floats:
        counts: Floats = np.log1p(np.bincount(self.row[mask], minlength=self.num_rows))
        return counts

    def mean(self, mask: npt.NDArray[np.bool_]) -> Floats:
        total, number = self._sums(mask)
        with np.errstate(invalid="ignore"):
            mean: Floats = total / number
        return mean

    def shrunk_mean(self, mask: npt.NDArray[np.bool_]) -> Floats:
        overall = self.mean(np.ones(len(self.row), np.bool_))
        total, number = self._sums(mask)
        shrunk: Floats = (total + PRIOR_EVENTS * overall) / (number + PRIOR_EVENTS)
        return shrunk

    def days_since(self, mask: npt.NDArray[np.bool_]) -> Floats:
        days = np.full(self.num_rows, np.inf)
        np.minimum.at(days, self.row[mask], self.age_days[mask])
        return np.log1p(np.where(np.isinf(days), np.nan, days))

    def at(self, place: int, values: Floats) -> Floats:
        """The place-th newest event's value, NaN where there are fewer."""
        found = np.full(self.num_rows, np.nan)
        mask = self.place == place
        found[self.row[mask]] = values[mask]
        return found

    def _sums(self, mask: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        row = self.row[mask]
        total = np.bincount(row, np.log1p(self.values[mask]), self.num_rows).astype(np.float64)
        return total, np.bincount(row, minlength=self.num_rows).astype(np.float64)


def _clock(local: Floats) -> Floats:
    clock: Floats = (local / 3600.0) % 24.0
    return clock


def _weekday(local: Floats) -> Floats:
    day: Floats = np.floor(local / SECONDS_PER_DAY) % 7.0
    return day
