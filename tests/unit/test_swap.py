import asyncio
import contextlib
import itertools
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest
import tiny
from conftest import RunningApp, StartApp

from model.contract.bundle import MANIFEST, MODEL, Manifest, read_bundle, write_bundle
from model.contract.encode import Encoder
from model.contract.errors import BundleCorrupt, BundleRejected, LogError
from service import swap
from service.item_files import ItemFiles, open_in_memory
from service.item_sums import ItemSums
from service.items import ItemTable
from service.refusal import ItemBuildError, may_pass
from service.settings import Settings
from service.state import open_serving_state
from service.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio

LIMIT_S = 60.0
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


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "_FIRST_PAUSE_S", 0.05)


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


def with_other_model(bundle: Path, parent: Path) -> Path:
    """A bundle in order but for its model, which is that of another seed."""
    manifest = read_bundle(bundle).manifest.model_dump(exclude_unset=True)
    files = {name: (bundle / name).read_bytes() for name in manifest.pop("files")}
    files[MODEL] = (tiny.write(parent / "of", seed=5) / MODEL).read_bytes()
    computed = ("contract_version", "record_version", "hash_name", "hash_seed", "bundle_id")
    fields = {name: value for name, value in manifest.items() if name not in computed}
    return write_bundle(parent, manifest=fields, files=files)


class FailingOpener:
    """Opens item tables, but for as many errors as it is given."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.asked_at: list[float] = []

    async def __call__(
        self,
        snapshot: Path,
        *,
        bundle_path: Path,
        manifest: Manifest,
        encoder: Encoder,
        item_sums: ItemSums | None = None,
    ) -> ItemTable:
        self.asked_at.append(time.monotonic())
        if self.errors:
            raise self.errors.pop()
        return await open_in_memory(
            snapshot,
            bundle_path=bundle_path,
            manifest=manifest,
            encoder=encoder,
            item_sums=item_sums,
        )


async def item_build() -> psutil.Process:
    """The process that encodes items, once it is there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "service.item_build" in child.cmdline():
                    return child
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def swap_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "service.swap"]


