"""A real service and a real Redis, as processes, for measurements and fault injection."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import StoreUnavailable
from service.readiness import START_TIMEOUT_S, wait_until_ready
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.embedded import find_redis_server


class RedisProcess:
    """A redis-server on one loopback port, with persistence, to be stopped, killed and started."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
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
        self._process = subprocess.Popen(
            [str(find_redis_server()), *options], stdout=subprocess.DEVNULL
        )
        asyncio.run(self._wait_until_loaded())

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Sends the signal and waits for the end."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(30)

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


@contextmanager
def running_service(
    *, bundle: Path, items: Path | None, store_url: str, cpu: int | None = None
) -> Iterator[str]:
    """Runs `ctr serve` on a free port until the block ends; yields its URL once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "service", "serve", "--bundle", str(bundle)]
    command += ["--port", str(port)]
    if items is not None:
        command += ["--items", str(items)]
    environment = {**os.environ, "CTR_STORE__URL": store_url, "CTR_LOG_LEVEL": "error"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        if cpu is not None:
            os.sched_setaffinity(process.pid, {cpu})
        url = f"http://127.0.0.1:{port}"
        code = wait_until_ready(url, process)
        if code is not None:
            raise RuntimeError(f"the service ended with exit code {code}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
