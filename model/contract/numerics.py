"""Numeric columns of one block: clipped, log1p'd and standardised, all of them at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model.contract.blocks import BlockLayout, Dense
from model.contract.columns import LARGEST, Column, Floats, Ids, Ragged, number, numbers
from model.contract.spec import Elapsed, Feature, FittedSchema, Numeric
from model.contract.times import SECONDS_PER_DAY


@dataclass(frozen=True, kw_only=True)
class NumericPlan:
    """How k numeric columns of a block are made; arrays are float64 [k, 1] unless said.

    Raw values and transformed ones stand feature by feature, [k, n]: for one request this is one
    short vector instead of k arrays of one number.

    Attributes:
        places: positions of the columns in the layout's numerics, int64 [k] or a slice.
        minimum: lower limit, -inf for none; `maximum` likewise.
        defaults: what stands for a missing value, NaN for nothing.
        has_defaults: whether any of them is not NaN.
        elapsed: int64, which of the k are times whose age counts.
        log1p: int64, which of the k have log1p taken.
        rows: of each column: default, whether it is a time, minimum, maximum, whether log1p is
            taken; the same as above for one value.
        first_flag: where the missing flags of the layout begin among the dense columns.
        means: of the values and then of their missing flags, [2, k]; `stds` likewise.
        flags: positions of the missing flags among the block's dense columns, likewise.
    """

    places: Ids | slice
    minimum: Floats
    maximum: Floats
    defaults: Floats
    has_defaults: bool
    elapsed: Ids
    log1p: Ids
    means: Floats
    stds: Floats
    flags: Ids | slice
    first_flag: int
    rows: tuple[tuple[float, bool, float, float, bool], ...]

    @classmethod
    def of(
        cls, layout: BlockLayout, *, features: Mapping[str, Feature], mean: Floats, std: Floats
    ) -> "NumericPlan":
        """The plan of all a layout's numeric columns; mean and std [D] are of all dense ones."""
        found = [features.get(name) for name in layout.numerics]
        values, flags = len(layout.numerics), len(layout.value_columns)
        here, there = slice(0, values), slice(flags, flags + values)
        defaults = _limits(found, "default", np.nan)
        minimum, maximum = _limits(found, "minimum", -np.inf), _limits(found, "maximum", np.inf)
        is_elapsed = [isinstance(f, Elapsed) for f in found]
        takes_log = [isinstance(f, Elapsed) or (isinstance(f, Numeric) and f.log1p) for f in found]
        limits = (array[:, 0].tolist() for array in (defaults, minimum, maximum))
        return cls(
            places=here,
            minimum=minimum,
            maximum=maximum,
            defaults=defaults,
            has_defaults=not np.isnan(defaults).all(),
            elapsed=_where(is_elapsed),
            log1p=_where(takes_log),
            rows=tuple(
                (default, elapsed, low, high, log)
                for default, low, high, elapsed, log in zip(
                    *limits, is_elapsed, takes_log, strict=True
                )
            ),
            means=np.stack([mean[here], mean[there]]),
            stds=np.stack([std[here], std[there]]),
            flags=there,
            first_flag=flags,
        )

    def select(self, places: Sequence[int]) -> "NumericPlan":
        """The plan of some of the columns of a plan of all, in the order of `places`."""
        at = np.array(places, np.int64)
        return NumericPlan(
            places=at,
            minimum=self.minimum[at],
            maximum=self.maximum[at],
            defaults=self.defaults[at],
            has_defaults=self.has_defaults,
            elapsed=_where(place in self.elapsed for place in places),
            log1p=_where(place in self.log1p for place in places),
            means=self.means[:, at],
            stds=self.stds[:, at],
            flags=at + self.first_flag,
            first_flag=self.first_flag,
            rows=tuple(self.rows[place] for place in places),
        )

    def transform(self, raw: Floats, time: Floats | None) -> Floats:
        """Raw values [k, n] clipped and log1p'd, NaN where missing; a new array.

        Args:
            raw: NaN where missing; statistics of recent events pass through as they are.
            time: unix seconds [n]; None where nothing has a time, which leaves ages missing.
        """
        values = np.where(np.isnan(raw), self.defaults, raw) if self.has_defaults else raw.copy()
        if len(self.elapsed):
            if time is None:
                values[self.elapsed] = np.nan
            else:
                days = (time - values[self.elapsed]) / SECONDS_PER_DAY
                values[self.elapsed] = np.where(days >= 0, days, np.nan)
        values = np.clip(values, self.minimum, self.maximum)
        if len(self.log1p):
            values[self.log1p] = np.log1p(values[self.log1p])
        return values

    def transform_one(self, given: Mapping[int, float], values: list[float], time: float) -> None:
        """`transform` of some values of one row, written into `values` [k]; see there.

        So few numbers are done several times faster one by one; log1p is numpy's all the same,
        whose last bit may differ from the standard library's.

        Args:
            given: raw values by position, NaN where missing.
            values: of the row, transformed already where none is given.
            time: unix seconds.
        """
        logs = []
        for place, raw in given.items():
            default, is_elapsed, minimum, maximum, takes_log = self.rows[place]
            value = default if raw != raw else raw
            if is_elapsed:
                days = (time - value) / SECONDS_PER_DAY
                value = days if days >= 0 else np.nan
            if value < minimum:
                value = minimum
            elif value > maximum:
                value = maximum
            values[place] = value
            if takes_log:
                logs.append(place)
        if logs:
            made = np.log1p(np.array([values[place] for place in logs], np.float64)).tolist()
            for place, value in zip(logs, made, strict=True):
                values[place] = value

    def write(self, dense: Dense, values: Floats) -> None:
        """Puts transformed values [k, n] and their missing flags into a block's dense [n, D]."""
        missing = np.isnan(values)
        means, stds = self.means[..., None], self.stds[..., None]
        dense[:, self.places] = np.where(missing, 0.0, (values - means[0]) / stds[0]).T
        dense[:, self.flags] = ((missing - means[1]) / stds[1]).T

    def write_one(self, values: Sequence[float]) -> Dense:
        """`write` of one row [k] of a plan of all of a block's dense columns; dense [1, 2k]."""
        both = np.empty((2, len(values)), np.float64)
        both[0] = values
        missing = np.isnan(both[0])
        both[1] = missing
        both -= self.means
        both /= self.stds
        np.putmask(both[0], missing, 0.0)
        return both.reshape(1, -1).astype(np.float32)


