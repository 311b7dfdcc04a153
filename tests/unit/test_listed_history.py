"""Histories that the user table has as lists: the same in training rows and in records."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model.contract.columns import Ragged
from model.contract.errors import LogError
from model.contract.spec import History, Schema, parse_schema
from model.history import AsOf
from model.logs import TIME, USER
from model.tables import Tables


def schema() -> Schema:
    return parse_schema(
        {
            "steps": [{"name": n, "label": n} for n in ("click", "conversion")],
            "features": [
                {"name": "item_id", "kind": "categorical", "scope": "item", "source": "items"},
                {
                    "name": "top",
                    "kind": "hashed",
                    "scope": "user",
                    "source": "store",
                    "num_buckets": 10,
                },
                {"name": "past", "kind": "history", "of": "top", "max_length": 3},
            ],
        }
    )


def as_of(path: Path, users: pl.DataFrame) -> AsOf:
    users.write_parquet(path / "users.parquet")
    tables = Tables.read(events=None, items=None, users=path / "users.parquet", schema=schema())
    return AsOf(tables, schema=schema())


VERSIONS = pl.DataFrame(
    {
        "user_id": [1, 1, 2, 3],
        "time": [10, 20, 10, 10],
        "past": pl.Series([[7, 7, 8, 9], [5], None, []], dtype=pl.List(pl.Int64)),
    }
)


def history(view: AsOf, rows: list[tuple[int, float]]) -> Ragged:
    (feature,) = (f for f in view.schema.features if isinstance(f, History))
    log = pl.DataFrame({USER: [u for u, _ in rows], TIME: [float(t) for _, t in rows]})
    return view.history(feature, log)


def test_a_row_has_the_list_that_is_valid_at_its_time(tmp_path: Path) -> None:
    found = history(as_of(tmp_path, VERSIONS), [(1, 10), (1, 19), (1, 25), (1, 9), (2, 30)])

    # At most three places; none before the first version, and none where there is no list.
    assert found.values == [7, 7, 8, 7, 7, 8, 5]
    assert found.offsets.tolist() == [0, 3, 6, 7, 7, 7]
    assert found.times.tolist() == [10, 10, 10, 10, 10, 10, 20]


def test_users_without_a_list_have_none(tmp_path: Path) -> None:
    found = history(as_of(tmp_path, VERSIONS), [(3, 30), (99, 30)])

    assert found.values == []
    assert found.offsets.tolist() == [0, 0, 0]


def test_a_table_without_times_is_valid_always(tmp_path: Path) -> None:
    table = VERSIONS.drop("time").filter(pl.col("past").list.len() == 4)

    found = history(as_of(tmp_path, table), [(1, 5)])

    assert found.values == [7, 7, 8]
    assert found.times.tolist() == [0, 0, 0]


def test_a_record_has_the_list_of_its_time(tmp_path: Path) -> None:
    view = as_of(tmp_path, VERSIONS)

    records = dict(view.user_records(30.0, max_keys=10))

    assert records[1].histories["past"].ids == (5,)
    assert records[1].histories["past"].times.tolist() == [20]
    assert "past" not in records[2].histories
    assert np.dtype(records[1].histories["past"].times.dtype) == np.int64


def test_a_column_that_holds_no_lists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="'past' is Int64, expected lists of ids"):
        history(as_of(tmp_path, VERSIONS.with_columns(past=pl.lit(1))), [(1, 10)])
