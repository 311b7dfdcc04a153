import logging
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny

from model.contract.encode import Encoder
from model.contract.errors import LogError
from model.contract.ids import NO_KEY, hash_id
from model.contract.spec import FIRST_CODE, MISSING_CODE, UNKNOWN_CODE, FittedSchema
from model.contract.times import AS_OF
from service import item_snapshot
from service.item_snapshot import load_item_table
from service.items import ItemTable, empty_item_table

ENCODER = Encoder(tiny.fitted_schema())
ITEM_ID, BRAND, DISPLAY = (
    ENCODER.candidate_layout.ids.index(name) for name in ("item_id", "brand", "display")
)
BOUGHT_ITEM, BOUGHT_BRAND = (
    ENCODER.candidate_layout.matches.index(name) for name in ("bought_item", "bought_brand")
)


@pytest.fixture
def table(tiny_items: Path) -> ItemTable:
    return load_item_table(tiny_items, ENCODER)


def write(path: Path, **columns: object) -> Path:
    target = path / "items.parquet"
    pl.DataFrame(columns).write_parquet(target)
    return target


def test_rows_are_those_of_the_encoder(table: ItemTable) -> None:
    rows = table.take(["1", "2", "3", "4"])

    raw = {"item_id": [1, 2, 3, 4], "brand": ["acme", "bolt", "7", None]}
    raw["price"] = [2.5, None, 99.0, 1.0]
    expected = ENCODER.candidate_block(raw, time=np.zeros(4))
    np.testing.assert_array_equal(rows.block.ids, expected.ids)
    np.testing.assert_array_equal(rows.block.dense, expected.dense)
    assert rows.block.ids.dtype == np.int64
    assert rows.is_known.all()
    assert len(table) == 4


def test_rows_come_in_the_order_asked_with_repeats(table: ItemTable) -> None:
    rows = table.take(["3", "1", "3"])

    brands = [FIRST_CODE + 2, FIRST_CODE, FIRST_CODE + 2]
    assert rows.block.ids[:, BRAND].tolist() == brands
    assert rows.keys[:, BOUGHT_BRAND].tolist() == [hash_id("7"), hash_id("acme"), hash_id("7")]


def test_null_attribute_is_missing_and_matches_nothing(table: ItemTable) -> None:
    rows = table.take(["4"])

    assert rows.block.ids[0, BRAND] == MISSING_CODE
    assert rows.keys[0, BOUGHT_BRAND] == NO_KEY
    assert rows.keys[0, BOUGHT_ITEM] == hash_id("4")


def test_unknown_item_has_defaults_but_its_own_id(table: ItemTable) -> None:
    rows = table.take(["1", "99"])

    assert rows.is_known.tolist() == [True, False]
    expected = ENCODER.candidate_block({"item_id": ["99"]}, time=np.zeros(1))
    np.testing.assert_array_equal(rows.block.ids[1], expected.ids[0])
    np.testing.assert_array_equal(rows.block.dense[1], expected.dense[0])
    assert rows.block.ids[1, ITEM_ID] == FIRST_CODE + hash_id("99") % 97
    assert rows.keys[1].tolist() == [hash_id("99"), NO_KEY]


def test_what_a_caller_writes_stays_with_the_caller(table: ItemTable) -> None:
    first = table.take(["1"])
    first.block.ids[:] = 0
    first.block.dense[:] = 7
    first.keys[:] = 5

    second = table.take(["1"])

    assert second.block.ids[0, BRAND] == FIRST_CODE
    assert second.keys[0, BOUGHT_ITEM] == hash_id("1")
    assert not (second.block.dense == 7).any()


def test_features_that_are_not_the_item_s_hold_their_defaults(table: ItemTable) -> None:
    rows = table.take(["1"])

    assert rows.block.ids[0, DISPLAY] == FIRST_CODE  # "0", the schema's default


def test_chunks_make_no_difference(
    tiny_items: Path, table: ItemTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_snapshot, "_CHUNK_ROWS", 3)

    chunked = load_item_table(tiny_items, ENCODER).take(["1", "2", "3", "4", "5"])

    whole = table.take(["1", "2", "3", "4", "5"])
    np.testing.assert_array_equal(chunked.block.ids, whole.block.ids)
    np.testing.assert_array_equal(chunked.block.dense, whole.block.dense)
    np.testing.assert_array_equal(chunked.keys, whole.keys)


@pytest.mark.parametrize("ids", [["1", "2"], [1.0, 2.0], [1, 2]])
def test_ids_of_any_type_are_one(tmp_path: Path, ids: list[object]) -> None:
    table = load_item_table(write(tmp_path, item_id=ids, brand=["acme", "7"]), ENCODER)

    rows = table.take(["2"])

    assert rows.is_known.all()
    assert rows.block.ids[0, BRAND] == FIRST_CODE + 2
    assert rows.keys[0, BOUGHT_ITEM] == hash_id("2")


