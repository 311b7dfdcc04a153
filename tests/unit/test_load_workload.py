"""Bodies drawn from a snapshot."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny

from loadtest.vary import grow_items, parse_variation
from loadtest.workload import (
    CandidateCount,
    Population,
    Workload,
    make_bodies,
    parse_candidates,
    read_bodies,
    read_population,
)
from model.contract.errors import LogError
from model.contract.record import pack_record

POPULATION = Population(
    users=list(range(100)),
    items=list(range(1000, 2000)),
    context={"store_id": ["a", "b"]},
    inline={"shelf": ["top", "low"]},
    time="2023-11-15T12:00:00Z",
)


def _bodies(**changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"candidates": CandidateCount(median=20), "distinct": 200}
    return [json.loads(b) for b in make_bodies(POPULATION, Workload(**{**options, **changes}))]


def test_same_seed_same_bodies_another_seed_others() -> None:
    assert _bodies(seed=3) == _bodies(seed=3)
    assert _bodies(seed=3) != _bodies(seed=4)


def test_popular_items_are_asked_for_more_often() -> None:
    def share_of_top_ten(zipf: float) -> float:
        bodies = _bodies(zipf=zipf, unknown_items=0.0)
        counts = Counter(item for body in bodies for item in body["candidates"])
        return sum(count for _, count in counts.most_common(10)) / counts.total()

    # 20 of 1,000 equally popular items: ten of them are 1 % of what is asked for.
    assert share_of_top_ten(0.0) < 0.03
    assert share_of_top_ten(1.0) > 0.2


def test_candidates_of_a_request_are_different_items() -> None:
    for body in _bodies(unknown_items=0.0, candidates=CandidateCount(median=900), distinct=5):
        assert len(set(body["candidates"])) == 900


def test_more_candidates_than_items_come_again() -> None:
    few = Population(users=[1], items=[1, 2, 3], context={}, inline={}, time=POPULATION.time)
    workload = Workload(candidates=CandidateCount(median=8), unknown_items=0.0, distinct=1)
    (body,) = make_bodies(few, workload)
    assert Counter(json.loads(body)["candidates"]).keys() == {1, 2, 3}


def test_shares_of_unknown_users_and_items() -> None:
    bodies = _bodies(unknown_users=0.3, unknown_items=0.1, distinct=1000)
    users = np.mean([body["user_id"] not in POPULATION.users for body in bodies])
    items = np.mean([item not in range(1000, 2000) for b in bodies for item in b["candidates"]])
    assert users == pytest.approx(0.3, abs=0.05)
    assert items == pytest.approx(0.1, abs=0.02)


def test_forms_layout_and_deadline() -> None:
    columns = _bodies(form="columns", layout="columns", timeout_ms=7)[0]
    assert columns["candidates"].keys() == {"item_id", "shelf"}
    assert (columns["layout"], columns["timeout_ms"]) == ("columns", 7)
    rows = _bodies(form="rows")[0]
    assert rows["candidates"][0].keys() == {"item_id", "shelf"}
    assert rows.keys() & {"layout", "timeout_ms"} == set()


def test_candidate_counts_are_log_normal_and_clipped() -> None:
    count = parse_candidates("lognormal:100:0.8")
    rng = np.random.default_rng(1)
    drawn = [count.draw(rng) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(100, rel=0.1)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.1)
    wild = CandidateCount(median=300, sigma=5.0)
    extremes = [wild.draw(rng) for _ in range(500)]
    assert (min(extremes), max(extremes)) == (1, 1000)


@pytest.mark.parametrize("text", ["0", "1001", "many", "lognormal:x", "lognormal:10:y"])
def test_candidate_counts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_candidates(text)


def test_population_of_a_snapshot(tiny_bundle: Path, tiny_items: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.parquet"
    frame = pl.DataFrame({"user_id": ["7", "anna"], "record": [pack_record(tiny.record())] * 2})
    frame.write_parquet(records)
    population = read_population(tiny_bundle, tiny_items, records)
    assert list(population.users) == [7, "anna"]
    assert list(population.items) == [1, 2, 3, 4]
    # An hour after the records were made.
    assert population.time == "2023-11-14T13:00:00Z"
    assert population.context.keys() >= {"store_id"}


def test_bodies_of_a_file_get_another_deadline(tmp_path: Path) -> None:
    path = tmp_path / "bodies.jsonl"
    path.write_text('{"user_id": 1, "timeout_ms": 5}\n\n{"user_id": 2}\n')
    assert [json.loads(b)["timeout_ms"] for b in read_bodies(path, timeout_ms=9)] == [9, 9]
    assert json.loads(read_bodies(path)[0]) == {"user_id": 1, "timeout_ms": 5}


def test_a_file_of_bodies_that_is_none_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bodies.jsonl"
    path.write_text('{"user_id": 1}\nnonsense\n')
    with pytest.raises(LogError) as caught:
        read_bodies(path)
    assert caught.value.row_number == 1


def test_item_table_grows_under_new_ids(tmp_path: Path) -> None:
    items, out = tmp_path / "items.parquet", tmp_path / "more.parquet"
    tiny.item_snapshot().write_parquet(items)
    grow_items(items, out, rows=10, id_column="item_id")
    grown = pl.read_parquet(out)
    assert grown["item_id"].to_list() == [1, 2, 3, 4, 6, 7, 8, 9, 11, 12]
    assert grown["brand"][4] == "acme"


def test_variation_is_read_or_refused() -> None:
    assert parse_variation("workers=1,2") == ("workers", [1, 2])
    with pytest.raises(ValueError, match="workers="):
        parse_variation("colour=1")
