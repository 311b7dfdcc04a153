"""Impression logs: read, check the labels' order, mask what is too young, split by time.

Knows columns and labels only; how features are encoded is not its business.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.config import DataConfig, SplitConfig
from model.contract.errors import LogError
from model.contract.ids import canonical_ids, hash_ids
from model.contract.spec import Schema

SPLITS = ("train", "validation", "calibration", "test")
# Columns added beside those of a table: who, what, when, which event, which value of an attribute.
USER, ITEM, TIME, EVENT, KEY = "_user", "_item", "_time", "_event", "_key"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of N rows and T steps.

    Attributes:
        values: int8 [N, T], cumulative: values[:, t] <= values[:, t - 1].
        known: bool [N, T]; False where the step's window had not passed when the log ended.
        weight: float32 [N].
    """

    values: npt.NDArray[np.int8]
    known: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]

    def take(self, rows: npt.NDArray[np.int64]) -> "Labels":
        return Labels(values=self.values[rows], known=self.known[rows], weight=self.weight[rows])


@dataclass(frozen=True, kw_only=True)
class ImpressionLog:
    """A checked log, sorted by time: its frame, labels, split of each row, and what was dropped.

    Attributes:
        truth: float32 [N, T], known conditional step probabilities; None where the log has none.
        num_backwards: rows of the file that were earlier than the one before them.
    """

    frame: pl.DataFrame
    labels: Labels
    truth: npt.NDArray[np.float32] | None
    split: npt.NDArray[np.str_]
    num_read: int
    num_broken_chain: int
    num_backwards: int

    def time(self, schema: Schema) -> npt.NDArray[np.float64]:
        """Unix seconds of every row, float64 [N]."""
        return unix_seconds(self.frame[schema.log.time])


def read_table(path: Path) -> pl.DataFrame:
    """Reads Parquet (a file or a directory of files) or CSV, ids in one form, times in UTC.

    Raises:
        LogError: the file is missing or unreadable.
    """
    try:
        if path.is_dir():
            frame = pl.read_parquet(path / "*.parquet")
        elif path.suffix == ".csv" or path.name.endswith(".csv.gz"):
            frame = pl.read_csv(path, try_parse_dates=True, infer_schema_length=10_000)
        else:
            frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as exc:
        raise LogError(f"cannot read {path}: {str(exc).splitlines()[0]}", path=path) from exc
    return frame.with_columns(_normalise(frame[name]) for name in frame.columns)


def read_log(data: DataConfig, *, schema: Schema, split: SplitConfig) -> ImpressionLog:
    """Reads and checks a log.

    Raises:
        LogError: columns are missing, labels are not 0/1 or are reversed, a split is empty.
    """
    frame = read_table(data.impressions)
    _check_columns(frame, schema, data.impressions)
    num_read = len(frame)
    if not num_read:
        raise LogError(f"{data.impressions} has no rows", path=data.impressions)
    # Values are checked in the file's order, so that the row numbers in messages are the file's.
    frame = _with_known_time(frame, schema, data.impressions)
    raw = _raw_labels(frame, schema, data.impressions)
    weight = _weights(frame, raw, schema, data.impressions)
    intact: npt.NDArray[np.bool_] = np.all(raw[:, 1:] <= raw[:, :-1], axis=1)
    num_broken = int((~intact).sum())
    _refuse_reversed(raw, num_broken, schema, data.impressions)
    time = unix_seconds(frame[schema.log.time])
    order = np.argsort(time, kind="stable")
    order = order[intact[order]]
    frame, raw, weight = frame[order], raw[order], weight[order]
    labels = _within_windows(frame, raw, weight, schema, data)
    return ImpressionLog(
        frame=frame,
        labels=labels,
        truth=_truth(frame, schema, data.impressions),
        split=_split(frame, schema, split, data.impressions),
        num_read=num_read,
        num_broken_chain=num_broken,
        num_backwards=int((np.diff(time) < 0).sum()),
    )


def unix_seconds(series: pl.Series) -> npt.NDArray[np.float64]:
    """A time column as unix seconds, float64, NaN for null; numbers are unix seconds already."""
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    if isinstance(series.dtype, pl.Datetime):
        micros = series.dt.epoch("us").cast(pl.Float64).fill_null(np.nan)
        return micros.to_numpy() / 1e6
    return series.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()


