"""A real service and a real Redis, as processes, for measurements and fault injection."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from loadtest.procs import pinned
from service.errors import StoreUnavailable
from service.materialize import load_records
from service.readiness import START_TIMEOUT_S, wait_until_ready
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.embedded import find_redis_server


class RedisProcess:
    """A redis-server on one loopback port, with persistence, to be stopped, killed and started."""

    def __init__(self, data_dir: Path, *, cpu: int | None = None) -> None:
        self._data_dir = data_dir
        self._cpu = cpu
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The same before and after a restart."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it has loaded its data."""
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--appendonly", "yes"]
        options += ["--dir", str(self._data_dir), "--save", ""]
        with pinned(self._cpu):
            self._process = subprocess.Popen(
                [str(find_redis_server()), *options], stdout=subprocess.DEVNULL
            )
        asyncio.run(self._wait_until_loaded())

    def fill(self, records: Path) -> None:
        """Writes the user records of a file."""
        asyncio.run(self._fill(records))

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Sends the signal and waits for the end, of a server that is stopped, too."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)
        self._process.wait(30)

    async def _fill(self, records: Path) -> None:
        store = open_store(self.url, StoreSettings())
        try:
            await load_records(records, store, ttl_s=None)
        finally:
            await store.aclose()

    async def _wait_until_loaded(self) -> None:
        store = open_store(self.url, StoreSettings())
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while True:
                try:
                    await store.ping()
                except StoreUnavailable:
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(0.02)
                else:
                    return
        finally:
            await store.aclose()


class ServiceProcess:
    """`ctr serve` on a free port, the same port after a restart."""

    def __init__(
        self,
        *,
        bundle: Path,
        items: Path | None,
        store_url: str,
        cpu: int | None = None,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            bundle: Directory, or a symbolic link to one.
            items: Item snapshot; None leaves every item unknown.
            store_url: Of the online store.
            cpu: Core that all its threads and workers are pinned to.
            workers: Number of worker processes.
            settings: More environment variables.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "service", "serve", "--bundle", str(bundle)]
        self._command += ["--port", str(self.port)]
        if items is not None:
            self._command += ["--items", str(items)]
        if workers != 1:
            self._command += ["--workers", str(workers)]
        self._environment = {
            **os.environ,
            "CTR_STORE__URL": store_url,
            "CTR_LOG_LEVEL": "error",
            **(settings or {}),
        }
        self._cpu = cpu
        self._process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0  # from the last start to readiness

    @property
    def pid(self) -> int:
        """Of the running service."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it and waits until it is ready.

        Raises:
            RuntimeError: It ended instead.
        """
        began_at = time.monotonic()
        with pinned(self._cpu):
            self._process = subprocess.Popen(
                self._command, env=self._environment, stderr=subprocess.DEVNULL
            )
        code = wait_until_ready(self.url, self._process)
        if code is not None:
            raise RuntimeError(f"the service ended with exit code {code}: {self._command}")
        self.ready_s = time.monotonic() - began_at

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for it to end by itself and returns the exit code."""
        assert self._process is not None
        return self._process.wait(30)

    def end(self) -> int:
        """Sends SIGTERM if it still runs, waits, and returns the exit code.

        Raises:
            subprocess.TimeoutExpired: It did not leave, and has been killed.
        """
        assert self._process is not None
        self._process.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


@contextmanager
def running_service(*, bundle: Path, items: Path | None, store_url: str) -> Iterator[str]:
    """Runs `ctr serve` on a free port until the block ends; yields its URL once it is ready."""
    with ServiceProcess(bundle=bundle, items=items, store_url=store_url) as service:
        yield service.url


def leave_on_sigterm() -> None:
    """Lets SIGTERM end this process as an exception does: what it has started is ended first."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, *, timeout_s: float = 20.0) -> None:
    """Returns once something listens on this loopback port.

    Raises:
        OSError: Nothing did in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
