"""Checks of an impression log and its features: what gives a label away, what the splits share.

Each finding has its figure. Columns are looked at on a sample of whole requests, rows on all rows
of a sample of users: beyond one pass the cost does not grow with the log.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError
from model.leaks import (
    Values,
    determines,
    is_position,
    num_units,
    presence,
    rate_by_value,
    separation,
    stability_index,
)
from model.logs import SPLITS

MAX_COLUMN_ROWS = 200_000  # of train; of it with each step, too
MAX_DRIFT_ROWS = 50_000  # of each other split
MAX_USER_ROWS = 2_000_000
SEPARATES = 0.95  # AUC of one column alone
DRIFTS = 0.25  # population stability index: the customary bound of a large shift
MIN_SHARE = 0.001  # of duplicated or misplaced rows
POSITION_NAME = re.compile(r"(^|_)(position|pos|rank|slot)(_|$)")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found.

    Attributes:
        check: separates, decides, presence, position, duplicates, backwards, users, requests,
            overlap or drift.
        subject: the feature, the split or the column.
        figure: the number that speaks, also in the message.
        is_certain: whether it can be nothing but a fault.
    """

    check: str
    subject: str
    figure: float
    message: str
    is_certain: bool = False

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Columns of some whole requests of one split.

    Attributes:
        values: by feature; lists have none.
        labels: int8 [n, T], cumulative.
        known: bool [n, T].
        request, user: each row's, as numbers, int64 [n].
    """

    values: Mapping[str, Values]
    labels: npt.NDArray[np.int8]
    known: npt.NDArray[np.bool_]
    request: Ints
    user: Ints


@dataclass(frozen=True, kw_only=True)
class LogNames:
    """The columns of a log that the rows are checked by."""

    user: str
    item: str
    time: str
    request: str | None


def sampled_requests(request: Ints, *, max_rows: int = MAX_COLUMN_ROWS) -> Ints:
    """Rows of whole requests drawn at random, the same ones in every call; all if they are few.

    Args:
        request: numbers from 0 with few gaps, one per row.
        max_rows: some so many are drawn.
    """
    if len(request) <= max_rows:
        return np.arange(len(request))
    kept = np.random.default_rng(0).random(int(request.max()) + 1) < max_rows / len(request)
    return np.flatnonzero(kept[request])


def rows_with_step(labels: npt.NDArray[np.int8], step: int) -> Ints:
    """Rows that have the step, drawn at random if they are many; the next step is judged on them.

    Conversions are few: in a sample of all rows there would be none to judge by.
    """
    rows = np.flatnonzero(labels[:, step] == 1)
    if len(rows) > MAX_COLUMN_ROWS:
        kept = np.random.default_rng(0).random(len(rows)) < MAX_COLUMN_ROWS / len(rows)
        rows = rows[kept]
    return rows


def check_columns(
    train: Sample,
    *,
    later: Sequence[Sample],
    steps: Sequence[str],
    is_filled_before: Callable[[str], bool],
    is_log_only: Callable[[str], bool],
) -> list[Finding]:
    """What single columns of the training rows tell of the labels.

    Args:
        train: the sample.
        later: for each step after the first, rows that have the step before it.
        steps: names, in the chain's order.
        is_filled_before: whether a feature is made from events before the impression only, so that
            its being missing is no sign of the label's doing.
        is_log_only: whether a feature is fixed where the model serves: a position that is harms
            nobody.
    """
    found = []
    for name, values in train.values.items():
        told = _told(name, (train, *later), steps, is_filled_before(name))
        if told is not None:
            found.append(told)
        if not is_log_only(name) and (place := _position(name, values, train)) is not None:
            found.append(place)
    return found


def check_drift(
    samples: Mapping[str, Sample], *, grows: Callable[[str], bool] = lambda _: False
) -> list[Finding]:
    """Features that are distributed otherwise in a later split than in train, the worst first.

    Args:
        samples: by split.
        grows: whether a feature counts all events since the log's start, which the message says.
    """
    train, found = samples["train"], []
    units = {name: _units(values, train) for name, values in train.values.items()}
    for split in SPLITS[1:]:
        if split not in samples or not len(samples[split].request):
            continue
        for name, values in train.values.items():
            if name not in samples[split].values:
                continue
            other = samples[split].values[name]
            pair = (units[name], _units(other, samples[split]))
            index = stability_index(values, other, units=pair)
            if index >= DRIFTS:
                message = (
                    f"feature {name!r} drifts: its population stability index from train to "
                    f"{split} is {index:.2f} (over {DRIFTS} is a large shift)"
                )
                if grows(name):
                    message += "; it counts all events since the log's start and grows with it"
                found.append(Finding(check="drift", subject=name, figure=index, message=message))
    # Of each feature the worst split.
    worst: dict[str, Finding] = {}
    for finding in found:
        if finding.subject not in worst or finding.figure > worst[finding.subject].figure:
            worst[finding.subject] = finding
    return sorted(worst.values(), key=lambda f: -f.figure)


def check_rows(
    frame: pl.DataFrame,
    *,
    names: LogNames,
    time: npt.NDArray[np.float64],
    event_times: Mapping[str, npt.NDArray[np.float64]],
    split: npt.NDArray[np.str_] | None,
    num_backwards: int,
) -> list[Finding]:
    """What rows share that they should not, and times that cannot be.

    Args:
        frame: the log.
        names: its columns.
        time: unix seconds of the rows.
        event_times: unix seconds of the steps' events by step, NaN for none.
        split: of the rows; None leaves the checks of splits out.
        num_backwards: rows that were earlier than the row before in the file.
    """
    found = list(_backwards(len(frame), num_backwards, time, event_times))
    num_parts = max(1, math.ceil(len(frame) / MAX_USER_ROWS))
    rows = pl.DataFrame(
        {
            "user": frame[names.user],
            "item": frame[names.item],
            "time": time,
            **({} if names.request is None else {"request": frame[names.request]}),
            **({} if split is None else {"split": _split_codes(split)}),
        }
    )
    if num_parts > 1:
        rows = rows.filter(pl.col("user").hash(seed=0) % num_parts == 0)
    of = f" (of {len(rows):,} rows, all of one user in {num_parts})" if num_parts > 1 else ""
    found += _duplicates(rows, of)
    if split is not None and len(rows):
        found += _overlaps(rows, of)
    return found


def refuse_certain(findings: Sequence[Finding]) -> None:
    """Ends on what can be nothing but a fault.

    Raises:
        LogError: there is such a finding; all are named.
    """
    certain = [finding.message for finding in findings if finding.is_certain]
    if certain:
        raise LogError("; ".join(certain))


def _units(values: Values, sample: Sample) -> int:
    return num_units(values, user=sample.user, request=sample.request)


def _split_codes(split: npt.NDArray[np.str_]) -> pl.Series:
    """Places in SPLITS, -1 for another name: small, and fast to compare."""
    codes = np.full(len(split), -1, np.int8)
    for code, name in enumerate(SPLITS):
        codes[split == name] = code
    return pl.Series(codes)


def _told(
    name: str, samples: Sequence[Sample], steps: Sequence[str], is_filled_before: bool
) -> Finding | None:
    """The first step that the column tells too much of, each on its own sample."""
    for t, (step, sample) in enumerate(zip(steps, samples, strict=True)):
        rows = sample.known[:, t]
        here, positive = sample.values[name].take(rows), sample.labels[rows, t] == 1
        after = f" of rows with {steps[t - 1]!r}" if t else ""
        if determines(here, positive):
            message = (
                f"feature {name!r} decides step {step!r}{after}: in all {len(positive):,} rows "
                "looked at its value says which it is; leave it out"
            )
            return Finding(
                check="decides", subject=name, figure=1.0, message=message, is_certain=True
            )
        shares = None if is_filled_before else presence(here, positive)
        if shares is not None:
            message = (
                f"feature {name!r} looks filled after the event: {shares[0]:.1%} of rows with "
                f"step {step!r} have a value, {shares[1]:.1%} of those without{after}"
            )
            figure = abs(shares[0] - shares[1])
            return Finding(check="presence", subject=name, figure=figure, message=message)
        area = separation(here, positive)
        if area is not None and area >= SEPARATES:
            message = (
                f"feature {name!r} tells step {step!r}{after} almost alone: its AUC is "
                f"{area:.4f}; is it known before the impression?"
            )
            return Finding(check="separates", subject=name, figure=area, message=message)
    return None


def _position(name: str, values: Values, train: Sample) -> Finding | None:
    is_named = POSITION_NAME.search(name.lower()) is not None
    if is_position(values, train.request):
        reason = "counts through the rows of each request"
    elif is_named:
        reason = "is one by its name"
    else:
        return None
    rates = rate_by_value(values, train.labels[:, 0] == 1)
    shown = "" if rates is None else f" (rate {rates[1]:.2%} at {rates[0]}, {rates[3]:.2%} at "
    shown += "" if rates is None else f"{rates[2]})"
    message = (
        f"feature {name!r} is a position: it {reason}{shown}; it is not known before the model "
        'has ranked: declare it source = "log_only"'
    )
    figure = 0.0 if rates is None else rates[1] - rates[3]
    return Finding(check="position", subject=name, figure=figure, message=message)


def _backwards(
    num_rows: int,
    num_backwards: int,
    time: npt.NDArray[np.float64],
    event_times: Mapping[str, npt.NDArray[np.float64]],
) -> Iterator[Finding]:
    if num_backwards > MIN_SHARE * num_rows:
        share = num_backwards / num_rows
        yield Finding(
            check="backwards",
            subject="time",
            figure=share,
            message=f"time goes backwards: {num_backwards:,} rows ({share:.1%}) are earlier than "
            "the row before them in the file; they are sorted for training",
        )
    before: tuple[str, npt.NDArray[np.float64]] = ("impression", time)
    for step, happened in event_times.items():
        early = int((happened < before[1]).sum())
        if early:
            share = early / max(int((~np.isnan(happened)).sum()), 1)
            yield Finding(
                check="backwards",
                subject=step,
                figure=share,
                message=f"time goes backwards: {early:,} events of step {step!r} ({share:.1%}) "
                f"are earlier than their {before[0]}",
            )
        before = (step, happened)


def _duplicates(rows: pl.DataFrame, of: str) -> Iterator[Finding]:
    keys = [name for name in ("user", "item", "time", "request") if name in rows.columns]
    repeated = len(rows) - rows.select(keys).n_unique()
    if repeated > MIN_SHARE * len(rows):
        share = repeated / len(rows)
        yield Finding(
            check="duplicates",
            subject="impressions",
            figure=share,
            message=f"duplicated impressions: {repeated:,} rows ({share:.1%}) repeat the "
            f"{', '.join(keys[:-1])} and {keys[-1]} of another{of}",
        )


def _overlaps(rows: pl.DataFrame, of: str) -> Iterator[Finding]:
    """Times, users and requests that train shares with the splits it is measured on."""
    train = rows.filter(pl.col("split") == SPLITS.index("train"))
    for code, split in enumerate(SPLITS[1:], start=1):
        part = rows.filter(pl.col("split") == code)
        if not len(part) or not len(train):
            continue
        first = part["time"].min()
        later = float((train["time"] > first).mean() or 0.0)  # type: ignore[arg-type]  # a number
        if later > MIN_SHARE and split == "test":
            yield Finding(
                check="overlap",
                subject=split,
                figure=later,
                message=f"splits overlap in time: {later:.1%} of the training rows are later than "
                f"the first {split} row{of}",
            )
        last = train.group_by("user").agg(pl.col("time").max().alias("last"))
        known = part.join(last, on="user", how="left")
        shared = float((known["last"] > known["time"]).fill_null(False).mean() or 0.0)  # type: ignore[arg-type]  # a number
        if shared > MIN_SHARE:
            yield Finding(
                check="users",
                subject=split,
                figure=shared,
                message=f"users across splits: {shared:.1%} of the {split} rows are of users who "
                f"have training rows later than that{of}",
            )
        if "request" in rows.columns:
            wanted = train["request"].unique().implode()
            both = float(part["request"].is_in(wanted).mean() or 0.0)  # type: ignore[arg-type]  # a number
            if both > MIN_SHARE:
                yield Finding(
                    check="requests",
                    subject=split,
                    figure=both,
                    message=f"requests across splits: {both:.1%} of the {split} rows are of "
                    f"requests that train has rows of{of}",
                )
