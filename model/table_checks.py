"""The checks of `model.checks` on a log alone, before anything is trained on it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.checks import (
    MAX_COLUMN_ROWS,
    Finding,
    LogNames,
    Sample,
    check_columns,
    check_drift,
    check_rows,
    rows_with_step,
    sampled_requests,
)
from model.contract.errors import LogError
from model.contract.spec import Schema
from model.leaks import series_values
from model.logs import SPLITS, unix_seconds

Rows = npt.NDArray[np.int64]

# Without a split of its own, what comes first is held against what comes last.
EARLY, LATE = 0.7, 0.85


def check_table(frame: pl.DataFrame, *, schema: Schema, path: Path) -> list[Finding]:
    """Findings in the schema's columns and in the log's rows.

    Raises:
        LogError: times are text.
    """
    log = schema.log
    if frame[log.time].dtype == pl.String:
        raise LogError(f"{path}: column {log.time!r} is text; expected time stamps or unix seconds")
    time = unix_seconds(frame[log.time])
    split = None
    if log.split is not None:
        split = frame[log.split].cast(pl.String).fill_null("").to_numpy().astype(np.str_)
    found = check_rows(
        frame,
        names=LogNames(user=log.user_id, item=log.item_id, time=log.time, request=log.request_id),
        time=time,
        event_times={
            step.name: unix_seconds(frame[step.time])
            for step in schema.steps
            if step.time is not None and frame[step.time].dtype != pl.String
        },
        split=split,
        num_backwards=int((np.diff(time) < 0).sum()),
    )
    if split is None:
        split = _by_time(time)
    samples = {
        name: part
        for name in SPLITS
        if (part := _sample(frame, schema, np.flatnonzero(split == name)))
    }
    if "train" in samples:
        source = {feature.name: feature.source for feature in schema.features}
        labels = _labels(frame, schema)
        is_train = split == "train"
        found += check_columns(
            samples["train"],
            later=[
                _values(frame, schema, rows[is_train[rows]], request=np.zeros(0, np.int64))
                for t in range(labels.shape[1] - 1)
                for rows in [rows_with_step(labels, t)]
            ],
            steps=[step.name for step in schema.steps],
            is_filled_before=lambda _: False,
            is_log_only=lambda name: source[name] == "log_only",
        )
        found += check_drift(samples)
    return found


def _by_time(time: npt.NDArray[np.float64]) -> npt.NDArray[np.str_]:
    known = time[~np.isnan(time)]
    split = np.full(len(time), "", "U11")
    if len(known):
        early, late = np.quantile(known, (EARLY, LATE), method="nearest")
        split[time < early] = "train"
        split[time >= late] = "test"
    return split


def _sample(frame: pl.DataFrame, schema: Schema, rows: Rows) -> Sample | None:
    """Whole requests among the rows; None if there are no rows."""
    if not len(rows):
        return None
    log = schema.log
    if len(rows) > 10 * MAX_COLUMN_ROWS:
        # Whole users first, so that requests need not be told apart in all of a large log.
        num_parts = len(rows) // (5 * MAX_COLUMN_ROWS)
        rows = rows[(frame[log.user_id].hash(seed=0) % num_parts == 0).to_numpy()[rows]]
    keys = [log.request_id] if log.request_id is not None else [log.user_id, log.time]
    numbers = frame[rows].select(pl.struct(keys).rank("dense")).to_series()
    request = numbers.cast(pl.Int64).to_numpy() - 1
    kept = sampled_requests(request)
    return _values(frame, schema, rows[kept], request=request[kept])


def _values(frame: pl.DataFrame, schema: Schema, rows: Rows, *, request: Rows) -> Sample:
    part = frame[rows]
    columns = {
        feature.name: series_values(part[feature.name])
        for feature in schema.features
        if feature.name in part.columns
    }
    labels = _labels(part, schema)
    return Sample(
        values={name: values for name, values in columns.items() if values is not None},
        labels=labels,
        known=np.ones(labels.shape, np.bool_),
        request=request,
        user=part[schema.log.user_id].rank("dense").fill_null(0).to_numpy().astype(np.int64),
    )


def _labels(frame: pl.DataFrame, schema: Schema) -> npt.NDArray[np.int8]:
    """0 or 1, int8 [n, T]; what is neither counts as 0, and is refused by training."""
    columns = [
        (frame[step.label].cast(pl.Float64) == 1.0).fill_null(False) for step in schema.steps
    ]
    return np.stack([column.cast(pl.Int8).to_numpy() for column in columns], axis=1)
