"""Fills the online store: user records from a Parquet file, checked and written in batches."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from model.contract.errors import LogError, RecordError
from model.contract.record import unpack_record
from service.parquet import reading
from service.stores.base import OnlineStore

USER_ID, RECORD = "user_id", "record"

_BATCH_ROWS = 5_000


async def load_records(
    path: Path,
    store: OnlineStore,
    *,
    ttl_s: int | None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Writes every record of the file to the store and returns their number.

    Args:
        path: Parquet with the columns `user_id` (canonical text) and `record` (packed bytes).
        store: Where to; stays open.
        ttl_s: Seconds until the records expire; None keeps them.
        on_progress: Called with the number of records written so far.

    Raises:
        LogError: The file is missing or damaged, lacks a column, or a row has no user id or no
            valid record; the row is named, and the batches before it are written.
        StoreError: The store refused.
    """
    batches = _read_batches(path)
    num_written = 0
    while True:
        batch = await asyncio.to_thread(next, batches, None)
        if batch is None:
            return num_written
        num_written += await store.set_many(batch, ttl_s=ttl_s)
        if on_progress is not None:
            on_progress(num_written)


def count_records(path: Path) -> int:
    """Number of rows of a records file.

    Raises:
        LogError: It is missing or damaged, or lacks a column.
    """
    _check_columns(path)
    with reading("records", path):
        return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())


def find_record(path: Path, user_id: str) -> bytes | None:
    """The record of one user, None if the file has none.

    Args:
        path: See `load_records`.
        user_id: Canonical.

    Raises:
        LogError: The file is missing or damaged, or lacks a column.
    """
    _check_columns(path)
    rows = pl.scan_parquet(path, glob=False).filter(pl.col(USER_ID) == user_id)
    with reading("records", path):
        found: list[bytes] = rows.select(RECORD).collect()[RECORD].to_list()
    return found[-1] if found else None


def _read_batches(path: Path) -> Iterator[list[tuple[str, bytes]]]:
    num_rows = count_records(path)
    rows = pl.scan_parquet(path, glob=False).select(USER_ID, RECORD)
    for start in range(0, num_rows, _BATCH_ROWS):
        with reading("records", path):
            batch = rows.slice(start, _BATCH_ROWS).collect()
        pairs: list[tuple[str, bytes]] = batch.rows()
        for position, (user_id, record) in enumerate(pairs, start):
            _check_row(path, position, user_id, record)
        yield pairs


def _check_row(path: Path, row: int, user_id: str | None, record: bytes | None) -> None:
    if not user_id:
        raise LogError(f"records {path}: row {row}: no user id", path=path, row_number=row)
    try:
        unpack_record(record or b"")
    except RecordError as exc:
        raise LogError(f"records {path}: row {row}: {exc}", path=path, row_number=row) from exc


def _check_columns(path: Path) -> None:
    with reading("records", path):
        present = pl.read_parquet_schema(path)
    for name, dtype in ((USER_ID, pl.String), (RECORD, pl.Binary)):
        if present.get(name) != dtype:
            raise LogError(
                f"records {path}: column {name!r} is {present.get(name, 'missing')}, "
                f"expected {dtype}",
                path=path,
            )
