"""The checks of `model.checks` on a log alone, before anything is trained on it."""

from collections.abc import Mapping
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
    sampled_requests,
)
from model.contract.errors import LogError
from model.contract.spec import Schema
from model.leaks import series_values
from model.logs import SPLITS, unix_seconds

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
    samples = _samples(frame, schema, split=_by_time(time) if split is None else split)
    if "train" in samples:
        source = {feature.name: feature.source for feature in schema.features}
        found += check_columns(
            samples["train"],
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


def _samples(
    frame: pl.DataFrame, schema: Schema, *, split: npt.NDArray[np.str_]
) -> Mapping[str, Sample]:
    log = schema.log
    keys = [log.request_id] if log.request_id is not None else [log.user_id, log.time]
    samples = {}
    for name in SPLITS:
        in_split = np.flatnonzero(split == name)
        if not len(in_split):
            continue
        part = frame[in_split]
        if len(part) > 10 * MAX_COLUMN_ROWS:
            # Whole users first, so that requests need not be told apart in all of a large log.
            num_parts = len(part) // (5 * MAX_COLUMN_ROWS)
            part = part.filter(pl.col(log.user_id).hash(seed=0) % num_parts == 0)
        numbers = part.select(pl.struct(keys).rank("dense")).to_series()
        request = numbers.cast(pl.Int64).to_numpy() - 1
        rows = sampled_requests(request)
        part = part[rows]
        columns = {
            feature.name: series_values(part[feature.name])
            for feature in schema.features
            if feature.name in part.columns
        }
        labels = [part[step.label].cast(pl.Int8).fill_null(0).to_numpy() for step in schema.steps]
        samples[name] = Sample(
            values={name: values for name, values in columns.items() if values is not None},
            labels=np.stack(labels, axis=1),
            known=np.ones((len(rows), len(labels)), np.bool_),
            request=request[rows],
            user=part[log.user_id].rank("dense").fill_null(0).to_numpy().astype(np.int64),
        )
    return samples
