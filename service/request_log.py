"""Keeps a sample of requests with what they were scored from, and their scores, in Parquet files.

A row is one request as it was before encoding: what the caller sent, the user's record as the
store had it, and the probabilities answered. The user is a keyed hash. Item features are not
repeated: they are those of the item snapshot.

Never in a request's way: what the writer's thread cannot take is dropped and counted. A file is
there whole or not at all, and goes when it is older than the time set.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec
import xxhash

from model.contract.ids import canonical_id
from service.observe import Metrics
from service.scorer import ScoreRequest, ScoreResult
from service.settings import RequestLogSettings

if TYPE_CHECKING:
    import polars as pl

_log = logging.getLogger(__name__)

SUFFIX = ".parquet"
COLUMNS = (
    "served_at", "request_id", "bundle", "user_hash", "user_status", "time", "context",
    "user_features", "item_ids", "columns", "record",
)  # fmt: skip

_DAY = "%Y-%m-%d"
_HASH_BYTES = 16
_WHOLE = 1 << 64
_EXPIRE_EVERY_S = 3600.0


class LoggedColumn(msgspec.Struct):
    """A `GivenColumn` as JSON."""

    values: list[Any]  # Any: JSON values
    rows: list[int] | None


class _Row(NamedTuple):
    served_at: float
    request_id: str
    request: ScoreRequest
    result: ScoreResult


class RequestLog:
    """Async context manager: while it is open, a thread of its own writes what is offered."""

    def __init__(
        self,
        settings: RequestLogSettings,
        *,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Writes nothing yet.

        Args:
            settings: With a directory and a key.
            metrics: Told what was written and what was not.
            clock: Unix seconds.
        """
        assert settings.dir is not None  # See above.
        assert settings.user_key is not None
        self._directory = settings.dir
        self._key = user_key(settings.user_key.get_secret_value())
        self._keep = timedelta(days=settings.keep_days)
        self._flush_s = settings.flush_s
        self._rows_per_file = settings.requests_per_file
        self._threshold = int(settings.share * _WHOLE)
        self._metrics = metrics
        self._clock = clock
        self._queue: queue.Queue[_Row | None] = queue.Queue(settings.max_queue_requests)
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._expire_at = 0.0

    async def __aenter__(self) -> Self:
        """Makes the directory and starts the writer.

        Raises:
            OSError: It cannot be made.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Writes what has been offered, and ends the writer."""
        await asyncio.to_thread(self._queue.put, None)
        await asyncio.to_thread(self._thread.join)

    def offer(self, request_id: str, request: ScoreRequest, result: ScoreResult) -> None:
        """Keeps the request if it is one of the sample, which its id alone decides."""
        if xxhash.xxh3_64_intdigest(request_id.encode()) >= self._threshold:
            return
        try:
            self._queue.put_nowait(_Row(self._clock(), request_id, request, result))
        except queue.Full:
            self._metrics.requests_not_logged(1, reason="queue_full")

    def _run(self) -> None:
        rows: list[_Row] = []
        write_at = 0.0
        while True:
            try:
                timeout = max(0.0, write_at - time.monotonic()) if rows else None
                row = self._queue.get(timeout=timeout)
            except queue.Empty:
                pass  # The oldest row has waited long enough.
            else:
                if row is None:
                    break
                if rows and row.result.bundle_id != rows[0].result.bundle_id:
                    self._write(rows)  # The columns are a bundle's outputs.
                if not rows:
                    write_at = time.monotonic() + self._flush_s
                rows.append(row)
            if len(rows) >= self._rows_per_file or time.monotonic() >= write_at:
                self._write(rows)
        self._write(rows)

    def _write(self, rows: list[_Row]) -> None:
        """Writes the rows to a file of their own, and empties the list whatever happens."""
        try:
            if rows:
                write_file(self._directory, _frame(rows, self._key), now=self._clock())
                self._metrics.requests_logged(len(rows))
            now = self._clock()
            if now >= self._expire_at:
                self._expire_at = now + _EXPIRE_EVERY_S
                expire(self._directory, before=datetime.fromtimestamp(now, UTC) - self._keep)
        except Exception:  # noqa: BLE001 - the thread's outer edge: counted and logged
            self._metrics.requests_not_logged(len(rows), reason="write_failed")
            _log.exception("%d requests could not be logged", len(rows))
        finally:
            rows.clear()


