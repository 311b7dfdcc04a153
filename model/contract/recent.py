"""Numbers about a user's newest events as of a request, for `Recent` features."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.columns import Floats, Ids, Ragged
from model.contract.ids import NO_KEY
from model.contract.spec import Recent
from model.contract.times import SECONDS_PER_DAY

NEAR_HOURS = 2.0  # events within so many hours of the request's time of day are "at this hour"
PRIOR_EVENTS = 2.0  # a mean of few events leans on the user's own mean as if by so many more
CHUNK_REQUESTS = 8192  # a log is done in parts, to bound the memory

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RecentColumn:
    """Events of R requests' users, newest first.

    Attributes:
        events: flat values [total] (float64 of 0 or more) and times (unix seconds), offsets
            [R + 1].
        keys: uint64 [total], hash of the event's context value; None without a context.
    """

    events: Ragged
    keys: Keys | None

    def part(self, start: int, stop: int) -> "RecentColumn":
        """The events of requests start to stop."""
        offsets = self.events.offsets[start : stop + 1]
        flat = slice(int(offsets[0]), int(offsets[-1]))
        events = Ragged(
            values=np.asarray(self.events.values)[flat],
            times=self.events.times[flat],
            offsets=offsets - offsets[0],
        )
        return RecentColumn(events=events, keys=None if self.keys is None else self.keys[flat])


def recent_statistics(
    feature: Recent, column: RecentColumn, *, time: Floats, utc_offset: Floats, here: Keys | None
) -> Floats:
    """`feature.statistics` in order, float64 [S, R], NaN where there is nothing to tell.

    Counts and days are log1p'd, means are of log1p of the values. A mean of the events at this
    hour, on this weekday or here is shrunk to that of all the user's events. Where no event is
    left, everything is NaN: such a user is the same as one of whom nothing is stored.

    Args:
        feature: says which statistics.
        column: its events; those after the request's time are left out.
        time: unix seconds of the requests [R].
        utc_offset: seconds [R] to add for local time, to the events' times as well.
        here: key of each request's context value [R]; None without a context.
    """
    if len(time) <= CHUNK_REQUESTS:
        return _statistics(feature, column, time, utc_offset, here)
    chunks = []
    for start in range(0, len(time), CHUNK_REQUESTS):
        stop = min(start + CHUNK_REQUESTS, len(time))
        there = None if here is None else here[start:stop]
        part = column.part(start, stop)
        chunks.append(_statistics(feature, part, time[start:stop], utc_offset[start:stop], there))
    return np.concatenate(chunks, axis=1)


def _statistics(
    feature: Recent, column: RecentColumn, time: Floats, utc_offset: Floats, here: Keys | None
) -> Floats:
    seen = _Seen.of(column, time, max_length=feature.max_length)
    local = time + utc_offset
    event_local = seen.times + utc_offset[seen.row]
    hour = np.abs(_clock(event_local) - _clock(local)[seen.row])
    alike = {
        "hour": np.minimum(hour, 24.0 - hour) <= NEAR_HOURS,
        "weekday": _weekday(event_local) == _weekday(local)[seen.row],
    }
    parts: dict[str, Floats] = {}
    if feature.context is not None:
        alike["here"] = seen.having(here)
        parts["here_days"] = seen.days_since(alike["here"])
    if feature.large is not None:
        # Values are kept as float32: an event of exactly `large` is a large one.
        parts["large_days"] = seen.days_since(seen.values >= np.float32(feature.large))
    parts["last"] = seen.at(0, seen.log_values)
    parts["gap"] = np.log1p(seen.at(1, seen.age_days) - seen.at(0, seen.age_days))
    names = [(f"count_{days}", f"mean_{days}") for days in feature.windows_days]
    prior = [0.0] * len(names) + [PRIOR_EVENTS] * len(alike)
    names += [(f"{name}_count", f"{name}_mean") for name in alike]
    within = [seen.age_days <= days for days in feature.windows_days]
    counts, means = seen.counts_and_means(
        np.stack([*within, *alike.values()]), prior=np.array(prior, np.float64)
    )
    for (count_name, mean_name), count, mean in zip(names, counts, means, strict=True):
        parts[count_name], parts[mean_name] = count, mean
    return np.stack([parts[name.removeprefix(f"{feature.name}_")] for name in feature.statistics])


class RecentRow:
    """`recent_statistics` of single requests, bit for bit, with a fifth of the steps. Immutable."""

    def __init__(self, feature: Recent) -> None:
        """Looks up once what the feature says."""
        self._max_length = feature.max_length
        self._windows = np.array(feature.windows_days, np.float64)
        self._large = None if feature.large is None else float(np.float32(feature.large))
        self._has_context = feature.context is not None
        self._nothing = [math.nan] * len(feature.statistics)
        # All events, those at this hour, on this weekday, and if the feature says so here, large.
        self._num_sums = 4 if self._has_context else 3
        self._num_masks = self._num_sums + (self._large is not None)
        self._aged = [self._num_sums] if self._large is not None else []
        self._aged += [3] if self._has_context else []

    def statistics(
        self,
        values: Floats,
        times: Floats,
        keys: Keys | None,
        *,
        time: float,
        utc_offset: float,
        here: int,
    ) -> list[float]:
        """Of one request's events [n]; `here` is NO_KEY without a context value."""
        if len(times) and (times[0] > time or len(times) > self._max_length):
            start = int(np.count_nonzero(times > time))  # newest first, so these come first
            kept = slice(start, start + self._max_length)
            times, values, keys = times[kept], values[kept], None if keys is None else keys[kept]
        num_events = len(times)
        if not num_events:
            return self._nothing
        age_days = (time - times) / SECONDS_PER_DAY
        masks = np.zeros((self._num_masks, num_events), np.bool_)
        masks[0] = True
        _write_alike(masks, times + utc_offset, time + utc_offset)
        if self._has_context and keys is not None and here != NO_KEY:
            np.equal(keys, np.uint64(here), out=masks[3])
        if self._large is not None:
            np.greater_equal(values, self._large, out=masks[-1])
        log_values = np.log1p(values)
        # Sums run from the newest event to the oldest, as those of many requests do.
        sums = np.add.accumulate(masks[: self._num_sums] * log_values, axis=1)
        within = age_days.searchsorted(self._windows, "right").tolist()
        all_sums, totals = sums[0], sums[:, -1].tolist()
        # From here on these are too few numbers to be worth an array; masks are bytes of 0 or 1.
        facts = masks.tobytes()
        ends = range(num_events, self._num_sums * num_events, num_events)
        alike = [facts.count(1, start, start + num_events) for start in ends]
        prior = PRIOR_EVENTS * (totals[0] / num_events)
        means = [float(all_sums[n - 1]) / n if n else math.nan for n in within]
        for total, number in zip(totals[1:], alike, strict=True):
            means.append((total + prior) / (number + PRIOR_EVENTS))
        days = [float(age_days[1]) - float(age_days[0]) if num_events > 1 else math.nan]
        for row in self._aged:
            start = row * num_events
            place = facts.find(1, start, start + num_events) - start
            days.append(float(age_days[place]) if place >= 0 else math.nan)
        logs = np.log1p(np.array([*within, *alike, *days], np.float64)).tolist()
        return self._in_order(means, logs, float(log_values[0]))

    def _in_order(self, means: list[float], logs: list[float], last: float) -> list[float]:
        pairs = [value for pair in zip(logs, means, strict=False) for value in pair]
        first = 2 * len(self._windows)
        gap, *others = logs[len(means) :]
        parts = [*pairs[:first], last, gap, *pairs[first : first + 4]]
        if self._large is not None:
            parts.append(others.pop(0))
        return [*parts, *pairs[first + 4 :], *others]


