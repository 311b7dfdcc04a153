import asyncio
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny

from model.contract.bundle import read_bundle
from model.contract.encode import Encoder
from model.contract.errors import LogError
from model.contract.times import AS_OF
from service.item_files import ItemFiles
from service.item_snapshot import load_item_table, write_item_file
from service.items import ItemTable, map_item_file
from service.refusal import ItemBuildError

pytestmark = pytest.mark.anyio


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return replace(tmp_path / "items.parquet", tiny.item_snapshot())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "tables"
    path.mkdir()
    return path


def replace(path: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    return path


async def open_table(directory: Path, snapshot: Path, bundle_path: Path) -> ItemTable:
    bundle = read_bundle(bundle_path)
    return await ItemFiles(directory, log_level="warning")(
        snapshot,
        bundle_path=bundle_path,
        manifest=bundle.manifest,
        encoder=Encoder(bundle.fitted),
    )


def tables(directory: Path, suffix: str = "items") -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.glob(f"*.{suffix}")}


def assert_same_rows(table: ItemTable, other: ItemTable, item_ids: list[int]) -> None:
    rows, expected = table.take(item_ids), other.take(item_ids)
    np.testing.assert_array_equal(rows.block.ids, expected.block.ids)
    np.testing.assert_array_equal(rows.block.dense, expected.block.dense)
    np.testing.assert_array_equal(rows.keys, expected.keys)
    np.testing.assert_array_equal(rows.is_known, expected.is_known)


async def test_table_in_a_file_is_that_in_memory(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    table = await open_table(directory, snapshot, tiny_bundle)

    expected = load_item_table(snapshot, Encoder(read_bundle(tiny_bundle).fitted))
    assert_same_rows(table, expected, [3, 1, 99, 2, 4])
    assert len(table) == 4


async def test_table_in_a_file_is_as_of_the_time_of_its_snapshot(
    directory: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dated.parquet"
    tiny.item_snapshot().write_parquet(path, metadata={AS_OF: "1700049600.5"})

    table = await open_table(directory, path, tiny_bundle)

    assert table.as_of == 1_700_049_600.5


async def test_workers_that_ask_at_once_share_one_table(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    opened = await asyncio.gather(*(open_table(directory, snapshot, tiny_bundle) for _ in range(3)))

    inodes = {os.fstat(table.file._fd).st_ino for table in opened if table.file is not None}
    assert inodes == set(tables(directory).values())
    assert len(inodes) == 1


async def test_table_is_built_again_when_the_snapshot_has_changed(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    old = await open_table(directory, snapshot, tiny_bundle)
    before = tables(directory)

    replace(snapshot, tiny.item_snapshot().head(2))
    new = await open_table(directory, snapshot, tiny_bundle)

    assert (len(old), len(new)) == (4, 2)
    assert old.take([4]).is_known.tolist() == [True]  # Mapped still, although its file is gone.
    assert len(tables(directory)) == 1
    assert before.keys().isdisjoint(tables(directory))


async def test_table_that_is_there_is_not_built(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    await open_table(directory, snapshot, tiny_bundle)
    before = tables(directory)

    await open_table(directory, snapshot, tiny_bundle)

    assert tables(directory) == before


async def test_refused_snapshot_is_refused_until_it_changes(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    replace(snapshot, pl.DataFrame({"item_id": [1, 1]}))
    messages = []
    for _ in range(2):
        with pytest.raises(LogError) as refused:
            await open_table(directory, snapshot, tiny_bundle)
        messages.append(str(refused.value))

    replace(snapshot, tiny.item_snapshot())

    assert messages == [f"item snapshot {snapshot}: row 1: item '1' is there twice"] * 2
    assert len(await open_table(directory, snapshot, tiny_bundle)) == 4
    assert tables(directory, "refused") == {}


async def test_bundle_that_is_gone_meanwhile_is_no_fault_of_the_snapshot(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    bundle = read_bundle(tiny_bundle)
    with pytest.raises(ItemBuildError, match="no bundle at"):
        await ItemFiles(directory, log_level="warning")(
            snapshot,
            bundle_path=tiny_bundle.with_name("gone"),
            manifest=bundle.manifest,
            encoder=Encoder(bundle.fitted),
        )

    assert len(await open_table(directory, snapshot, tiny_bundle)) == 4


async def test_missing_snapshot_is_refused(
    directory: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    with pytest.raises(LogError, match=r"absent\.parquet: there is no such file"):
        await open_table(directory, tmp_path / "absent.parquet", tiny_bundle)


async def test_building_ends_with_its_caller(
    directory: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    task = asyncio.create_task(open_table(directory, snapshot, tiny_bundle))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    # The lock is free again.
    assert len(await open_table(directory, snapshot, tiny_bundle)) == 4


def test_closed_table_goes_without_its_users_noticing(tmp_path: Path, snapshot: Path) -> None:
    encoder = Encoder(tiny.fitted_schema())
    path = tmp_path / "table.items"
    write_item_file(snapshot, encoder, path)
    table = map_item_file(path, encoder)
    path.unlink()

    assert table.file is not None
    table.file.close()

    assert_same_rows(table, load_item_table(snapshot, encoder), [1, 2, 3, 4])


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.items"
    path.write_bytes(b"something else\n")

    with pytest.raises(ValueError, match="no item table"):
        map_item_file(path, Encoder(tiny.fitted_schema()))