def user_key(text: str) -> bytes:
    """The key of `user_hash`, from a text of any length."""
    return hashlib.sha256(text.encode()).digest()


def user_hash(user_id: str, key: bytes) -> bytes:
    """What stands for a user: without the key nobody can tell whom.

    Args:
        user_id: Canonical.
        key: See `user_key`.
    """
    return hashlib.blake2b(user_id.encode(), key=key, digest_size=_HASH_BYTES).digest()


def log_files(path: Path) -> list[Path]:
    """All whole files of a log, oldest first; or the one file that `path` is."""
    if path.is_file():
        return [path]
    return sorted(path.glob(f"*/*{SUFFIX}"))


def write_file(directory: Path, frame: "pl.DataFrame", *, now: float) -> Path:
    """Writes one file, below a folder for the day; it is there whole or not at all."""
    at = datetime.fromtimestamp(now, UTC)
    folder = directory / at.strftime(_DAY)
    folder.mkdir(exist_ok=True)
    path = folder / f"{at:%H%M%S}-{secrets.token_hex(4)}{SUFFIX}"
    replace_file(path, frame)
    return path


def replace_file(path: Path, frame: "pl.DataFrame") -> None:
    """Writes a file in the place of one that may be there."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            frame.write_parquet(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def forget_user(directory: Path, hashed: bytes) -> int:
    """Deletes every logged request of a user and returns their number.

    Args:
        directory: Of the log.
        hashed: See `user_hash`.
    """
    import polars as pl

    num_deleted = 0
    for path in log_files(directory):
        frame = pl.read_parquet(path, glob=False)
        kept = frame.filter(pl.col("user_hash") != hashed)
        num_deleted += len(frame) - len(kept)
        if kept.is_empty():
            path.unlink()
        elif len(kept) < len(frame):
            replace_file(path, kept)
    return num_deleted


def expire(directory: Path, *, before: datetime) -> None:
    """Deletes the folders of days that ended before a time."""
    for folder in directory.iterdir():
        try:
            end = datetime.strptime(folder.name, _DAY).replace(tzinfo=UTC) + timedelta(days=1)
        except ValueError:
            continue  # Not ours.
        if end <= before:
            for file in folder.iterdir():
                file.unlink(missing_ok=True)  # A sibling may have been first.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _frame(rows: list[_Row], key: bytes) -> "pl.DataFrame":
    import polars as pl

    lists = [list(column) for column in zip(*_plain(rows, key), strict=True)]
    data: dict[str, Any] = dict(zip(COLUMNS, lists, strict=True))
    data["served_at"] = pl.Series(data["served_at"], dtype=pl.Datetime("us", "UTC"))
    data["item_ids"] = pl.Series(data["item_ids"], dtype=pl.List(pl.String))
    data["record"] = pl.Series(data["record"], dtype=pl.Binary)
    for name in rows[0].result.outputs:
        arrays = [row.result.outputs[name] for row in rows]
        data[name] = pl.Series(name, arrays, dtype=pl.List(pl.Float32))
    return pl.DataFrame(data)


def _plain(rows: list[_Row], key: bytes) -> Iterator[tuple[Any, ...]]:  # Any: as in `COLUMNS`
    encode = msgspec.json.encode
    for row in rows:
        request, result = row.request, row.result
        columns = {
            name: LoggedColumn(list(given.values), None if given.rows is None else list(given.rows))
            for name, given in request.candidates.columns.items()
        }
        yield (
            datetime.fromtimestamp(row.served_at, UTC),
            row.request_id,
            result.bundle_id,
            user_hash(canonical_id(request.user_id) or "", key),
            result.user_status,
            result.time,
            encode(request.context).decode(),
            encode(request.user_features).decode(),
            [canonical_id(item_id) for item_id in request.candidates.item_ids],
            encode(columns).decode(),
            result.record,
        )
