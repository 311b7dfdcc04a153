"""`ctr bench` on a tiny bundle and a Redis of its own."""

import json
import os
from pathlib import Path

import polars as pl
import pytest
import tiny
from click.testing import CliRunner

from loadtest.bench import PARTS, bench
from model.contract.record import pack_record

pytestmark = pytest.mark.redis


def test_parts_add_up_to_the_whole(tiny_bundle: Path, tiny_items: Path, tmp_path: Path) -> None:
    bodies = tmp_path / "bodies.jsonl"
    ids = {"user_id": 7, "candidates": [1, 2, 99]}
    columns = {"user_id": "unheard", "candidates": {"item_id": [1, 3], "display": ["top", None]}}
    bodies.write_text("\n".join(json.dumps(body) for body in (ids, columns)))
    records = tmp_path / "records.parquet"
    pl.DataFrame({"user_id": ["7"], "record": [pack_record(tiny.record())]}).write_parquet(records)
    cpus = os.sched_getaffinity(0)

    done = CliRunner().invoke(
        bench,
        [
            *(str(bodies), "--bundle", str(tiny_bundle), "--items", str(tiny_items)),
            *("--records", str(records), "--layout", "columns", "--rounds", "1", "--json"),
        ],
        catch_exceptions=False,
    )

    parts = json.loads(done.stdout)
    assert list(parts) == [*PARTS, "whole"]
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["whole"], abs=1.0)
    assert min(parts[name] for name in ("decode", "store", "record", "session", "respond")) > 0
    assert os.sched_getaffinity(0) == cpus
