"""The verbs as processes, from a log to HTTP answers; what one writes the next one reads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from loadtest.rig import running_service
from model.contract.bundle import read_bundle
from model.contract.times import AS_OF, parse_time
from service.stores.embedded import EmbeddedRedis

pytestmark = [pytest.mark.process, pytest.mark.redis]

DAY = 86_400_000_000
START = 1_500_000_000_000_000  # microseconds
SCHEMA = """
[log]
request_id = "request_id"
[[steps]]
name = "click"
label = "click"
[[steps]]
name = "conversion"
label = "conversion"
[[features]]
name = "hour"
kind = "time_part"
part = "hour"
[[features]]
name = "age"
kind = "categorical"
scope = "user"
source = "store"
[[features]]
name = "visits"
kind = "numeric"
scope = "user"
source = "store"
log1p = true
minimum = 0
statistic = { event = "purchase", aggregate = "count" }
[[features]]
name = "last_visit"
kind = "elapsed"
scope = "user"
source = "store"
statistic = { event = "purchase", aggregate = "last_time" }
[[features]]
name = "item_id"
kind = "categorical"
scope = "item"
source = "items"
[[features]]
name = "brand"
kind = "categorical"
scope = "item"
source = "items"
[[features]]
name = "position"
kind = "categorical"
scope = "cross"
source = "log_only"
serving_value = 1
[[features]]
name = "bought_item"
kind = "match"
attribute = "item_id"
[[features]]
name = "bought_brand"
kind = "match"
attribute = "brand"
[[features]]
name = "recent"
kind = "history"
of = "item_id"
max_length = 5
"""
CONFIG = """
[data]
impressions = "impressions.parquet"
events = "events.parquet"
items = "items.parquet"
users = "users.parquet"
schema_file = "schema.toml"
[net.options]
width = 8
[optimizer]
batch_rows = 256
max_epochs = 2
"""


def ctr(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def write_tables(path: Path) -> None:
    """2,000 requests of 4 candidates over 60 days; what was bought before is bought again."""
    rng = np.random.default_rng(3)
    items, users, requests = 30, 40, 2000
    when = np.sort(rng.integers(0, 60 * DAY, requests)) + START
    user = rng.integers(users, size=requests)
    likes = rng.random((users, items)) < 0.2
    shown = rng.integers(items, size=(requests, 4))
    chance = np.where(likes[user[:, None], shown], 0.6, 0.05)
    click = rng.random(chance.shape) < chance
    conversion = click & (rng.random(chance.shape) < 0.4)
    stamps = pl.Series("time", np.repeat(when, 4)).cast(pl.Datetime("us", "UTC"))
    log = pl.DataFrame(
        {
            "request_id": np.repeat(np.arange(requests), 4),
            "user_id": np.repeat(user, 4),
            "item_id": shown.ravel(),
            "time": stamps,
            "position": np.tile([1, 2, 3, 4], requests),
            "click": click.ravel().astype(np.int8),
            "conversion": conversion.ravel().astype(np.int8),
        }
    )
    log.write_parquet(path / "impressions.parquet")
    bought = log.filter(pl.col("conversion") == 1).select("user_id", "item_id", "time")
    bought.with_columns(event=pl.lit("purchase")).write_parquet(path / "events.parquet")
    brands = [f"brand {i % 7}" for i in range(items)]
    pl.DataFrame({"item_id": range(items), "brand": brands}).write_parquet(path / "items.parquet")
    ages = ["young" if i % 3 else "old" for i in range(users)]
    pl.DataFrame({"user_id": range(users), "age": ages}).write_parquet(path / "users.parquet")
    (path / "schema.toml").write_text(SCHEMA)
    (path / "train.toml").write_text(CONFIG)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("work")
    write_tables(path)
    cache = ("--cache", path / "cache")
    trained = ctr("train", path / "train.toml", "--run", path / "run", *cache, "--json")
    evaluated = ctr("evaluate", path / "run", *cache, "--json")
    exported = ctr("export", path / "run", "--out", path / "bundles", *cache, "--json")
    as_of = ("--as-of", "2017-09-01T00:00:00Z")
    ctr("materialize", path / "run", *as_of, "--out", path / "snapshot")
    return {
        "path": path,
        "training": json.loads(trained.stdout),
        "evaluation": json.loads(evaluated.stdout),
        "bundle": Path(json.loads(exported.stdout)["bundle"]),
        "snapshot": path / "snapshot",
    }


def test_bundle_has_histograms_and_the_snapshot_its_time(work: dict[str, Any]) -> None:
    assert read_bundle(work["bundle"]).histograms is not None
    written = pl.read_parquet_metadata(work["snapshot"] / "items.parquet")
    assert float(written[AS_OF]) == parse_time("2017-09-01T00:00:00Z")


REQUEST = {
    "user_id": 7,
    "time": "2017-09-01T00:00:00Z",
    "candidates": [0, 5, 12, 29, 999],
    "timeout_ms": 2000,
}


def test_model_beats_the_base_rate(work: dict[str, Any]) -> None:
    assert work["evaluation"]["test"]["ne_ctr"] < 0.98
    assert work["evaluation"]["test"]["auc_ctr"] > 0.6


def test_score_and_service_agree_alone_and_among_others(
    work: dict[str, Any], tmp_path: Path
) -> None:
    request_file = tmp_path / "request.json"
    request_file.write_text(json.dumps(REQUEST))
    items, records = work["snapshot"] / "items.parquet", work["snapshot"] / "records.parquet"
    parts = ("--bundle", work["bundle"], "--items", items, "--record", records, "--json")
    alone = json.loads(ctr("score", request_file, *parts).stdout)
    with EmbeddedRedis(tmp_path / "redis") as redis:
        filled = subprocess.run(
            [sys.executable, "-m", "service", "load-records", str(records)],
            env={"PATH": "/usr/bin:/bin", "CTR_STORE__URL": redis.url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert filled.returncode == 0, filled.stderr
        with (
            running_service(bundle=work["bundle"], items=items, store_url=redis.url) as url,
            httpx.Client(base_url=url) as client,
        ):
            served = client.post("/score", json=REQUEST).json()
            metrics = client.get("/metrics").text
    assert served["user_status"] == alone["user_status"] == "ok"
    assert served["degraded"] == []
    assert [item["status"] for item in served["items"]] == ["ok"] * 4 + ["unknown_item"]
    for a, b in zip(alone["items"], served["items"], strict=True):
        for name in ("pctr", "pcvr", "pctcvr"):
            assert abs(a[name] - b[name]) <= min(1e-5, 1e-3 * a[name])
        assert a["pctcvr"] <= a["pctr"]
    assert 'scoring_request_seconds_count{outcome="ok"} 1.0' in metrics


def test_finished_run_is_not_trained_again(work: dict[str, Any]) -> None:
    path = work["path"]
    before = (path / "run" / "weights.pt").read_bytes()
    again = ctr("train", path / "train.toml", "--run", path / "run", "--cache", path / "cache")
    assert "best at step" in again.stdout
    assert (path / "run" / "weights.pt").read_bytes() == before


def test_inspect_tells_what_the_bundle_holds(work: dict[str, Any]) -> None:
    told = json.loads(ctr("inspect", work["bundle"], "--json").stdout)
    assert told["manifest"]["outputs"] == ["pctr", "pctcvr", "pcvr"]
    assert told["cost"]["CPU us per run of 100 candidates"] > 0


def test_inspect_compares_with_the_plain_export_of_a_run(work: dict[str, Any]) -> None:
    run = work["path"] / "run"

    cost = json.loads(ctr("inspect", work["bundle"], "--against-plain", run, "--json").stdout)[
        "cost"
    ]

    assert cost["CPU us per plain run of 100 candidates"] > 0
    assert {f"served : plain at {rows}" for rows in (1, 20, 100, 400)} <= set(cost)
    assert cost["multiply-adds per candidate"] > 0


def test_proposed_schema_of_the_log_is_taken_back(work: dict[str, Any], tmp_path: Path) -> None:
    schema = tmp_path / "schema.toml"
    ctr("schema", work["path"] / "impressions.parquet", "--out", schema)
    assert 'source = "log_only"' in schema.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("serve", "--bundle", "/nowhere"), 3, "no bundle at /nowhere"),
        (("evaluate", "/nowhere"), 3, "no finished run"),
        (("train", "/nowhere.toml", "--run", "/nowhere"), 3, "no configuration"),
        (("nonsense",), 2, "No such command"),
        (("schema", "/nowhere.parquet"), 3, "cannot read"),
    ],
)
def test_what_cannot_be_used_ends_with_its_code(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = ctr(*arguments, check=False)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_reversed_labels_are_named(work: dict[str, Any], tmp_path: Path) -> None:
    for file in work["path"].glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    swapped = SCHEMA.replace('label = "click"', 'label = "x"').replace(
        'label = "conversion"', 'label = "click"'
    )
    (tmp_path / "schema.toml").write_text(swapped.replace('label = "x"', 'label = "conversion"'))
    (tmp_path / "train.toml").write_text(CONFIG)
    done = ctr("train", tmp_path / "train.toml", "--run", tmp_path / "run", check=False)
    assert done.returncode == 3
    assert "reversed" in done.stderr
