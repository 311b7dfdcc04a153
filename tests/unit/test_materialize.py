from pathlib import Path

import polars as pl
import pytest
import tiny

from model.contract.errors import LogError
from model.contract.record import pack_record
from service import materialize
from service.materialize import count_records, find_record, load_records
from service.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

RECORD = pack_record(tiny.record())


def write(path: Path, users: list[str | None], records: list[bytes | None] | None = None) -> Path:
    target = path / "records.parquet"
    pl.DataFrame(
        {"user_id": users, "record": records or [RECORD] * len(users)},
        schema={"user_id": pl.String, "record": pl.Binary},
    ).write_parquet(target)
    return target


async def test_every_record_is_written_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialize, "_BATCH_ROWS", 2)
    users = [str(number) for number in range(5)]
    store, progress = MemoryStore(), list[int]()

    written = await load_records(
        write(tmp_path, list(users)), store, ttl_s=None, on_progress=progress.append
    )

    assert written == 5
    assert progress == [2, 4, 5]
    assert [await store.get(user) for user in users] == [RECORD] * 5


async def test_records_expire(tmp_path: Path) -> None:
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])
    await load_records(write(tmp_path, ["7"]), store, ttl_s=60)

    now[0] = 61.0

    assert await store.get("7") is None


async def test_file_without_rows_writes_nothing(tmp_path: Path) -> None:
    assert await load_records(write(tmp_path, []), MemoryStore(), ttl_s=None) == 0


@pytest.mark.parametrize("damaged", [b"", b"no record", RECORD[:-3], None])
async def test_damaged_record_is_named_by_its_row(tmp_path: Path, damaged: bytes | None) -> None:
    path = write(tmp_path, ["a", "b", "c"], [RECORD, RECORD, damaged])

    with pytest.raises(LogError, match="row 2: ") as caught:
        await load_records(path, MemoryStore(), ttl_s=None)

    assert caught.value.row_number == 2


@pytest.mark.parametrize("user_id", [None, ""])
async def test_record_without_user_is_refused(tmp_path: Path, user_id: str | None) -> None:
    with pytest.raises(LogError, match="row 1: no user id"):
        await load_records(write(tmp_path, ["a", user_id]), MemoryStore(), ttl_s=None)


async def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"absent\.parquet"):
        await load_records(tmp_path / "absent.parquet", MemoryStore(), ttl_s=None)


async def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    pl.DataFrame({"user_id": [1], "record": [b""]}).write_parquet(path)

    with pytest.raises(LogError, match="column 'user_id' is Int64, expected String"):
        count_records(path)


def test_record_of_one_user_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, ["a", "b"], [b"A", b"B"])

    assert find_record(path, "b") == b"B"
    assert find_record(path, "c") is None
