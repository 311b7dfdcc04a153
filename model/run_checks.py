"""The checks of `model.checks` on what a run is trained on: its log, and features as built."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl

from model.checks import (
    MAX_COLUMN_ROWS,
    MAX_DRIFT_ROWS,
    Finding,
    LogNames,
    Sample,
    check_columns,
    check_drift,
    check_rows,
    refuse_certain,
    rows_with_step,
    sampled_requests,
)
from model.contract.spec import (
    Elapsed,
    Feature,
    History,
    Match,
    Numeric,
    Recent,
    Schema,
    raw_columns,
)
from model.leaks import Values, column_values
from model.logs import ImpressionLog, unix_seconds
from model.raw_split import RawSplit


def check_run(
    log: ImpressionLog, parts: Mapping[str, RawSplit], *, schema: Schema
) -> list[Finding]:
    """All findings, those of the rows first.

    Args:
        log: as read.
        parts: raw columns by split.
        schema: of both.

    Raises:
        LogError: a feature decides a label, whatever the other values are.
    """
    found = _rows(log, schema)
    train = parts["train"]
    samples = {}
    for name, part in parts.items():
        most = MAX_COLUMN_ROWS if name == "train" else MAX_DRIFT_ROWS
        samples[name] = _sample(part, sampled_requests(part.request_of, max_rows=most), schema)
    features = {feature.name: feature for feature in schema.features}
    made = _made_from_events(schema, log.frame)
    found += check_columns(
        samples["train"],
        later=[
            _sample(train, rows_with_step(train.labels.values, t), schema)
            for t in range(len(schema.steps) - 1)
        ],
        steps=[step.name for step in schema.steps],
        is_filled_before=lambda name: name in made,
        is_log_only=lambda name: name in features and features[name].source == "log_only",
    )
    growing = _growing(schema) & made
    found += check_drift(samples, grows=lambda name: name in growing)
    refuse_certain(found)
    return found


def _rows(log: ImpressionLog, schema: Schema) -> list[Finding]:
    return check_rows(
        log.frame,
        names=LogNames(
            user=schema.log.user_id,
            item=schema.log.item_id,
            time=schema.log.time,
            request=schema.log.request_id,
        ),
        time=log.time(schema),
        event_times={
            step.name: unix_seconds(log.frame[step.time])
            for step in schema.steps
            if step.time is not None
        },
        split=log.split,
        num_backwards=log.num_backwards,
    )


def _sample(part: RawSplit, rows: npt.NDArray[np.int64], schema: Schema) -> Sample:
    request = part.request_of[rows]
    values: dict[str, Values] = {}
    for feature in schema.features:
        columns = part.request_columns if feature.is_request_side else part.candidate_columns
        for name in raw_columns(feature):
            if name not in columns:
                continue
            found = column_values(columns[name], request if feature.is_request_side else rows)
            if found is None:
                continue
            if name in _stored_times(feature) and found.numbers is not None:
                # As the model sees it: time stamps alone only say when the row was.
                found = Values(numbers=part.request_time[request] - found.numbers)
            values[name] = found
    labels = part.labels.take(rows)
    return Sample(
        values=values,
        labels=labels.values,
        known=labels.known,
        request=request,
        user=part.user[rows],
    )


def _stored_times(feature: Feature) -> tuple[str, ...]:
    """Raw columns that are times, which the encoder takes the age of."""
    if isinstance(feature, Match):
        return (feature.last_time_column,)
    return (feature.name,) if isinstance(feature, Elapsed) else ()


def _growing(schema: Schema) -> set[str]:
    """Raw columns that count all events there ever were."""
    growing = {
        f.count_column for f in schema.features if isinstance(f, Match) and f.max_age_days is None
    }
    for feature in schema.features:
        statistic = feature.statistic if isinstance(feature, Numeric) else None
        if statistic is not None and statistic.whole_periods is None:
            growing |= {feature.name} if statistic.aggregate in ("count", "users") else set()
    return growing


def _made_from_events(schema: Schema, frame: pl.DataFrame) -> set[str]:
    """Raw columns that are not the log's but made from events strictly before the impression."""
    made: set[str] = set()
    for feature in schema.features:
        has_statistic = getattr(feature, "statistic", None) is not None
        if isinstance(feature, Match | History | Recent) or has_statistic:
            made |= set(raw_columns(feature)) - set(frame.columns)
    return made
