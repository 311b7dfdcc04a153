"""Synthetic requests by a fitted schema: golden rows and random rows for parity. No person's data.

Values are drawn feature by feature from what the fit knows (vocabularies, moments), so no row ever
belonged to anybody.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract.blocks import Blocks
from model.contract.encode import Encoder
from model.contract.spec import (
    Categorical,
    Elapsed,
    Feature,
    Hashed,
    History,
    Match,
    Numeric,
    Recent,
    raw_columns,
)
from model.contract.times import SECONDS_PER_DAY

# Any below: JSON values, one list per raw column.


@dataclass(frozen=True, kw_only=True)
class RawRequests:
    """Raw columns of R requests and N candidates, as JSON values; time is unix seconds [R]."""

    time: npt.NDArray[np.float64]
    request_columns: dict[str, list[Any]]
    candidate_columns: dict[str, list[Any]]
    request_of: npt.NDArray[np.int64]

    def encode(self, encoder: Encoder) -> Blocks:
        """Their blocks."""
        return Blocks(
            request=encoder.request_block(self.request_columns, time=self.time),
            candidate=encoder.candidate_block(
                self.candidate_columns, time=self.time[self.request_of]
            ),
            request_of=self.request_of,
        )


def golden_requests(encoder: Encoder, *, last_time: float) -> RawRequests:
    """64 requests: ordinary, without a record, with unknown ids, with one and many candidates."""
    sizes = [1, 1, 2, 200, *([3, 5, 8, 12] * 15)]
    requests = synthetic_requests(
        encoder, sizes=sizes, last_time=last_time, rng=np.random.default_rng(20240607)
    )
    stored = [
        name
        for feature in encoder.schema.features
        if feature.source == "store"
        for name in raw_columns(feature)
        if name in requests.request_columns
    ]
    for request in (0, 4, 5):  # no user record at all
        for name in stored:
            requests.request_columns[name][request] = None
        for candidate in np.flatnonzero(requests.request_of == request):
            for name in encoder.candidate_layout.matches:
                requests.candidate_columns[f"{name}_count"][candidate] = None
                requests.candidate_columns[f"{name}_last_time"][candidate] = None
    return requests


def synthetic_requests(
    encoder: Encoder, *, sizes: list[int], last_time: float, rng: np.random.Generator
) -> RawRequests:
    """Random requests with the given numbers of candidates, in the year before `last_time`."""
    num_requests = len(sizes)
    time = np.floor(last_time - rng.random(num_requests) * 365.0 * SECONDS_PER_DAY)
    request_of = np.repeat(np.arange(num_requests, dtype=np.int64), sizes)
    request_columns: dict[str, list[Any]] = {}
    candidate_columns: dict[str, list[Any]] = {}
    for feature in encoder.schema.features:
        if feature.is_request_side:
            request_columns |= _columns(feature, encoder, time, rng)
        else:
            candidate_columns |= _columns(feature, encoder, time[request_of], rng)
    return RawRequests(
        time=time,
        request_columns=request_columns,
        candidate_columns=candidate_columns,
        request_of=request_of,
    )


def _columns(
    feature: Feature, encoder: Encoder, time: npt.NDArray[np.float64], rng: np.random.Generator
) -> dict[str, list[Any]]:
    count = len(time)
    moments = encoder.fitted.moments
    if isinstance(feature, Categorical | Hashed):
        return {feature.name: _ids(feature, encoder, count, rng)}
    if isinstance(feature, Numeric):
        values = _draw(moments, feature.name, count, rng)
        values = np.expm1(values) if feature.log1p else values
        values = np.clip(values, feature.minimum, feature.maximum)
        return {feature.name: _with_gaps(values, rng)}
    if isinstance(feature, Elapsed):
        days = np.expm1(np.abs(_draw(moments, feature.name, count, rng)))
        return {feature.name: _with_gaps(np.floor(time - days * SECONDS_PER_DAY), rng)}
    if isinstance(feature, Match):
        counts = np.ceil(np.expm1(np.abs(_draw(moments, feature.count_column, count, rng))))
        days = np.expm1(np.abs(_draw(moments, f"{feature.name}_days", count, rng)))
        times = np.floor(time - days * SECONDS_PER_DAY)
        missing = rng.random(count) < 0.5
        return {
            feature.count_column: _with_gaps(counts, rng, missing=missing),
            feature.last_time_column: _with_gaps(times, rng, missing=missing),
        }
    if isinstance(feature, History):
        return _histories(feature, encoder, time, rng)
    if isinstance(feature, Recent):
        return _recents(feature, encoder, time, rng)
    return {}


def _ids(
    feature: Categorical | Hashed, encoder: Encoder, count: int, rng: np.random.Generator
) -> list[Any]:
    known = encoder.fitted.vocabularies.get(feature.name, ())
    choices: list[Any] = [None, "no such value", *known[:5000]]
    if isinstance(feature, Hashed):
        choices += [f"value {i}" for i in range(1000)]
    picked = rng.integers(len(choices), size=count)
    rare = rng.random(count)
    picked = np.where(rare < 0.05, 0, np.where(rare < 0.1, 1, picked))
    return [choices[i] for i in picked]


def _histories(
    feature: History, encoder: Encoder, time: npt.NDArray[np.float64], rng: np.random.Generator
) -> dict[str, list[Any]]:
    target = encoder.schema.feature(feature.of)
    assert isinstance(target, Categorical | Hashed)
    ids, times = [], []
    for i, now in enumerate(time.tolist()):
        length = (0, feature.max_length)[i] if i < 2 else int(rng.integers(feature.max_length + 1))
        ids.append([value or "none" for value in _ids(target, encoder, length, rng)])
        times.append([float(now - 3600 * (k + 1)) for k in range(length)])
    return {feature.name: ids, f"{feature.name}_time": times}


def _recents(
    feature: Recent, encoder: Encoder, time: npt.NDArray[np.float64], rng: np.random.Generator
) -> dict[str, list[Any]]:
    lengths = rng.integers(feature.max_length + 1, size=len(time)).tolist()
    lengths[:3] = [0, feature.max_length, 1][: len(lengths)]
    largest = 2.0 * (feature.large or 10.0)
    ages = [np.sort(rng.random(n) * 200.0 * SECONDS_PER_DAY) for n in lengths]
    columns: dict[str, list[Any]] = {
        feature.name: [np.round(rng.random(n) * largest, 2).tolist() for n in lengths],
        f"{feature.name}_time": [
            np.floor(now - age).tolist() for now, age in zip(time.tolist(), ages, strict=True)
        ],
    }
    if feature.context is not None:
        context = encoder.schema.feature(feature.context)
        assert isinstance(context, Categorical | Hashed)
        columns[f"{feature.name}_{feature.context}"] = [
            _ids(context, encoder, n, rng) for n in lengths
        ]
    return columns


def _draw(moments: Any, name: str, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    entry = moments.get(name)
    mean, std = (entry.mean, entry.std) if entry is not None else (0.0, 1.0)
    drawn = mean + min(std, 2.0) * np.clip(rng.standard_normal(count), -3.0, 3.0)
    return np.round(drawn, 3)


def _with_gaps(
    values: npt.NDArray[np.float64],
    rng: np.random.Generator,
    *,
    missing: npt.NDArray[np.bool_] | None = None,
) -> list[Any]:
    gaps = rng.random(len(values)) < 0.1 if missing is None else missing
    return [
        None if gap else round(value, 3) for value, gap in zip(values.tolist(), gaps, strict=True)
    ]
