"""Seeded request bodies as real callers send them, drawn from a materialised snapshot.

Users and items are popular by Zipf's law, some of both are unknown to the service, and requests
differ in size. Bodies recorded elsewhere are read from JSON lines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.bundle import read_bundle
from model.contract.errors import LogError
from model.contract.record import unpack_record
from model.contract.spec import Categorical, Feature, FittedSchema, Hashed, Numeric
from model.contract.times import format_time
from service.materialize import RECORD, USER_ID

Form = Literal["ids", "columns", "rows"]
Layout = Literal["rows", "columns"]
Value = str | int | float

MAX_CANDIDATES = 1000
DEFAULT_TIME_AFTER_RECORDS_S = 3600.0
_HASHED_VALUES = 10_000
_LOWEST_UNKNOWN = 9_000_000_000_000


@dataclass(frozen=True, kw_only=True)
class CandidateCount:
    """How many candidates requests have: log-normal, clipped to 1 to 1,000; sigma 0 fixes it."""

    median: float
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """One request's number."""
        count = round(self.median * float(np.exp(self.sigma * rng.standard_normal())))
        return min(max(count, 1), MAX_CANDIDATES)

    def __str__(self) -> str:
        if self.sigma == 0.0:
            return f"{self.median:g}"
        return f"lognormal:{self.median:g}:{self.sigma:g}"