def same_type(
    left: pl.DataFrame, right: pl.DataFrame, on: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Makes a join column of two tables one type, by canonical text where they differ."""
    if left[on].dtype == right[on].dtype:
        return left, right
    left, right = (
        table.with_columns(integral_ids(table[on], path=None).cast(pl.String))
        for table in (left, right)
    )
    return left, right


def integral_ids(series: pl.Series, *, path: Path | None) -> pl.Series:
    """Ids that came as floating-point numbers as the integers they are; others as they are.

    Raises:
        LogError: one is a fraction.
    """
    if not series.dtype.is_float():
        return series
    whole = series.fill_nan(None)
    if (whole.drop_nulls() % 1 != 0).any():
        place = f"{path}: " if path is not None else ""
        raise LogError(f"{place}column {series.name!r} holds fractions, not ids", path=path)
    return whole.cast(pl.Int64)


def _normalise(series: pl.Series) -> pl.Series:
    dtype = series.dtype
    if dtype.is_integer() and dtype != pl.UInt64:
        return series.cast(pl.Int64)
    if dtype in (pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    if dtype == pl.Float32:
        return series.cast(pl.Float64)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return series.dt.convert_time_zone("UTC")
    return series


def _check_columns(frame: pl.DataFrame, schema: Schema, path: Path) -> None:
    log = schema.log
    wanted = [log.user_id, log.item_id, log.time, *(step.label for step in schema.steps)]
    optional = (log.request_id, log.weight, log.negative_keep_rate, log.split)
    wanted += [name for name in optional if name is not None]
    wanted += [c for step in schema.steps for c in (step.time, step.truth) if c is not None]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise LogError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, frame.columns))}",
            path=path,
        )


def _with_known_time(frame: pl.DataFrame, schema: Schema, path: Path) -> pl.DataFrame:
    series = frame[schema.log.time]
    if series.dtype == pl.String:
        raise LogError(
            f"{path}: column {schema.log.time!r} is text; expected time stamps or unix seconds",
            path=path,
        )
    unknown = np.isnan(unix_seconds(series))
    if unknown.any():
        row = int(unknown.argmax())
        raise LogError(f"{path}: row {row} has no {schema.log.time!r}", path=path, row_number=row)
    return frame.with_columns(
        integral_ids(frame[name], path=path) for name in (schema.log.user_id, schema.log.item_id)
    )


def _raw_labels(frame: pl.DataFrame, schema: Schema, path: Path) -> npt.NDArray[np.int8]:
    columns = []
    for step in schema.steps:
        series = frame[step.label]
        if series.dtype == pl.Boolean:
            series = series.cast(pl.Int8)
        fits = (
            ((series == 0) | (series == 1)).fill_null(False) if series.dtype.is_numeric() else None
        )
        if fits is None or not fits.all():
            row = 0 if fits is None else int((~fits).arg_max() or 0)
            raise LogError(
                f"{path}: label {step.label!r} of step {step.name!r} is {series[row]!r} in row "
                f"{row}, expected 0 or 1",
                path=path,
                row_number=row,
            )
        columns.append(series.cast(pl.Int8).to_numpy())
    return np.stack(columns, axis=1)


def _refuse_reversed(
    raw: npt.NDArray[np.int8], num_broken: int, schema: Schema, path: Path
) -> None:
    totals = raw.sum(axis=0, dtype=np.int64)
    for t in range(1, len(totals)):
        before, after = schema.steps[t - 1], schema.steps[t]
        if totals[t] > totals[t - 1]:
            raise LogError(
                f"{path}: step {after.name!r} ({totals[t]} rows) is commoner than {before.name!r} "
                f"({totals[t - 1]} rows) before it: are the labels reversed?",
                path=path,
            )
    if totals.min() == 0:
        step = schema.steps[int(totals.argmin())]
        raise LogError(f"{path}: no row has step {step.name!r}", path=path)
    if num_broken > 0.05 * len(raw):
        raise LogError(
            f"{path}: {num_broken} of {len(raw)} rows break the chain (a step without the one "
            "before it): check the steps' order",
            path=path,
        )


def _within_windows(
    frame: pl.DataFrame,
    raw: npt.NDArray[np.int8],
    weight: npt.NDArray[np.float32],
    schema: Schema,
    data: DataConfig,
) -> Labels:
    time = unix_seconds(frame[schema.log.time])
    ends = [time.max()]
    event_times = {
        step.name: unix_seconds(frame[step.time]) for step in schema.steps if step.time is not None
    }
    ends += [np.nanmax(t) for t in event_times.values() if not np.isnan(t).all()]
    log_end = data.observed_until.timestamp() if data.observed_until else max(ends)
    values, known = raw.copy(), np.ones(raw.shape, np.bool_)
    for t, step in enumerate(schema.steps):
        if step.window_days is None:
            continue
        window = step.window_days * 86400.0
        known[:, t] = time + window <= log_end
        if step.name in event_times:
            happened = event_times[step.name]
            values[:, t] &= (~(happened > time + window)).astype(np.int8)
    values = np.minimum.accumulate(values, axis=1)
    known = np.logical_and.accumulate(known, axis=1)
    return Labels(values=values, known=known, weight=weight)


def _truth(frame: pl.DataFrame, schema: Schema, path: Path) -> npt.NDArray[np.float32] | None:
    names = [step.truth for step in schema.steps if step.truth is not None]
    if not names:
        return None
    columns = []
    for name in names:
        series = frame[name]
        if not series.dtype.is_numeric():
            raise LogError(f"{path}: true probability {name!r} is {series.dtype}", path=path)
        values = series.cast(pl.Float64).fill_null(np.nan).to_numpy()
        if not ((values >= 0) & (values <= 1)).all():
            raise LogError(f"{path}: column {name!r} holds what is no probability", path=path)
        columns.append(values.astype(np.float32))
    return np.stack(columns, axis=1)


def _weights(
    frame: pl.DataFrame, raw: npt.NDArray[np.int8], schema: Schema, path: Path
) -> npt.NDArray[np.float32]:
    log = schema.log
    name = log.weight or log.negative_keep_rate
    if name is None:
        return np.ones(len(frame), np.float32)
    given = frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
    fits = np.isfinite(given) & (given > 0)
    if log.negative_keep_rate is not None:
        fits &= given <= 1
    if not fits.all():
        row = int(np.argmin(fits))
        expected = "in (0, 1]" if log.negative_keep_rate else "above 0"
        raise LogError(
            f"{path}: {name!r} is {given[row]!r} in row {row}, expected a number {expected}",
            path=path,
            row_number=row,
        )
    if log.negative_keep_rate is not None:
        given = np.where(raw[:, 0] == 0, 1.0 / given, 1.0)
    return given.astype(np.float32)


def _split(
    frame: pl.DataFrame, schema: Schema, config: SplitConfig, path: Path
) -> npt.NDArray[np.str_]:
    if schema.log.split is not None:
        split = frame[schema.log.split].to_numpy().astype(np.str_)
        unknown = sorted(set(np.unique(split)) - set(SPLITS))
        if unknown:
            raise LogError(
                f"{path}: split {str(unknown[0])!r} is none of {', '.join(SPLITS)}", path=path
            )
    else:
        split = _split_by_time(frame, schema, config)
    for name in SPLITS:
        if not (split == name).any():
            raise LogError(f"{path}: the {name} split is empty", path=path)
    return split


def _split_by_time(
    frame: pl.DataFrame, schema: Schema, config: SplitConfig
) -> npt.NDArray[np.str_]:
    """Cuts at times, never inside an instant; validation and calibration share theirs by user."""
    time = unix_seconds(frame[schema.log.time])
    train_end, held_out_end = (
        np.quantile(time, share, method="nearest")
        for share in (config.train_share, 1.0 - config.test_share)
    )
    split = np.full(len(time), "test", "U11")
    split[time < held_out_end] = "validation"
    split[time < train_end] = "train"
    between = split == "validation"
    users = frame[schema.log.user_id].filter(pl.Series(between)).to_list()
    is_odd = hash_ids(canonical_ids(users)) % np.uint64(2) == 1
    split[np.flatnonzero(between)[is_odd]] = "calibration"
    return split