def test_categorical_columns_are_read(tmp_path: Path) -> None:
    brands = pl.Series(["acme", None, "unheard"], dtype=pl.Categorical)
    table = load_item_table(write(tmp_path, item_id=["a", "b", "c"], brand=brands), ENCODER)

    codes = table.take(["a", "b", "c"]).block.ids[:, BRAND].tolist()

    assert codes == [FIRST_CODE, MISSING_CODE, UNKNOWN_CODE]


def test_integer_prices_are_numbers(tmp_path: Path) -> None:
    ints = load_item_table(write(tmp_path, item_id=[1], price=[99]), ENCODER)
    floats = load_item_table(write(tmp_path, item_id=[1], price=[99.0]), ENCODER)

    np.testing.assert_array_equal(ints.take(["1"]).block.dense, floats.take(["1"]).block.dense)


def test_unused_and_absent_columns_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, item_id=[1], brand=["acme"], colour=["red"], shape=["round"])

    with caplog.at_level(logging.INFO, logger="service.item_snapshot"):
        load_item_table(path, ENCODER)

    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "columns not used: colour, shape",
        "no column for price; defaults are used",
    ]


def test_empty_table_knows_no_item() -> None:
    rows = empty_item_table(ENCODER).take(["1", "2"])

    assert not rows.is_known.any()
    assert rows.keys[:, BOUGHT_ITEM].tolist() == [hash_id("1"), hash_id("2")]


def test_snapshot_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    path = write(tmp_path, item_id=pl.Series([], dtype=pl.Int64))

    assert len(load_item_table(path, ENCODER)) == 0


def test_codes_beyond_32_bits_are_kept(tmp_path: Path) -> None:
    content = dict(tiny.SCHEMA_CONTENT)
    content["features"] = [
        {**f, "num_buckets": 2**31} if f["name"] == "item_id" else f for f in content["features"]
    ]
    fitted = FittedSchema.model_validate(
        {"schema": content, "vocabularies": tiny.VOCABULARIES, "moments": {}}
    )
    encoder = Encoder(fitted)
    names = [str(number) for number in range(50)]

    table = load_item_table(write(tmp_path, item_id=names), encoder)

    codes = table.take(names).block.ids[:, ITEM_ID].tolist()
    assert codes == [FIRST_CODE + hash_id(name) % 2**31 for name in names]


def test_missing_snapshot_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"absent\.parquet"):
        load_item_table(tmp_path / "absent.parquet", ENCODER)


@pytest.mark.parametrize("content", [b"", b"item_id\n1\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_file_that_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "items.parquet"
    path.write_bytes(content)

    with pytest.raises(LogError, match="item snapshot"):
        load_item_table(path, ENCODER)


def test_truncated_snapshot_is_refused(tmp_path: Path, tiny_items: Path) -> None:
    content = tiny_items.read_bytes()
    path = tmp_path / "items.parquet"
    path.write_bytes(content[: len(content) // 2])

    with pytest.raises(LogError, match="item snapshot"):
        load_item_table(path, ENCODER)


def test_snapshot_without_item_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no column 'item_id'"):
        load_item_table(write(tmp_path, brand=["acme"]), ENCODER)


@pytest.mark.parametrize("ids", [["a", None], ["a", ""]])
def test_item_without_id_is_refused(tmp_path: Path, ids: list[str | None]) -> None:
    with pytest.raises(LogError, match="row 1: the item has no id"):
        load_item_table(write(tmp_path, item_id=ids), ENCODER)


def test_item_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="row 2: item 'a' is there twice"):
        load_item_table(write(tmp_path, item_id=["a", "b", "a"]), ENCODER)


def test_fractional_item_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="row 1: expected an id"):
        load_item_table(write(tmp_path, item_id=[1.0, 2.5]), ENCODER)


@pytest.mark.parametrize(
    ("name", "values"),
    [("brand", [True]), ("brand", [["acme"]]), ("price", ["2.50"]), ("price", [float("inf")])],
)
def test_value_that_does_not_fit_its_feature_is_refused(
    tmp_path: Path, name: str, values: list[object]
) -> None:
    with pytest.raises(LogError, match=f"column '{name}'"):
        load_item_table(write(tmp_path, item_id=[1], **{name: values}), ENCODER)


def test_table_is_as_of_what_its_snapshot_says(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    tiny.item_snapshot().write_parquet(path, metadata={AS_OF: "1700049600.5"})

    assert load_item_table(path, ENCODER).as_of == 1_700_049_600.5


def test_snapshot_that_says_no_time_is_as_of_its_writing(tmp_path: Path) -> None:
    path = write(tmp_path, item_id=[1])
    os.utime(path, (1_700_000_000, 1_700_000_000))

    assert load_item_table(path, ENCODER).as_of == 1_700_000_000


@pytest.mark.parametrize("text", ["", "yesterday", "nan", "inf"])
def test_snapshot_that_says_no_number_of_seconds_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "items.parquet"
    tiny.item_snapshot().write_parquet(path, metadata={AS_OF: text})

    with pytest.raises(LogError, match=r"ctr_as_of is .*, expected unix seconds"):
        load_item_table(path, ENCODER)


def test_empty_table_is_as_of_no_time() -> None:
    assert empty_item_table(ENCODER).as_of is None