def _write_alike(masks: Mask, event_local: Floats, local: float) -> None:
    """Which events [n] are at the request's hour and on its weekday, into masks 1 and 2."""
    hour = np.abs(_clock(event_local) - (local / 3600.0) % 24.0)
    np.less_equal(np.minimum(hour, 24.0 - hour), NEAR_HOURS, out=masks[1])
    np.equal(_weekday(event_local), math.floor(local / SECONDS_PER_DAY) % 7, out=masks[2])


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Events up to each request's time, flat and newest first.

    Attributes:
        row: request of each event [n].
        number: events of each request [R].
        start: place of each request's newest event [R].
        overall: mean log value of each request's events [R], NaN without any.
    """

    row: Ids
    number: Ids
    start: Ids
    values: Floats
    log_values: Floats
    times: Floats
    age_days: Floats
    keys: Keys | None
    overall: Floats

    @classmethod
    def of(cls, column: RecentColumn, time: Floats, *, max_length: int) -> "_Seen":
        events = column.events
        row = np.repeat(np.arange(len(time), dtype=np.int64), np.diff(events.offsets))
        keep = np.flatnonzero(events.times <= time[row])
        row = row[keep]
        number = np.bincount(row, minlength=len(time))
        start = np.cumsum(number) - number
        if number.max(initial=0) > max_length:
            fits = np.arange(len(row)) - start[row] < max_length
            keep, row = keep[fits], row[fits]
            number = np.minimum(number, max_length)
            start = np.cumsum(number) - number
        times, values = events.times[keep], np.asarray(events.values, np.float64)[keep]
        log_values = np.log1p(values)
        with np.errstate(invalid="ignore"):
            overall: Floats = np.bincount(row, log_values, len(time)) / number
        return cls(
            row=row,
            number=number,
            start=start,
            values=values,
            log_values=log_values,
            times=times,
            age_days=(time[row] - times) / SECONDS_PER_DAY,
            keys=None if column.keys is None else column.keys[keep],
            overall=overall,
        )

    def having(self, here: Keys | None) -> Mask:
        """Which events have the request's key; no key is like no other."""
        if here is None or self.keys is None:
            return np.zeros(len(self.row), np.bool_)
        matching: Mask = (self.keys == here[self.row]) & (self.keys != NO_KEY)
        return matching

    def counts_and_means(self, masks: Mask, *, prior: Floats) -> tuple[Floats, Floats]:
        """Of the events of each of k masks [k, n], [k, R] each.

        log1p of their number (NaN where the request has no event at all), and their mean, as if
        `prior` [k] events of the request's usual size were among them.
        """
        num_rows, shape = len(self.number), (len(masks), len(self.number))
        which, event = np.nonzero(masks)
        cell = which * num_rows + self.row[event]
        size = shape[0] * shape[1]
        number = np.bincount(cell, minlength=size).reshape(shape).astype(np.float64)
        total = np.bincount(cell, self.log_values[event], size).reshape(shape)
        added = prior[:, None]
        with np.errstate(invalid="ignore"):
            means: Floats = (total + added * self.overall) / (number + added)
        return np.log1p(np.where(self.number > 0, number, np.nan)), means

    def days_since(self, mask: Mask) -> Floats:
        """log1p of the age of the newest of those events, NaN where there is none."""
        found = np.full(len(self.number), np.nan)
        oldest_first = np.flatnonzero(mask)[::-1]  # of the events of one row, the last write stays
        found[self.row[oldest_first]] = self.age_days[oldest_first]
        days: Floats = np.log1p(found)
        return days

    def at(self, place: int, values: Floats) -> Floats:
        """The place-th newest event's value, NaN where there are fewer."""
        found = np.full(len(self.number), np.nan)
        enough = self.number > place
        found[enough] = values[self.start[enough] + place]
        return found


def _clock(local: Floats) -> Floats:
    clock: Floats = (local / 3600.0) % 24.0
    return clock


def _weekday(local: Floats) -> Floats:
    day: Floats = np.floor(local / SECONDS_PER_DAY) % 7.0
    return day