def raw_numbers(columns: Iterable[tuple[str, Column | Ragged]]) -> Floats:
    """Raw columns as one float64 [k, n], NaN where missing.

    Raises:
        EncodeError: a value is no finite number, or beyond what float32 can hold.
    """
    made = [numbers(name, column) for name, column in columns]
    return np.concatenate(made).reshape(len(made), -1)


def raw_number(name: str, value: object) -> float:
    """One raw value as a number, NaN where missing.

    Raises:
        EncodeError: as `raw_numbers`.
    """
    found = value if type(value) is float else number(name, value, 0)
    # NaN is not larger than anything.
    return float(numbers(name, [value])[0]) if abs(found) > LARGEST else found


def _limits(features: Sequence[Feature | None], name: str, none: float) -> Floats:
    found = [getattr(f, name) if isinstance(f, Numeric) else None for f in features]
    return np.array([[none if v is None else v] for v in found], np.float64).reshape(-1, 1)


def _where(facts: Iterable[bool]) -> Ids:
    return np.flatnonzero(list(facts)).astype(np.int64)


def moments_of(fitted: FittedSchema, layout: BlockLayout) -> tuple[Floats, Floats]:
    """Mean and deviation of every dense column, 0 and 1 for those that were not fitted."""
    found = [fitted.moments.get(name) for name in layout.dense_columns]
    mean = np.array([0.0 if m is None else m.mean for m in found], np.float64)
    std = np.array([1.0 if m is None else m.std for m in found], np.float64)
    return mean, std