async def wait_until_told(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not any(text in message for message in swap_messages(caplog)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


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


async def test_truly_damaged_bundle_is_refused_once(
    files: Settings, start_app: StartApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = with_other_model(tiny.write(tmp_path / "other", seed=4), tmp_path / "bad")
    async with start_app(files) as app:
        put_bundle(files, bad)
        await wait_for(app.client, 'scoring_swaps_refused_total{part="bundle"}', 1)
        await asyncio.sleep(0.2)  # Several looks, and twice the first pause.
        num_refused = await metric(app.client, 'scoring_swaps_refused_total{part="bundle"}')

    assert num_refused == 1
    (message,) = swap_messages(caplog)
    assert message.startswith("refused, what is in service stays:")
    assert "golden rows score another" in message


async def test_bundle_whose_manifest_comes_first_is_served_once_it_is_whole(
    files: Settings, start_app: StartApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny.write(tmp_path / "other", seed=4)
    late = tmp_path / "bundles" / other.name
    late.mkdir()
    shutil.copy(other / MANIFEST, late)
    async with start_app(files) as app:
        put_bundle(files, late)
        await wait_for(app.client, 'scoring_swaps_refused_total{part="bundle"}', 1)
        for path in sorted(other.iterdir()):
            if path.name not in (MANIFEST, MODEL):
                shutil.copy(path, late)
        (late / MODEL).write_bytes((other / MODEL).read_bytes()[:-1])
        await wait_until_told(caplog, f"{MODEL} differs from its digest")
        shutil.copy(other / MODEL, late)
        await wait_for(app.client, 'scoring_swaps_total{part="bundle"}', 1)
        after = await score(app)

    assert after["bundle"] == other.name
    messages = swap_messages(caplog)
    assert len(messages) == len(set(messages))


async def test_what_failed_without_a_fault_of_the_files_is_tried_again(
    files: Settings, start_app: StartApp, caplog: pytest.LogCaptureFixture
) -> None:
    opener = FailingOpener()
    async with start_app(files, open_items=opener) as app:
        opener.errors = [OSError(28, "No space left on device")] * 3
        put_items(files, tiny.item_snapshot().head(1))
        await wait_for(app.client, "scoring_item_table_rows", 1)
        num_failed = await metric(app.client, 'scoring_swaps_refused_total{part="items"}')

    assert num_failed == 3
    (message,) = swap_messages(caplog)  # The same thing is told once.
    assert message.startswith("not loaded, tried again in")
    assert "No space left on device" in message


async def test_killed_item_build_is_tried_again(
    files: Settings, start_app: StartApp, tmp_path: Path
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    async with start_app(files, open_items=ItemFiles(tables, log_level="warning")) as app:
        put_items(files, tiny.item_snapshot().head(1))
        (await item_build()).kill()
        await wait_for(app.client, "scoring_item_table_rows", 1)
        num_failed = await metric(app.client, 'scoring_swaps_refused_total{part="items"}')

    assert num_failed == 1


async def test_pauses_between_tries_grow_to_a_limit(
    files: Settings, start_app: StartApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "_LONGEST_PAUSE_S", 0.2)
    opener = FailingOpener()
    async with start_app(files, open_items=opener) as app:
        opener.errors = [OSError(28, "No space left on device")] * 4
        put_items(files, tiny.item_snapshot().head(1))
        await wait_for(app.client, "scoring_item_table_rows", 1)

    # The first pause is 0.05 s here.
    waits = [later - earlier for earlier, later in itertools.pairwise(opener.asked_at[1:])]
    assert [wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2, 0.2), strict=True)] == (
        [True] * 4
    )


async def test_swap_that_was_asked_for_is_tried_again_without_an_interval(
    files: Settings, start_app: StartApp
) -> None:
    opener = FailingOpener()
    quiet = files.model_copy(update={"reload_poll_s": 0.0})
    async with start_app(quiet, open_items=opener) as app:
        opener.errors = [OSError(24, "Too many open files")]
        app.app.state.reload()
        await wait_for(app.client, 'scoring_swaps_total{part="bundle"}', 1)
        num_failed = await metric(app.client, 'scoring_swaps_refused_total{part="bundle"}')

    assert num_failed == 1


async def test_failed_swap_is_left_alone_when_the_files_are_as_before(
    files: Settings, start_app: StartApp, tmp_path: Path, tiny_bundle: Path
) -> None:
    async with start_app(files) as app:
        put_bundle(files, tmp_path / "absent")
        await wait_for(app.client, 'scoring_swaps_refused_total{part="bundle"}', 1)
        put_bundle(files, tmp_path / "bundles" / tiny_bundle.name)
        await asyncio.sleep(0.3)
        swapped = await metric(app.client, 'scoring_swaps_total{part="bundle"}')
        after = await score(app)

    assert swapped == 0
    assert after["bundle"] == tiny_bundle.name


async def test_refused_bundle_takes_no_item_table(files: Settings, tmp_path: Path) -> None:
    bad = with_other_model(tiny.write(tmp_path / "other", seed=4), tmp_path / "bad")
    opener = FailingOpener()

    with pytest.raises(BundleRejected):
        await open_serving_state(bad, files.item_snapshot, batch=files.batch, open_items=opener)

    assert opener.asked_at == []


def test_only_errors_of_the_system_may_pass(tmp_path: Path) -> None:
    bundle = tiny.write(tmp_path, seed=4)
    (bundle / MODEL).unlink()
    with pytest.raises(BundleCorrupt) as missing:
        read_bundle(bundle)

    assert may_pass(missing.value)
    assert may_pass(ItemBuildError("killed"))
    assert may_pass(MemoryError())
    assert not may_pass(LogError("row 3: no id"))
    assert not may_pass(BundleRejected("golden rows"))


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
        for number in range(1, 6):
            app.app.state.reload()
            await wait_for(app.client, 'scoring_swaps_total{part="bundle"}', number)
        is_over = True
        await asyncio.gather(*callers)

    assert set(statuses) == {200}
    assert len(statuses) > 20
