import asyncio
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
import tiny
from conftest import RunningApp, StartApp

from service.settings import Settings
from service.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
BODY = {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, "2", 99]}


class HeldStore(MemoryStore):
    """Look-ups wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def get(self, user_id: str) -> bytes | None:
        self.is_asked.set()
        await self.may_answer.wait()
        return await super().get(user_id)


@pytest.fixture
def files(tmp_path: Path, tiny_bundle: Path, tiny_items: Path, settings: Settings) -> Settings:
    """Settings with a link to a bundle and a snapshot, both of which a test may replace."""
    shutil.copytree(tiny_bundle, tmp_path / "bundles" / tiny_bundle.name)
    (tmp_path / "current").symlink_to(tmp_path / "bundles" / tiny_bundle.name)
    shutil.copy(tiny_items, tmp_path / "items.parquet")
    changed = {
        "bundle": tmp_path / "current",
        "item_snapshot": tmp_path / "items.parquet",
        "reload_poll_s": 0.02,
    }
    return settings.model_copy(update=changed)


def put_items(settings: Settings, frame: pl.DataFrame) -> None:
    assert settings.item_snapshot is not None
    new = settings.item_snapshot.with_suffix(".new")
    frame.write_parquet(new)
    new.rename(settings.item_snapshot)


def put_bundle(settings: Settings, path: Path) -> None:
    assert settings.bundle is not None
    new = settings.bundle.with_name("new")
    new.symlink_to(path)
    new.rename(settings.bundle)


async def wait_for(client: httpx.AsyncClient, series: str, value: float) -> None:
    deadline = time.monotonic() + LIMIT_S
    while await metric(client, series) != value:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def metric(client: httpx.AsyncClient, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", (await client.get("/metrics")).text, re.M)
    return float(found[1]) if found else math.nan


async def score(app: RunningApp) -> Any:
    return (await app.client.post("/score", json=BODY)).json()


async def test_items_are_replaced_when_their_file_is(files: Settings, start_app: StartApp) -> None:
    async with start_app(files) as app:
        before = await score(app)
        put_items(files, tiny.item_snapshot().filter(pl.col("item_id") != 2))
        await wait_for(app.client, 'scoring_swaps_total{part="items"}', 1)
        after = await score(app)
        rows = await metric(app.client, "scoring_item_table_rows")

    assert [item["status"] for item in before["items"]] == ["ok", "ok", "unknown_item"]
    assert [item["status"] for item in after["items"]] == ["ok", "unknown_item", "unknown_item"]
    assert after["items"][0] == before["items"][0]
    assert rows == 3


async def test_bundle_is_replaced_when_its_link_is(
    files: Settings, start_app: StartApp, tmp_path: Path
) -> None:
    other = tiny.write(tmp_path / "other", seed=4)
    async with start_app(files) as app:
        before = await score(app)
        put_bundle(files, other)
        await wait_for(app.client, 'scoring_swaps_total{part="bundle"}', 1)
        after = await score(app)
        ready = (await app.client.get("/readyz")).json()

    assert after["bundle"] == ready["bundle"] == other.name != before["bundle"]
    assert after["items"][0]["pctr"] != before["items"][0]["pctr"]


async def test_damaged_items_are_refused_once_and_the_old_ones_stay(
    files: Settings, start_app: StartApp, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_app(files) as app:
        before = await score(app)
        assert files.item_snapshot is not None
        files.item_snapshot.write_bytes(b"no parquet")
        await wait_for(app.client, 'scoring_swaps_refused_total{part="items"}', 1)
        await asyncio.sleep(0.1)  # Several looks, at the same file.
        after = await score(app)
        num_refused = await metric(app.client, 'scoring_swaps_refused_total{part="items"}')
        put_items(files, tiny.item_snapshot().head(1))
        await wait_for(app.client, "scoring_item_table_rows", 1)

    assert after["items"] == before["items"]
    assert num_refused == 1
    (error,) = (record for record in caplog.records if record.name == "service.swap")
    assert str(files.item_snapshot) in error.getMessage()


async def test_damaged_bundle_is_refused_and_the_old_one_stays(
    files: Settings, start_app: StartApp, tmp_path: Path
) -> None:
    bad = tiny.write(tmp_path / "other", seed=4)
    model = bad / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    async with start_app(files) as app:
        before = await score(app)
        put_bundle(files, bad)
        await wait_for(app.client, 'scoring_swaps_refused_total{part="bundle"}', 1)
        after = await score(app)

    assert after["bundle"] == before["bundle"]
    assert after["items"] == before["items"]


async def test_request_keeps_the_state_that_it_began_with(
    files: Settings, start_app: StartApp, tmp_path: Path
) -> None:
    store = HeldStore()
    other = tiny.write(tmp_path / "other", seed=4)
    async with start_app(files, store) as app:
        await app.put_record("7", tiny.record())
        held = asyncio.create_task(score(app))
        await store.is_asked.wait()
        put_bundle(files, other)
        schema = tiny.fitted_schema().schema_.sha256
        series = f'scoring_bundle_info{{bundle="{other.name}",schema="{schema}"}}'
        await wait_for(app.client, series, 1)
        store.may_answer.set()
        old, new = await held, await score(app)

    assert old["bundle"] != new["bundle"] == other.name
    assert [item["status"] for item in old["items"]] == ["ok", "ok", "unknown_item"]


async def test_nothing_is_looked_at_without_an_interval_until_asked(
    files: Settings, start_app: StartApp
) -> None:
    quiet = files.model_copy(update={"reload_poll_s": 0.0})
    async with start_app(quiet) as app:
        put_items(quiet, tiny.item_snapshot().head(1))
        await asyncio.sleep(0.1)
        before = await metric(app.client, "scoring_item_table_rows")
        app.app.state.reload()
        await wait_for(app.client, "scoring_item_table_rows", 1)

    assert before == 4


async def test_no_answer_is_lost_while_states_change(files: Settings, start_app: StartApp) -> None:
    is_over = False
    statuses: list[int] = []

    async def post_for_ever() -> None:
        while not is_over:
            statuses.append((await app.client.post("/score", json=BODY)).status_code)

    async with start_app(files) as app:
        callers = [asyncio.create_task(post_for_ever()) for _ in range(4)]
        for number in range(1, 11):
            app.app.state.reload()
            await wait_for(app.client, 'scoring_swaps_total{part="bundle"}', number)
        is_over = True
        await asyncio.gather(*callers)

    assert set(statuses) == {200}
    assert len(statuses) > 20
