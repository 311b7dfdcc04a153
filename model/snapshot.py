"""Materialisation: user records and the item snapshot as of a time, as files for the service."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from model.config import TrainConfig
from model.contract.errors import LogError
from model.contract.ids import canonical_id
from model.contract.record import pack_record
from model.contract.spec import load_schema
from model.contract.times import AS_OF
from model.history import AsOf
from model.logs import TIME
from model.tables import Tables

RECORDS, ITEMS = "records.parquet", "items.parquet"
MAX_KEYS = 4096  # per user and match feature, the newest; 20 bytes each


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The two files and how much is in them; sizes in bytes."""

    records: Path
    items: Path
    num_users: int
    num_items: int
    median_record_bytes: int
    largest_record_bytes: int


def write_snapshot(
    config: TrainConfig, *, as_of: float, out: Path, progress: Callable[[str], None]
) -> Snapshot:
    """Writes both files under `out`, each whole or not at all.

    Args:
        config: names the tables and the schema.
        as_of: unix seconds; events at or after it (less the schema's lag) do not count.
        out: made if it is not there.
        progress: told what is being made.

    Raises:
        LogError: a table is missing or lacks a column.
    """
    schema = load_schema(config.data.schema_file)
    progress("reading events and attributes")
    tables = Tables.read(
        events=config.data.events, items=config.data.items, users=config.data.users, schema=schema
    )
    view = AsOf(tables, schema=schema)
    out.mkdir(parents=True, exist_ok=True)
    progress("making the item snapshot")
    items = view.item_snapshot(as_of)
    _write(items, out / ITEMS, as_of=as_of)
    progress("making user records")
    rows = [
        (canonical_id(user), pack_record(record))
        for user, record in view.user_records(as_of, max_keys=MAX_KEYS)
    ]
    records = pl.DataFrame(rows, schema={"user_id": pl.String, "record": pl.Binary}, orient="row")
    _write(records, out / RECORDS, as_of=as_of)
    sizes = records["record"].bin.size()
    return Snapshot(
        records=out / RECORDS,
        items=out / ITEMS,
        num_users=len(records),
        num_items=len(items),
        median_record_bytes=int(sizes.median() or 0),  # type: ignore[arg-type]  # a number column
        largest_record_bytes=int(sizes.max() or 0),  # type: ignore[arg-type]  # a number column
    )


def _write(frame: pl.DataFrame, path: Path, *, as_of: float) -> None:
    temporary = path.with_name(f".{path.name}")
    frame.write_parquet(temporary, metadata={AS_OF: repr(as_of)})
    temporary.replace(path)


def last_event_time(config: TrainConfig) -> float:
    """Just after the newest event, unix seconds: the time at which everything logged counts."""
    schema = load_schema(config.data.schema_file)
    tables = Tables.read(events=config.data.events, items=None, users=None, schema=schema)
    if tables.events is None:
        raise LogError("no events are given: 'end' has no meaning, name a time")
    newest = tables.events[TIME].max()
    assert isinstance(newest, float)
    return newest + schema.availability_lag_s + 1.0
