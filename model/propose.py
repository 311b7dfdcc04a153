"""Proposes a schema from a log: a TOML file for its owner to read and correct.

Guesses by names and by what depends on what in a sample. Refuses, with the reason and its figure,
columns that are known only after the impression; proposes position-like columns as `log_only`. What
the checks find in the columns and rows that are left is told beside it.
"""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.checks import POSITION_NAME, SEPARATES, Finding
from model.contract.errors import LogError
from model.contract.spec import parse_schema
from model.leaks import is_position, presence, separation, series_values
from model.logs import read_table
from model.table_checks import check_table

SAMPLE_ROWS = 200_000
MAX_VOCABULARY = 200_000
MAX_SMALL_INTEGERS = 50

USER_NAMES = ("user_id", "user", "uid", "userid", "household_id", "customer_id", "visitor_id")
ITEM_NAMES = (
    *("item_id", "item", "product_id", "ad_id", "adgroup_id", "creative_id", "campaign_id"),
    *("video_id", "prop_id", "sku"),
)
TIME_NAMES = ("time", "timestamp", "ts", "event_time", "time_stamp", "impression_time", "datetime")
REQUEST_NAMES = ("request_id", "search_id", "srch_id", "query_id", "page_view_id", "pv_id")
KEEP_RATE_NAMES = ("negative_keep_rate", "keep_rate", "sampling_rate", "sample_rate")
STEP_NAMES = (
    ("click", ("click", "clicked", "is_click", "clk", "click_bool")),
    (
        "conversion",
        *(
            (
                "conversion",
                "converted",
                "is_conversion",
                "purchase",
                "buy",
                "order",
                "booking_bool",
            ),
        ),
    ),
)
AFTERWARDS = re.compile(
    r"(^|_)(clicks?|clk|clicked|conversions?|converted|purchased?|orders?|attribut\w*|revenue|gmv|dwell"
    r"|play_time|stay_time|watch_time|cost|cpo|label|exposure)(_|$)"
)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A schema as TOML text, each column left out with the reason, and what the checks found."""

    toml: str
    refused: dict[str, str]
    findings: list[Finding]


def propose_schema(
    path: Path,
    *,
    user_id: str | None = None,
    item_id: str | None = None,
    time: str | None = None,
    labels: tuple[str, ...] = (),
) -> Proposal:
    """Proposes a schema for a log; names that are given are taken, the others guessed.

    Raises:
        LogError: the log is unreadable, or a column that is needed cannot be found.
    """
    frame = read_table(path)
    if not len(frame):
        raise LogError(f"{path} has no rows", path=path)
    user = _find(frame, user_id, USER_NAMES, "user", path)
    item = _find(frame, item_id, ITEM_NAMES, "item", path)
    when = _find(frame, time, TIME_NAMES, "time", path)
    steps = _steps(frame, labels, path)
    request = next((name for name in REQUEST_NAMES if name in frame.columns), None)
    split = "split" if "split" in frame.columns else None
    keep_rate = next((name for name in KEEP_RATE_NAMES if name in frame.columns), None)
    columns = _Columns(frame, user=user, item=item, time=when, request=request, steps=steps)
    log = {"user_id": user, "item_id": item, "time": when, "request_id": request, "split": split}
    log["negative_keep_rate"] = keep_rate
    lines = [
        f"# Proposed from {path.name}; read it and correct it before you train.",
        'time_zone = "UTC"  # hour and weekday are told in it',
        "availability_lag_s = 0  # how long after an event the online store knows of it",
        "",
        "[log]",
        *(f'{key} = "{value}"' for key, value in log.items() if value is not None),
    ]
    for name, label, event_time in steps:
        lines += ["", "[[steps]]", f'name = "{name}"', f'label = "{label}"']
        if event_time is not None:
            lines += [f'time = "{event_time}"', "window_days = 7  # how long after the impression"]
    for part in ("hour", "weekday"):
        lines += ["", "[[features]]", f'name = "{part}"', 'kind = "time_part"', f'part = "{part}"']
    lines += columns.feature_lines()
    if columns.refused:
        lines += ["", "# Left out:"]
        lines += [f"#   {name}: {reason}" for name, reason in columns.refused.items()]
    text = "\n".join(lines) + "\n"

    schema = parse_schema(tomllib.loads(text), where="proposal")
    findings = check_table(frame, schema=schema, path=path)
    return Proposal(toml=text, refused=columns.refused, findings=findings)


class _Columns:
    """Judges each remaining column on a sample."""

    def __init__(
        self,
        frame: pl.DataFrame,
        *,
        user: str,
        item: str,
        time: str,
        request: str | None,
        steps: list[tuple[str, str, str | None]],
    ) -> None:
        self._frame = frame.head(SAMPLE_ROWS)
        self._user, self._item, self._time, self._request = user, item, time, request
        self._first_label = steps[0][1]
        self._labels = [label for _, label, _ in steps]
        known = {user, time, request, "split", *KEEP_RATE_NAMES}
        known |= {label for _, label, _ in steps} | {t for _, _, t in steps}
        self._names = [name for name in frame.columns if name not in known]
        self.refused: dict[str, str] = {}

    def feature_lines(self) -> list[str]:
        lines: list[str] = []
        for name in self._names:
            reason = self._refusal(name)
            if reason is not None:
                self.refused[name] = reason
            else:
                lines += self._feature(name)
        return lines

    def _refusal(self, name: str) -> str | None:
        series = self._frame[name]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return "its name is not of letters, digits and underscores; rename it to use it"
        if AFTERWARDS.search(name.lower()):
            return "by its name it is known only after the impression"
        if series.dtype.is_temporal():
            return "a time; declare it as kind 'elapsed' if it is known at the impression"
        if series.dtype == pl.Boolean:
            return "true or false; write it as 0 and 1 to use it"
        if series.dtype.is_nested():
            return "a list; declare it as kind 'history' with its times beside it"
        if series.null_count() == len(series) or series.n_unique() < 2:
            return "it has one value only"
        label = self._frame[self._first_label].cast(pl.Int8)
        present = series.is_not_null()
        if series.null_count() and not (present & (label == 0)).any():
            return f"it is filled only where {self._first_label!r} is 1"
        return self._leak(series)

    def _leak(self, series: pl.Series) -> str | None:
        """What the column alone tells of a label that it must not."""
        values = series_values(series)
        assert values is not None
        for column in self._labels:
            positive = (self._frame[column].cast(pl.Int8) == 1).fill_null(False).to_numpy()
            area = separation(values, positive, fewest=10)
            if area is not None and area >= SEPARATES:
                return (
                    f"it alone tells {column!r} nearly perfectly (AUC {area:.4f}): it must come "
                    "after it"
                )
            shares = presence(values, positive)
            if shares is not None:
                return (
                    f"it looks filled after {column!r}: {shares[0]:.1%} of its rows have a value, "
                    f"{shares[1]:.1%} of the others"
                )
        return None

    def _is_position(self, name: str) -> bool:
        if POSITION_NAME.search(name.lower()):
            return True
        values = series_values(self._frame[name])
        return values is not None and is_position(values, self._request_of())

    def _request_of(self) -> npt.NDArray[np.int64]:
        keys = [self._request] if self._request is not None else [self._user, self._time]
        numbers = self._frame.select(pl.struct(keys).rank("dense"))
        return numbers.to_series().to_numpy().astype(np.int64)

    def _feature(self, name: str) -> list[str]:
        series = self._frame[name]
        lines = ["", "[[features]]", f'name = "{name}"']
        scope = self._scope(name)
        if name != self._item and self._is_position(name):
            common = series.drop_nulls().mode().sort()[0]
            is_number = isinstance(common, float)
            return [
                *lines,
                'kind = "numeric"' if is_number else 'kind = "categorical"',
                'scope = "cross"',
                'source = "log_only"  # known in the log, not at request time',
                f"serving_value = {json.dumps(common)}",
            ]
        source = "items" if name == self._item else "request"
        distinct = series.n_unique()
        is_count = series.dtype.is_integer() and not re.search(r"(_id|id|code|type)$", name.lower())
        if (
            series.dtype.is_float()
            or series.dtype.is_decimal()
            or (is_count and distinct > MAX_SMALL_INTEGERS)
        ):
            return [*lines, 'kind = "numeric"', *_scope(scope, source), *_log1p(series)]
        if distinct > MAX_VOCABULARY:
            return [*lines, 'kind = "hashed"', *_scope(scope, source), "num_buckets = 1000000"]
        return [*lines, 'kind = "categorical"', *_scope(scope, source), "min_count = 10"]

    def _scope(self, name: str) -> str:
        if name == self._item:
            return "item"
        # One user at one instant is one request, where the log does not name requests.
        request = [self._request] if self._request is not None else [self._user, self._time]
        scopes = {"user": [self._user], "item": [self._item], "context": request}
        for scope, keys in scopes.items():
            if self._is_constant(name, keys):
                return scope
        return "cross" if self._has_repeats(request) else "context"

    def _groups(self, keys: list[str], *values: pl.Expr) -> pl.DataFrame:
        groups = self._frame.group_by(keys).agg(pl.len().alias("_rows"), *values)
        return groups.filter(pl.col("_rows") > 1)

    def _has_repeats(self, keys: list[str]) -> bool:
        return len(self._groups(keys)) > 0

    def _is_constant(self, name: str, keys: list[str]) -> bool:
        """Whether the column has one value per key, in keys that occur more than once."""
        groups = self._groups(keys, pl.col(name).n_unique().alias("_values"))
        return len(groups) > 0 and bool((groups["_values"] == 1).all())


def _steps(
    frame: pl.DataFrame, labels: tuple[str, ...], path: Path
) -> list[tuple[str, str, str | None]]:
    if labels:
        missing = [label for label in labels if label not in frame.columns]
        if missing:
            raise LogError(f"{path} has no column {missing[0]!r}", path=path)
        found = [(label, label) for label in labels]
    else:
        found = [
            (step, name)
            for step, names in STEP_NAMES
            for name in [next((n for n in names if n in frame.columns), None)]
            if name is not None
        ]
    if len(found) < 2:
        raise LogError(
            f"{path}: found {len(found)} label columns, need two or more; name them in the chain's "
            "order with --label",
            path=path,
        )
    for _, label in found:
        if not (frame[label].dtype.is_numeric() or frame[label].dtype == pl.Boolean):
            kind = "text" if frame[label].dtype == pl.String else str(frame[label].dtype)
            raise LogError(f"{path}: label {label!r} is {kind}, expected 0 or 1", path=path)
    return [(step, label, _event_time(frame, step, label)) for step, label in found]


def _event_time(frame: pl.DataFrame, step: str, label: str) -> str | None:
    candidates = [
        f"{name}_{word}" for name in (step, label) for word in ("time", "timestamp", "ts")
    ]
    return next((name for name in candidates if name in frame.columns), None)


def _find(
    frame: pl.DataFrame, given: str | None, names: tuple[str, ...], what: str, path: Path
) -> str:
    if given is not None:
        if given not in frame.columns:
            raise LogError(f"{path} has no column {given!r}", path=path)
        return given
    for name in names:
        if name in frame.columns:
            return name
    raise LogError(
        f"{path}: which column is the {what}? None of {', '.join(names)} is there; name it with "
        f"--{what}",
        path=path,
    )


def _scope(scope: str, source: str) -> list[str]:
    hint = {"user": '"store", with a users table', "item": '"items", with an items table'}
    note = f"  # or {hint[scope]}" if scope in hint and source == "request" else ""
    return [f'scope = "{scope}"', f'source = "{source}"{note}']


def _log1p(series: pl.Series) -> list[str]:
    """log1p for columns that are never negative and spread over orders of magnitude."""
    values = series.drop_nulls()
    low, middle, high = values.min(), values.median(), values.quantile(0.99)
    numbers = [float(v) for v in (low, middle, high) if isinstance(v, int | float)]
    if len(numbers) == 3 and numbers[0] >= 0 and numbers[2] > 10 * max(numbers[1], 0.1):
        return ["log1p = true", "minimum = 0"]
    return []
