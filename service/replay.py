"""Scores logged requests again, by any bundle, and compares with what was answered."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError, RecordError
from model.contract.record import unpack_record
from service.errors import InvalidRequest
from service.features import Candidates, GivenColumn
from service.parquet import reading
from service.request_log import COLUMNS, LoggedColumn, log_files
from service.runtime import Outputs
from service.state import ServingState

_TOP = 10

_COLUMNS = msgspec.json.Decoder(dict[str, LoggedColumn])
_VALUES = msgspec.json.Decoder(dict[str, Any])  # Any: JSON values


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What became of one output, over all candidates scored again.

    Attributes:
        mean_logged: Mean of what was answered.
        mean_replayed: Mean of what this bundle says.
        mean_absolute: Mean distance of the two.
        max_absolute: Largest distance.
    """

    mean_logged: float
    mean_replayed: float
    mean_absolute: float
    max_absolute: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay found.

    Attributes:
        num_requests: That were scored again.
        num_candidates: Of them.
        num_refused: Requests that do not fit the bundle's schema.
        first_refusal: Why the first of them was.
        differences: By name of an output that both have; empty without a request.
        top_overlap: Mean share of the ten best candidates by the last output that are the same,
            over requests of more than ten; None without one.
    """

    num_requests: int
    num_candidates: int
    num_refused: int
    first_refusal: str | None
    differences: dict[str, Difference]
    top_overlap: float | None


@dataclass
class _Sums:
    logged: float = 0.0
    replayed: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0


@dataclass
class _Tally:
    sums: dict[str, _Sums] = field(default_factory=dict)
    overlaps: list[float] = field(default_factory=list)
    num_requests: int = 0
    num_candidates: int = 0

    def add(self, logged: Outputs, replayed: Outputs) -> None:
        names = [name for name in replayed if name in logged]
        for name in names:
            # NaN where the answer had null; a distance to it is NaN, and so seen.
            before, after = logged[name].astype(np.float64), replayed[name].astype(np.float64)
            sums = self.sums.setdefault(name, _Sums())
            distance = np.abs(before - after)
            sums.logged += float(before.sum())
            sums.replayed += float(after.sum())
            sums.absolute += float(distance.sum())
            sums.largest = float(np.maximum(sums.largest, distance.max()))
        num_rows = len(replayed[names[-1]])
        if num_rows > _TOP:
            best = [
                set(np.argsort(-o[names[-1]], kind="stable")[:_TOP]) for o in (logged, replayed)
            ]
            self.overlaps.append(len(best[0] & best[1]) / _TOP)
        self.num_requests += 1
        self.num_candidates += num_rows


def replay(
    path: Path, state: ServingState, *, on_progress: Callable[[int], None] | None = None
) -> Replayed:
    """Scores every request of a log.

    Args:
        path: A file of the log, or its directory.
        state: By whose bundle and items. Items are looked up as they are in it: to see 0
            difference, it needs the item snapshot that was served.
        on_progress: Called with the number of requests seen so far.

    Raises:
        LogError: There is no log, a file is damaged or none of ours, or the bundle has the user
            id as a feature.
    """
    _require_no_user_id(state)
    tally, refusals = _Tally(), 0
    first_refusal: str | None = None
    for num_seen, row in enumerate(_rows(path), start=1):
        try:
            replayed = _score(row, state)
        except (InvalidRequest, RecordError) as exc:
            refusals += 1
            first_refusal = first_refusal or str(exc)
        else:
            tally.add(_logged(row, state), replayed)
        if on_progress is not None:
            on_progress(num_seen)
    num_rows = tally.num_candidates
    return Replayed(
        num_requests=tally.num_requests,
        num_candidates=num_rows,
        num_refused=refusals,
        first_refusal=first_refusal,
        differences={
            name: Difference(
                mean_logged=sums.logged / num_rows,
                mean_replayed=sums.replayed / num_rows,
                mean_absolute=sums.absolute / num_rows,
                max_absolute=sums.largest,
            )
            for name, sums in tally.sums.items()
        },
        top_overlap=float(np.mean(tally.overlaps)) if tally.overlaps else None,
    )


def count_requests(path: Path) -> int:
    """How many requests a log holds.

    Raises:
        LogError: See `replay`.
    """
    return sum(len(_read(file, ["request_id"])) for file in _files(path))


def _require_no_user_id(state: ServingState) -> None:
    schema = state.encoder.schema
    if state.features.reads_user_id:
        raise LogError(
            f"bundle {state.manifest.bundle_id} has the feature {schema.log.user_id!r}, and a log "
            "holds no user ids"
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:  # Any: as in the file
    for file in _files(path):
        yield from _read(file, None).iter_rows(named=True)


def _files(path: Path) -> Sequence[Path]:
    files = log_files(path)
    if not files:
        raise LogError(f"no logged requests at {path}", path=path)
    return files


def _read(file: Path, columns: list[str] | None) -> pl.DataFrame:
    with reading("request log", file):
        frame = pl.read_parquet(file, columns=columns, glob=False)
    missing = [] if columns is not None else [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise LogError(f"{file}: no request log, it lacks {', '.join(missing)}", path=file)
    return frame


def _score(row: dict[str, Any], state: ServingState) -> Outputs:
    columns = _COLUMNS.decode(row["columns"])
    encoded = state.features.encode(
        user_id="",
        time=row["time"],
        context=_VALUES.decode(row["context"]),
        user_features=_VALUES.decode(row["user_features"]),
        candidates=Candidates(
            item_ids=row["item_ids"],
            columns={n: GivenColumn(values=c.values, rows=c.rows) for n, c in columns.items()},
            is_columnar=True,
        ),
        record=None if row["record"] is None else unpack_record(row["record"]),
    )
    return state.runtime.run(encoded.blocks)


def _logged(row: dict[str, Any], state: ServingState) -> dict[str, npt.NDArray[np.float32]]:
    names = state.manifest.outputs
    return {name: np.array(row[name], np.float32) for name in names if name in row}
