"""Waits for a service that runs as a process of its own."""

import subprocess
import time

import httpx

START_TIMEOUT_S = 120.0
_INTERVAL_S = 0.1


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> int | None:
    """Polls /readyz until it answers 200; returns the exit code if the process ends before.

    Raises:
        TimeoutError: Neither came about within START_TIMEOUT_S.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            return code
        try:
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                return None
        except httpx.TransportError:
            pass
        time.sleep(_INTERVAL_S)
    raise TimeoutError(f"the service was not ready after {START_TIMEOUT_S:.0f} s")
