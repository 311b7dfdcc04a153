"""A real service and a real Redis, as processes, for measurements and fault injection."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0


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
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the service was not ready in time")
