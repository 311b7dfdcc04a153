"""Fixtures for every test: a clean environment, loopback only, the tiny bundle and its app."""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import tiny
from fastapi import FastAPI

from loadtest.bench import serving
from model.contract.record import UserRecord, pack_record
from service.app import create_app
from service.item_files import ItemOpener, open_in_memory
from service.settings import BatchSettings, Settings, load_settings
from service.state import ServingState, load_serving_state
from service.stores.base import OnlineStore
from service.stores.memory import MemoryStore


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: everything it needs must have been installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CTR_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        is_local = self.family == socket.AF_UNIX or str(address[0]).startswith("127.")
        if not (is_local or address[0] in ("::1", "localhost")):
            raise AssertionError(f"a test connects to {address}: loopback only")
        real_connect(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]
    yield
    socket.socket.connect = real_connect  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a bundle whose schema has every feature kind; see `tiny`."""
    return tiny.write(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def tiny_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Item snapshot of items 1 to 4."""
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    tiny.item_snapshot().write_parquet(path)
    return path


@pytest.fixture(scope="session")
def tiny_state(tiny_bundle: Path, tiny_items: Path) -> Iterator[ServingState]:
    """The tiny bundle, tested and ready, with its items."""
    state = load_serving_state(tiny_bundle, tiny_items, batch=BatchSettings())
    yield state
    state.runtime.close()


@pytest.fixture
def settings(tiny_bundle: Path, tiny_items: Path) -> Settings:
    """For the tiny bundle and its items; no store URL."""
    return load_settings(
        bundle=tiny_bundle,
        item_snapshot=tiny_items,
        limits={"timeout_ms": 20_000, "max_timeout_ms": 30_000},
        store={"timeout_ms": 1000},
    )


@dataclass
class RunningApp:
    """An app inside its lifespan, and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient
    store: OnlineStore

    async def put_record(self, user_id: str, record: UserRecord | bytes) -> None:
        data = record if isinstance(record, bytes) else pack_record(record)
        await self.store.set_many([(user_id, data)], ttl_s=None)


class StartApp(Protocol):
    def __call__(
        self,
        settings: Settings,
        store: OnlineStore | None = None,
        open_items: ItemOpener = open_in_memory,
    ) -> AbstractAsyncContextManager[RunningApp]: ...


@pytest.fixture
def is_below_asgi() -> bool:
    """Whether the app is asked over a socket, as it is when deployed; else by ASGI."""
    return True


@pytest.fixture
def start_app(is_below_asgi: bool) -> StartApp:
    """Runs an app with other settings or another store."""

    @asynccontextmanager
    async def start(
        settings: Settings,
        store: OnlineStore | None = None,
        open_items: ItemOpener = open_in_memory,
    ) -> AsyncIterator[RunningApp]:
        store = MemoryStore() if store is None else store
        app = create_app(settings, store=store, open_items=open_items)
        async with app.router.lifespan_context(app), _client_of(app, is_below_asgi) as client:
            yield RunningApp(app, client, store)

    return start


@asynccontextmanager
async def _client_of(app: FastAPI, is_below_asgi: bool) -> AsyncIterator[httpx.AsyncClient]:
    if is_below_asgi:
        async with (
            serving(app) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            yield client
    else:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield client


@pytest.fixture
async def running(settings: Settings, start_app: StartApp) -> AsyncIterator[RunningApp]:
    """The tiny app; household 7 has a record."""
    async with start_app(settings) as app:
        await app.put_record("7", tiny.record())
        yield app


@pytest.fixture
def client(running: RunningApp) -> httpx.AsyncClient:
    return running.client
