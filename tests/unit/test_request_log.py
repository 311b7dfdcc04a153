import asyncio
import json
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
from click.testing import CliRunner, Result
from conftest import StartApp
from fakes import FailingStore
from prometheus_client import CollectorRegistry

from model.contract.errors import LogError
from model.contract.record import pack_record
from service import request_log
from service.cli import cli
from service.distance import Bounds
from service.errors import StoreUnavailable
from service.features import Candidates
from service.observe import Metrics
from service.replay import replay
from service.request_log import (
    RequestLog,
    expire,
    forget_user,
    log_files,
    user_hash,
    user_key,
)
from service.scorer import ScoreRequest, ScoreResult
from service.settings import (
    RequestLogSettings,
    Settings,
    SettingsError,
    StoreSettings,
    load_settings,
)
from service.state import load_serving_state
from service.stores import open_store
from service.stores.embedded import EmbeddedRedis

pytestmark = pytest.mark.anyio

KEY = "a secret of sixteen or more"

# One per way in which a request can differ.
BODIES: list[dict[str, Any]] = [
    {"candidates": [1, "2", 3.0, 99]},
    {"candidates": [1, 2], "time": tiny.NOON_TEXT},
    {"candidates": [{"item_id": 1, "display": "5"}, {"item_id": 2}], "time": tiny.NOON_TEXT},
    {"candidates": {"item_id": [3, 1], "display": ["5", None], "discount": [0.5, 0.1]}},
    {"candidates": [2], "context": {"store_id": 7, "basket": 4}},
    {"candidates": [2], "user_features": {"trips": 9, "age_band": "65+"}},
    {"candidates": list(range(1, 40)), "time": tiny.NOON_TEXT},
]


def log_settings(directory: Path, **changes: Any) -> RequestLogSettings:
    content = {"dir": directory, "user_key": KEY, "share": 1.0}
    return RequestLogSettings.model_validate({**content, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def logging_settings(settings: Settings, directory: Path) -> Settings:
    return settings.model_copy(update={"request_log": log_settings(directory)})


@pytest.fixture
async def log(logging_settings: Settings, start_app: StartApp, directory: Path) -> Path:
    """The log of a service that was asked every body, by a known and by an unknown user."""
    async with start_app(logging_settings) as running:
        await running.put_record("7", tiny.record())
        for body in BODIES:
            for user_id in (7, "nobody"):
                response = await running.client.post("/score", json={"user_id": user_id, **body})
                assert response.status_code == 200
    return directory


def read(directory: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in log_files(directory)])


async def test_every_request_is_logged_with_its_answer(
    logging_settings: Settings, start_app: StartApp, directory: Path
) -> None:
    async with start_app(logging_settings) as running:
        await running.put_record("7", tiny.record())
        answer = (await running.client.post("/score", json={"user_id": 7, **BODIES[0]})).json()

    (row,) = read(directory).to_dicts()
    assert row["request_id"] == answer["request_id"]
    assert row["bundle"] == answer["bundle"]
    assert row["user_status"] == answer["user_status"]
    assert row["user_hash"] == user_hash("7", user_key(KEY))
    assert row["record"] is not None
    assert row["item_ids"] == ["1", "2", "3", "99"]
    for name in ("pctr", "pctcvr"):
        answered = [item[name] for item in answer["items"]]
        assert row[name] == pytest.approx(answered, rel=1e-6)
    assert abs((datetime.now(UTC) - row["served_at"]).total_seconds()) < 60


async def test_log_does_not_name_the_user(log: Path) -> None:
    for file in log_files(log):
        assert b"nobody" not in file.read_bytes()
    assert b"nobody" not in str(read(log).to_dicts()).encode()


async def test_replay_by_the_same_bundle_differs_by_nothing(
    log: Path, tiny_bundle: Path, tiny_items: Path, settings: Settings
) -> None:
    state = load_serving_state(tiny_bundle, tiny_items, batch=settings.batch)

    found = replay(log, state)

    assert found.num_requests == 2 * len(BODIES)
    assert found.num_candidates == 2 * sum(
        len(b["candidates"]["item_id"] if isinstance(b["candidates"], dict) else b["candidates"])
        for b in BODIES
    )
    assert (found.num_refused, found.first_refusal) == (0, None)
    assert set(found.distances) == set(state.manifest.outputs)
    for distance in found.distances.values():
        assert (distance.max_absolute, distance.psi, distance.ks) == (0, 0, 0)
        assert distance.mean_before == distance.mean_after > 0
        assert distance.top_overlap == 1
        assert distance.rank_correlation == pytest.approx(1)
    assert found.reasons_against(Bounds()) == []


async def test_replay_by_another_bundle_shows_by_how_much(
    log: Path, tmp_path: Path, tiny_items: Path, settings: Settings
) -> None:
    state = load_serving_state(tiny.write(tmp_path, seed=9), tiny_items, batch=settings.batch)

    found = replay(log, state)

    for distance in found.distances.values():
        assert distance.max_absolute > distance.mean_absolute > 1e-4
        assert distance.top_overlap is not None
        assert distance.top_overlap < 1
    assert found.reasons_against(Bounds(max_mean_ratio=1.0)) != []


async def test_replay_counts_what_does_not_fit_the_schema(
    log: Path, tiny_bundle: Path, tiny_items: Path, settings: Settings
) -> None:
    (file,) = log_files(log)
    rows = pl.read_parquet(file).with_columns(context=pl.lit('{"basket": "many"}'))
    rows.write_parquet(file)

    found = replay(log, load_serving_state(tiny_bundle, tiny_items, batch=settings.batch))

    n = 2 * len(BODIES)
    assert (found.num_requests, found.num_refused) == (0, n)
    assert found.first_refusal is not None
    assert found.distances == {}
    assert found.reasons_against(Bounds()) == [f"{n} of {n} requests do not fit its schema"]


async def test_answer_without_a_record_is_replayed_without_it(
    logging_settings: Settings,
    start_app: StartApp,
    directory: Path,
    tiny_bundle: Path,
    tiny_items: Path,
) -> None:
    store = FailingStore(StoreUnavailable("down"))
    async with start_app(logging_settings, store) as running:
        await running.client.post("/score", json={"user_id": 7, **BODIES[0]})

    (row,) = read(directory).to_dicts()
    state = load_serving_state(tiny_bundle, tiny_items, batch=logging_settings.batch)
    found = replay(directory, state)
    assert (row["user_status"], row["record"]) == ("degraded", None)
    assert all(d.max_absolute == 0 for d in found.distances.values())


async def test_nothing_is_logged_without_a_directory(
    settings: Settings, start_app: StartApp
) -> None:
    async with start_app(settings) as running:
        await running.client.post("/score", json={"user_id": 7, **BODIES[0]})
        text = (await running.client.get("/metrics")).text

    assert "scoring_logged_requests_total 0.0" in text
    assert not any(thread.name == "request-log" for thread in threading.enumerate())


async def test_failed_request_is_not_logged(
    logging_settings: Settings, start_app: StartApp, directory: Path
) -> None:
    async with start_app(logging_settings) as running:
        await running.client.post("/score", json={"user_id": 7, "candidates": []})

    assert log_files(directory) == []


class Bench:
    """A log without a service, its clock and its metrics."""

    def __init__(self, settings: RequestLogSettings) -> None:
        self.registry = CollectorRegistry()
        self.log = RequestLog(settings, metrics=Metrics(self.registry))

    def offer(self, request_id: str, *, user_id: str = "7", bundle: str = "b") -> None:
        self.log.offer(
            request_id,
            ScoreRequest(user_id=user_id, candidates=Candidates(item_ids=[1])),
            replace(RESULT, bundle_id=bundle),
        )

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"scoring_{name}", labels)