def parse_candidates(text: str) -> CandidateCount:
    """Reads `100`, `lognormal` (median 100, sigma 0.8) or `lognormal:MEDIAN:SIGMA`.

    Raises:
        ValueError: It is none of these.
    """
    kind, _, rest = text.partition(":")
    if kind != "lognormal":
        count = int(text)
        if not 1 <= count <= MAX_CANDIDATES:
            raise ValueError(f"got {count} candidates, expected 1 to {MAX_CANDIDATES}")
        return CandidateCount(median=count)
    median, _, sigma = (rest or "100:0.8").partition(":")
    return CandidateCount(median=float(median), sigma=float(sigma or 0.8))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What requests look like.

    Attributes:
        candidates: How many they have.
        form: Candidates as ids only, with inline values as columns, or as one object each.
        layout: Of the answer; `rows` is the service's default and is not named in the body.
        zipf: Exponent of popularity of users and of items; 0 makes all equally popular.
        unknown_users: Share of requests whose user has no record.
        unknown_items: Share of candidates that the item table does not have.
        timeout_ms: The requests' own; None leaves the service's.
        distinct: Number of different bodies, sent in random order.
        seed: Of everything that is drawn.
    """

    candidates: CandidateCount
    form: Form = "ids"
    layout: Layout = "rows"
    zipf: float = 1.0
    unknown_users: float = 0.02
    unknown_items: float = 0.02
    timeout_ms: int | None = None
    distinct: int = 2000
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Population:
    """What bodies are drawn from.

    Attributes:
        users: Ids with a record.
        items: Ids in the item table.
        context: Values by raw column name.
        inline: Values of what a request says of its candidates, by raw column name.
        time: Of the requests, RFC 3339.
    """

    users: Sequence[Value]
    items: Sequence[Value]
    context: Mapping[str, Sequence[Value]]
    inline: Mapping[str, Sequence[Value]]
    time: str


def read_population(
    bundle: Path, items: Path, records: Path, *, time: str | None = None
) -> Population:
    """Ids of the snapshots, values of the bundle's vocabularies.

    Args:
        bundle: Directory; says which features requests give.
        items: Item snapshot.
        records: User records; without `time`, requests come an hour after they were made.
        time: RFC 3339.

    Raises:
        BundleError, LogError: Something cannot be read.
    """
    fitted = read_bundle(bundle).fitted
    users = pl.read_parquet(records, columns=[USER_ID])[USER_ID].to_list()
    ids = pl.read_parquet(items, columns=[fitted.schema_.log.item_id])
    if not users or not len(ids):
        raise LogError(f"{records} or {items} has no rows", path=records)
    if time is None:
        first = pl.read_parquet(records, columns=[RECORD], n_rows=1)[RECORD][0]
        time = format_time(unpack_record(first).updated_at + DEFAULT_TIME_AFTER_RECORDS_S)
    given = [f for f in fitted.schema_.features if f.source == "request"]
    return Population(
        users=[_short(user) for user in users],
        items=ids[fitted.schema_.log.item_id].to_list(),
        context=_values([f for f in given if f.scope == "context"], fitted),
        inline=_values([f for f in given if not f.is_request_side], fitted),
        time=time,
    )


def make_bodies(population: Population, workload: Workload) -> list[bytes]:
    """`workload.distinct` different bodies of POST /score."""
    rng = np.random.default_rng(workload.seed)
    users = _Popularity(len(population.users), workload.zipf, rng)
    items = _Popularity(len(population.items), workload.zipf, rng)
    return [
        msgspec.json.encode(_body(population, workload, users=users, items=items, rng=rng))
        for _ in range(workload.distinct)
    ]


def read_bodies(path: Path, *, timeout_ms: int | None = None) -> list[bytes]:
    """Bodies of a JSON-lines file; `timeout_ms`, if given, replaces theirs.

    Raises:
        LogError: It cannot be read, is empty, or a line is no JSON object.
    """
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as exc:
        raise LogError(f"{path}: {exc.strerror}", path=path) from exc
    if not lines:
        raise LogError(f"{path}: no lines", path=path)
    bodies = []
    for number, line in enumerate(lines):
        try:
            content = msgspec.json.decode(line, type=dict[str, Any])  # Any: JSON
        except msgspec.DecodeError as exc:
            raise LogError(f"{path}: {exc}", path=path, row_number=number) from exc
        if timeout_ms is not None:
            content["timeout_ms"] = timeout_ms
        bodies.append(msgspec.json.encode(content))
    return bodies


class _Popularity:
    """Draws positions 0 to n-1, the r-th most popular with probability proportional to r^-s."""

    def __init__(self, size: int, exponent: float, rng: np.random.Generator) -> None:
        weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights) / weights.sum()
        # Who is popular has nothing to do with the order of the file.
        self._position = rng.permutation(size)
        self._rng = rng

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """That many, with repetition; int64."""
        ranks = np.searchsorted(self._cumulative, self._rng.random(count), side="right")
        return self._position[np.minimum(ranks, len(self._position) - 1)]

    def draw_distinct(self, count: int) -> npt.NDArray[np.int64]:
        """Different ones in the order drawn; with repetition where there are fewer than asked."""
        size = len(self._position)
        found = self.draw(count + count // 2 + 8)
        while True:
            _, first = np.unique(found, return_index=True)
            if len(first) >= min(count, size):
                break
            # Draws of equal chance fill up what popularity alone would take long to find.
            more = self._rng.integers(size, size=count)
            found = np.concatenate([found, self.draw(count), more])
        distinct = found[np.sort(first)]
        return np.resize(distinct, count)


def _body(
    population: Population,
    workload: Workload,
    *,
    users: _Popularity,
    items: _Popularity,
    rng: np.random.Generator,
) -> dict[str, Any]:  # Any: JSON
    count = workload.candidates.draw(rng)
    ids = [population.items[position] for position in items.draw_distinct(count)]
    for row in np.flatnonzero(rng.random(count) < workload.unknown_items).tolist():
        ids[row] = _unknown(ids[row], rng)
    user = population.users[users.draw(1)[0]]
    if rng.random() < workload.unknown_users:
        user = _unknown(user, rng)
    body: dict[str, Any] = {
        "user_id": user,
        "time": population.time,
        "context": {name: _pick(values, 1, rng)[0] for name, values in population.context.items()},
        "candidates": _candidates(ids, population.inline, workload.form, rng),
    }
    if workload.timeout_ms is not None:
        body["timeout_ms"] = workload.timeout_ms
    if workload.layout != "rows":
        body["layout"] = workload.layout
    return body


def _candidates(
    ids: list[Value],
    inline: Mapping[str, Sequence[Value]],
    form: Form,
    rng: np.random.Generator,
) -> object:
    if form == "ids":
        return ids
    columns = {"item_id": ids, **{n: _pick(v, len(ids), rng) for n, v in inline.items()}}
    if form == "columns":
        return columns
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(features: Sequence[Feature], fitted: FittedSchema) -> dict[str, list[Value]]:
    """Values to draw from, for kinds whose values a caller can make up."""
    values: dict[str, list[Value]] = {}
    for feature in features:
        if isinstance(feature, Categorical):
            values[feature.name] = list(fitted.vocabularies[feature.name])
        elif isinstance(feature, Hashed):
            values[feature.name] = list(range(_HASHED_VALUES))
        elif isinstance(feature, Numeric):
            low = 0.0 if feature.minimum is None else feature.minimum
            high = low + 100.0 if feature.maximum is None else feature.maximum
            values[feature.name] = np.linspace(low, high, 101).tolist()
    return {name: options for name, options in values.items() if options}


def _pick(values: Sequence[Value], count: int, rng: np.random.Generator) -> list[Value]:
    return [values[position] for position in rng.integers(len(values), size=count).tolist()]


def _unknown(known: Value, rng: np.random.Generator) -> Value:
    number = _LOWEST_UNKNOWN + int(rng.integers(1_000_000_000))
    return number if isinstance(known, int) else f"unknown-{number}"


def _short(text: str) -> Value:
    """A number where it reads back as the same id: shorter, and what most callers have."""
    return int(text) if text.isdecimal() and str(int(text)) == text else text
