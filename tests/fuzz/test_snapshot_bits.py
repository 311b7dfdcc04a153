"""A damaged Parquet file is refused by name, or read; its reader may even panic."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny

from model.contract.encode import Encoder
from model.contract.errors import LogError
from model.contract.record import pack_record
from service.item_snapshot import load_item_table
from service.materialize import count_records, find_record
from service.parquet import reading

NUM_FLIPS = 150


def flipped(content: bytes) -> Iterator[bytes]:
    rng = np.random.default_rng(len(content))
    for _ in range(NUM_FLIPS):
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def num_refused(path: Path, load: Callable[[Path], object]) -> int:
    refused = 0
    for content in flipped(path.read_bytes()):
        path.write_bytes(content)
        try:
            load(path)
        except LogError:
            refused += 1
    return refused


def test_item_snapshot(tmp_path: Path) -> None:
    encoder = Encoder(tiny.fitted_schema())
    path = tmp_path / "items.parquet"
    tiny.item_snapshot().write_parquet(path)

    assert num_refused(path, lambda path: load_item_table(path, encoder)) > 0


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    # Of a longer record's flips one makes the reader ask for 2**61 bytes: the process would end.
    records = [pack_record(tiny.record(recents={}))]
    pl.DataFrame({"user_id": ["7"], "record": records}).write_parquet(path)

    def load(path: Path) -> None:
        count_records(path)
        find_record(path, "7")

    assert num_refused(path, load) > 0


def test_panic_of_the_reader_is_a_damaged_file() -> None:
    with pytest.raises(LogError, match="the file is damaged"), reading("records", Path("x")):
        raise pl.exceptions.PanicException("index out of bounds")