RESULT = ScoreResult(
    bundle_id="b",
    user_status="ok",
    degraded=(),
    ignored_features=(),
    item_ids=[1],
    outputs={"pctr": np.array([0.5], np.float32)},
    is_known=np.ones(1, np.bool_),
    is_finite=np.ones(1, np.bool_),
    time=0.0,
    record=None,
)


async def test_sample_is_decided_by_the_request_id_alone(directory: Path) -> None:
    picked = []
    for _ in range(2):
        bench = Bench(log_settings(directory, share=0.25, max_queue_requests=10_000))
        async with bench.log:
            for number in range(4000):
                bench.offer(f"r{number}")
        picked.append(set(read(directory)["request_id"]))
        assert bench.count("logged_requests_total") == len(picked[0])

    assert picked[0] == picked[1]
    # Four standard deviations of a binomial.
    assert abs(len(picked[0]) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5


async def test_full_queue_drops_and_counts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, is_writing = threading.Event(), threading.Event()
    real = request_log.write_file

    def slow(*args: Any, **kwargs: Any) -> Path:
        is_writing.set()
        assert may_write.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(request_log, "write_file", slow)
    bench = Bench(log_settings(directory, max_queue_requests=3, requests_per_file=1))
    async with bench.log:
        bench.offer("first")
        await asyncio.to_thread(is_writing.wait, 20)
        for number in range(5):
            bench.offer(f"r{number}")
        dropped = bench.count("not_logged_requests_total", reason="queue_full")
        may_write.set()

    assert dropped == 2
    assert set(read(directory)["request_id"]) == {"first", "r0", "r1", "r2"}


async def test_what_cannot_be_written_is_counted_and_the_log_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, is_broken = request_log.write_file, True

    def write(*args: Any, **kwargs: Any) -> Path:
        nonlocal is_broken
        if is_broken:
            is_broken = False
            raise OSError("no space left")
        return real(*args, **kwargs)

    monkeypatch.setattr(request_log, "write_file", write)
    bench = Bench(log_settings(directory, requests_per_file=2))
    async with bench.log:
        for number in range(4):
            bench.offer(f"r{number}")

    assert bench.count("not_logged_requests_total", reason="write_failed") == 2
    assert set(read(directory)["request_id"]) == {"r2", "r3"}
    assert "no space left" in caplog.text


async def test_rows_of_two_bundles_are_in_two_files(directory: Path) -> None:
    bench = Bench(log_settings(directory))
    async with bench.log:
        for number, bundle in enumerate("aabb"):
            bench.offer(f"r{number}", bundle=bundle)

    files = [pl.read_parquet(file) for file in log_files(directory)]
    assert sorted(tuple(frame["bundle"]) for frame in files) == [("a", "a"), ("b", "b")]


async def test_request_does_not_wait_longer_than_set(directory: Path) -> None:
    bench = Bench(log_settings(directory, flush_s=0.05))
    async with bench.log:
        bench.offer("r")
        async with asyncio.timeout(20):
            while not log_files(directory):  # noqa: ASYNC110 - a thread writes it
                await asyncio.sleep(0.01)


async def test_forgotten_user_is_in_no_file(directory: Path) -> None:
    bench = Bench(log_settings(directory, requests_per_file=2))
    async with bench.log:
        for number, user_id in enumerate(["7", "7", "7", "8", "8", "8"]):
            bench.offer(f"r{number}", user_id=user_id)
    assert len(log_files(directory)) == 3

    assert forget_user(directory, user_hash("7", user_key(KEY))) == 3

    assert len(log_files(directory)) == 2
    assert set(read(directory)["request_id"]) == {"r3", "r4", "r5"}
    assert forget_user(directory, user_hash("7", user_key(KEY))) == 0


def test_days_that_are_over_go(directory: Path) -> None:
    for day in ("2026-01-01", "2026-01-02", "2026-01-03", "notes"):
        (directory / day).mkdir(parents=True)
        (directory / day / "a.parquet").write_bytes(b"")

    expire(directory, before=datetime(2026, 1, 3, tzinfo=UTC))

    assert sorted(f.name for f in directory.iterdir()) == ["2026-01-03", "notes"]


def test_directory_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CTR_REQUEST_LOG__USER_KEY is not"):
        load_settings(request_log={"dir": tmp_path})


def ctr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


async def test_replay_verb_shows_differences(
    log: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    where = (log, "--bundle", tiny_bundle, "--items", tiny_items)

    told = ctr("replay", *where, "--json")
    shown = ctr("replay", *where)

    found = json.loads(told.stdout)
    assert found["num_requests"] == 2 * len(BODIES)
    assert all(d["max_absolute"] == 0 for d in found["distances"].values())
    assert found["is_go"] is True
    assert "pctcvr" in shown.stdout
    assert f"{2 * len(BODIES)} requests" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "go"


async def test_replay_verb_says_no_go_beyond_a_bound(
    log: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    where = (log, "--bundle", tiny_bundle, "--items", tiny_items)

    told = ctr("replay", *where, "--max-psi", "-1")

    assert told.exit_code == 4
    assert told.stdout.splitlines()[-1].startswith("no-go: pctr: psi 0.000 is above -1")


def test_replay_of_no_log_is_an_error(tmp_path: Path, tiny_bundle: Path) -> None:
    result = ctr("replay", tmp_path, "--bundle", tiny_bundle)

    assert isinstance(result.exception, LogError)


@pytest.mark.redis
async def test_forget_verb_leaves_no_record_and_no_logged_request(
    logging_settings: Settings,
    start_app: StartApp,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = pack_record(tiny.record())
    with EmbeddedRedis(tmp_path / "redis") as server:
        async with start_app(logging_settings, open_store(server.url, StoreSettings())) as running:
            await running.store.set_many([("7", record), ("8", record)], ttl_s=None)
            for user_id in (7, 8, 7):
                await running.client.post("/score", json={"user_id": user_id, **BODIES[0]})
        monkeypatch.setenv("CTR_STORE__URL", server.url)
        monkeypatch.setenv("CTR_REQUEST_LOG__DIR", str(directory))
        monkeypatch.setenv("CTR_REQUEST_LOG__USER_KEY", KEY)

        told = await asyncio.to_thread(ctr, "forget", "7", "--json")

        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout) == {"records": 1, "logged_requests": 2}
        assert set(read(directory)["user_hash"]) == {user_hash("8", user_key(KEY))}
        store = open_store(server.url, StoreSettings(timeout_ms=5000))
        assert await store.get("7") is None
        assert await store.get("8") == record
        await store.aclose()
