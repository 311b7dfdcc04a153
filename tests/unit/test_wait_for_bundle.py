import asyncio
import shutil
import time
from pathlib import Path

import httpx
import pytest
import tiny
from conftest import StartApp

from model.contract.errors import BundleNotFound
from service.settings import Settings

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
BODY = {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, "2", 99]}


@pytest.fixture
def nothing(tmp_path: Path, settings: Settings) -> Settings:
    """Settings that wait for a bundle and items, in an empty directory."""
    changed = {
        "bundle": tmp_path / "current",
        "item_snapshot": tmp_path / "items.parquet",
        "reload_poll_s": 0.02,
        "wait_for_bundle": True,
    }
    return settings.model_copy(update=changed)


def put_items(settings: Settings, tiny_items: Path) -> None:
    assert settings.item_snapshot is not None
    new = settings.item_snapshot.with_suffix(".new")
    shutil.copy(tiny_items, new)
    new.rename(settings.item_snapshot)


def put_bundle(settings: Settings, bundle: Path) -> None:
    assert settings.bundle is not None
    new = settings.bundle.with_name("new")
    new.symlink_to(bundle)
    new.rename(settings.bundle)


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + LIMIT_S
    while (await client.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_without_a_bundle_the_service_is_alive_and_not_ready(
    nothing: Settings, start_app: StartApp
) -> None:
    async with start_app(nothing) as app:
        alive = await app.client.get("/healthz")
        ready = await app.client.get("/readyz")
        answer = await app.client.post("/score", json=BODY)

    assert alive.status_code == 200
    assert (ready.status_code, answer.status_code) == (503, 503)
    assert answer.json()["code"] == "not_ready"
    assert "retry-after" in answer.headers


async def test_service_becomes_ready_when_bundle_and_items_appear(
    nothing: Settings, start_app: StartApp, tiny_bundle: Path, tiny_items: Path
) -> None:
    async with start_app(nothing) as app:
        put_items(nothing, tiny_items)
        put_bundle(nothing, tiny_bundle)
        await wait_until_ready(app.client)
        answer = (await app.client.post("/score", json=BODY)).json()
        metrics = (await app.client.get("/metrics")).text

    assert answer["bundle"] == tiny_bundle.name
    assert [item["status"] for item in answer["items"]] == ["ok", "ok", "unknown_item"]
    assert 'scoring_swaps_total{part="bundle"} 0.0' in metrics


async def test_a_bundle_without_its_items_is_waited_with(
    nothing: Settings, start_app: StartApp, tiny_bundle: Path, tiny_items: Path
) -> None:
    async with start_app(nothing) as app:
        put_bundle(nothing, tiny_bundle)
        await asyncio.sleep(0.2)  # Several looks.
        before = await app.client.get("/readyz")
        metrics = (await app.client.get("/metrics")).text
        put_items(nothing, tiny_items)
        await wait_until_ready(app.client)

    assert before.status_code == 503
    assert 'scoring_swaps_refused_total{part="bundle"} 0.0' in metrics


@pytest.mark.parametrize("is_there_at_start", [True, False])
async def test_a_damaged_first_bundle_is_refused_and_the_next_one_served(
    nothing: Settings,
    start_app: StartApp,
    tiny_bundle: Path,
    tiny_items: Path,
    tmp_path: Path,
    *,
    is_there_at_start: bool,
) -> None:
    bad = tiny.write(tmp_path / "other", seed=4)
    model = bad / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    put_items(nothing, tiny_items)
    if is_there_at_start:
        put_bundle(nothing, bad)
    async with start_app(nothing) as app:
        if not is_there_at_start:
            put_bundle(nothing, bad)
        deadline = time.monotonic() + LIMIT_S
        series = 'scoring_swaps_refused_total{part="bundle"} 1.0'
        while series not in (await app.client.get("/metrics")).text:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        before = await app.client.get("/readyz")
        await asyncio.sleep(0.1)  # Several looks, at the same bundle.
        metrics = (await app.client.get("/metrics")).text
        put_bundle(nothing, tiny_bundle)
        await wait_until_ready(app.client)

    assert before.status_code == 503
    assert series in metrics


async def test_being_asked_to_load_what_is_not_there_changes_nothing(
    nothing: Settings, start_app: StartApp, tiny_bundle: Path, tiny_items: Path
) -> None:
    quiet = nothing.model_copy(update={"reload_poll_s": 0.0})
    async with start_app(quiet) as app:
        app.app.state.reload()
        await asyncio.sleep(0.05)
        before = await app.client.get("/readyz")
        put_items(quiet, tiny_items)
        put_bundle(quiet, tiny_bundle)
        app.app.state.reload()
        await wait_until_ready(app.client)

    assert before.status_code == 503


async def test_a_bundle_swapped_in_after_a_late_first_one_counts_as_a_swap(
    nothing: Settings, start_app: StartApp, tiny_bundle: Path, tiny_items: Path, tmp_path: Path
) -> None:
    other = tiny.write(tmp_path / "other", seed=4)
    async with start_app(nothing) as app:
        put_items(nothing, tiny_items)
        put_bundle(nothing, tiny_bundle)
        await wait_until_ready(app.client)
        put_bundle(nothing, other)
        deadline = time.monotonic() + LIMIT_S
        series = 'scoring_swaps_total{part="bundle"} 1.0'
        while series not in (await app.client.get("/metrics")).text:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        ready = (await app.client.get("/readyz")).json()

    assert ready["bundle"] == other.name


async def test_without_waiting_a_missing_bundle_ends_the_start(
    nothing: Settings, start_app: StartApp
) -> None:
    with pytest.raises(BundleNotFound):
        async with start_app(nothing.model_copy(update={"wait_for_bundle": False})):
            pass
