"""Statistics of items, or of what items share, over whole periods before a time.

Running totals per value and period are made once; a window is the difference of two of them.
"""

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.log_spec import EventStatistic
from model.contract.spec import Schema
from model.logs import KEY, TIME, USER, same_type

Floats = npt.NDArray[np.float64]
_PERIOD = "_period"


def item_totals(events: pl.DataFrame, statistic: EventStatistic, *, schema: Schema) -> pl.DataFrame:
    """Running totals by value and period, inclusive: KEY, _period, _count, _sum.

    Args:
        events: USER, TIME and KEY (the attribute's value) of the statistic's events.
        statistic: "users" counts a user at the first event with the value only.
        schema: says where periods begin.
    """
    value = pl.col(statistic.column) if statistic.column is not None else pl.lit(1.0)
    if statistic.aggregate == "users":
        events = events.filter(pl.col(USER).is_not_null()).sort(TIME)
        events = events.unique([USER, KEY], keep="first", maintain_order=True)
    return (
        events.select(KEY, _period_of(events[TIME].to_numpy(), schema), value.alias("_value"))
        .filter(pl.col("_value").is_not_null())
        # Sorted before summing: the order of additions must not depend on threads.
        .sort(KEY, _PERIOD, "_value")
        .group_by(KEY, _PERIOD, maintain_order=True)
        .agg(pl.len().cast(pl.Int64).alias("_count"), pl.col("_value").sum().alias("_sum"))
        .with_columns(pl.col("_count", "_sum").cum_sum().over(KEY))
    )


def item_values(
    totals: pl.DataFrame,
    statistic: EventStatistic,
    keys: pl.Series,
    time: Floats,
    *,
    schema: Schema,
) -> Floats:
    """The statistic of each key as of each time, float64 [n].

    A count is 0 where there were no events and NaN where the key is null; a mean is NaN in both.
    """
    period = _period_of(time - schema.availability_lag_s, schema)
    left = pl.DataFrame({KEY: keys}).with_columns(period)
    left, totals = same_type(left, totals, KEY)
    asked = left.unique(maintain_order=True)
    count, total = _until(totals, asked, 0)
    if statistic.whole_periods is not None:
        count_before, total_before = _until(totals, asked, statistic.whole_periods)
        count, total = count - count_before, total - total_before
    if statistic.aggregate == "mean":
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(count > 0, total / count, np.nan)
    else:
        values = np.where(asked[KEY].is_null().to_numpy(), np.nan, count)
    answered = asked.with_columns(pl.Series("_value", values))
    found = left.join(
        answered, on=[KEY, _PERIOD], how="left", maintain_order="left", nulls_equal=True
    )
    return found["_value"].to_numpy().copy()


def _until(totals: pl.DataFrame, asked: pl.DataFrame, ahead: int) -> tuple[Floats, Floats]:
    """Count and sum of each key up to and without the period `ahead` before the asked one."""
    wanted = asked.with_row_index("_n").with_columns(pl.col(_PERIOD) - ahead)
    joined = wanted.sort(_PERIOD).join_asof(
        totals.sort(_PERIOD),
        on=_PERIOD,
        by=KEY,
        allow_exact_matches=False,
        check_sortedness=False,
    )
    found = joined.sort("_n")
    count, total = (
        found[name].cast(pl.Float64).fill_null(0.0).to_numpy() for name in ("_count", "_sum")
    )
    return count, total


def _period_of(time: Floats, schema: Schema) -> pl.Series:
    seconds = schema.period_days * 86400.0
    return pl.Series(_PERIOD, np.floor((time - schema.period_start) / seconds).astype(np.int64))
