"""Scores logged requests again, by any bundle, and compares with what was answered."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError, RecordError
from model.contract.record import unpack_record
from service.distance import Bounds, Distance, distance, reasons_against
from service.errors import InvalidRequest
from service.features import Candidates, GivenColumn
from service.parquet import reading
from service.request_log import COLUMNS, LoggedColumn, log_files
from service.runtime import Outputs
from service.state import ServingState

_Values = npt.NDArray[np.float32]

_COLUMNS = msgspec.json.Decoder(dict[str, LoggedColumn])
_VALUES = msgspec.json.Decoder(dict[str, Any])  # Any: JSON values


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay found.

    Attributes:
        num_requests: That were scored again.
        num_candidates: Of them.
        num_refused: Requests that do not fit the bundle's schema.
        first_refusal: Why the first of them was.
        distances: By name of an output that both have; empty without a request.
    """

    num_requests: int
    num_candidates: int
    num_refused: int
    first_refusal: str | None
    distances: dict[str, Distance]

    def reasons_against(self, bounds: Bounds) -> list[str]:
        """Why this bundle should not take the place of the one that answered; none if it may."""
        reasons = reasons_against(self.distances, bounds)
        if self.num_refused:
            total = self.num_requests + self.num_refused
            reasons.append(f"{self.num_refused} of {total} requests do not fit its schema")
        return reasons


def replay(
    path: Path, state: ServingState, *, on_progress: Callable[[int], None] | None = None
) -> Replayed:
    """Scores every request of a log; keeps all probabilities in memory.

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
    refusals: list[str] = []
    lengths: list[int] = []
    pairs: dict[str, tuple[list[_Values], list[_Values]]] = {}
    for num_seen, row in enumerate(_rows(path), start=1):
        try:
            replayed = _score(row, state)
        except (InvalidRequest, RecordError) as exc:
            refusals.append(str(exc))
        else:
            lengths.append(len(row["item_ids"]))
            for name, after in replayed.items():
                if name in row:
                    before, afters = pairs.setdefault(name, ([], []))
                    # In an answer null, here NaN: so are the distances.
                    before.append(np.array(row[name], np.float32))
                    afters.append(after)
        if on_progress is not None:
            on_progress(num_seen)
    ends = np.cumsum(lengths, dtype=np.int64)
    return Replayed(
        num_requests=len(lengths),
        num_candidates=sum(lengths),
        num_refused=len(refusals),
        first_refusal=refusals[0] if refusals else None,
        distances={
            name: distance(*(np.concatenate(v).astype(np.float64) for v in pair), ends=ends)
            for name, pair in pairs.items()
        },
    )


def count_requests(path: Path) -> int:
    """How many requests a log holds.

    Raises:
        LogError: See `replay`.
    """
    total = 0
    for file in _files(path):
        with reading("request log", file):
            total += int(pl.scan_parquet(file, glob=False).select(pl.len()).collect().item())
    return total


def _require_no_user_id(state: ServingState) -> None:
    schema = state.encoder.schema
    if state.features.reads_user_id:
        raise LogError(
            f"bundle {state.manifest.bundle_id} has the feature {schema.log.user_id!r}, and a log "
            "holds no user ids"
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:  # Any: as in the file
    for file in _files(path):
        yield from _read(file).iter_rows(named=True)


def _files(path: Path) -> Sequence[Path]:
    files = log_files(path)
    if not files:
        raise LogError(f"no logged requests at {path}", path=path)
    return files


def _read(file: Path) -> pl.DataFrame:
    with reading("request log", file):
        frame = pl.read_parquet(file, glob=False)
    missing = [name for name in COLUMNS if name not in frame.columns]
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
