"""A headless Chromium, told what to do through a pipe (the DevTools protocol, no websocket)."""

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60.0
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # Root in a container may not make one; it only ever sees this service.
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    # Whatever asks for another host finds none, so that a test never leaves the machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


def require_chromium() -> str:
    """Path of the program; skips the test without one, which in CI is a failure."""
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is not None:
        return found
    pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")


class Tab:
    """One page of the browser; keeps every event that it was told."""

    def __init__(self, process: "subprocess.Popen[bytes]", to_it: int, from_it: int) -> None:
        self._process = process
        self._to_it, self._from_it = to_it, from_it
        self._selector = selectors.DefaultSelector()
        self._selector.register(from_it, selectors.EVENT_READ)
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its result; events that come before are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_it, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == self._last_id:
                assert "error" not in told, (method, told["error"])
                result: dict[str, Any] = told["result"]
                return result
            self.events.append(told)

    def _receive(self) -> dict[str, Any]:
        limit = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            assert self._selector.select(max(0.0, limit - time.monotonic())), "Chromium is silent"
            data = os.read(self._from_it, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, awaited if it is a promise."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The first value of an expression that is true."""
        limit = time.monotonic() + LIMIT_S
        while not (value := self.value(expression)):
            assert time.monotonic() < limit, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)
        return value

    def told(self, method: str) -> list[dict[str, Any]]:
        """Parameters of all events of one kind until now."""
        self.value("0")
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[Any]:
        """Errors, exceptions and violations of the policy that the browser noted."""
        logged = [event["entry"] for event in self.told("Log.entryAdded")]
        said = self.told("Runtime.consoleAPICalled")
        return [
            *(entry for entry in logged if entry["level"] in ("error", "warning")),
            *(call for call in said if call["type"] in ("error", "warning", "assert")),
            *self.told("Runtime.exceptionThrown"),
        ]

    def requested(self) -> list[str]:
        """Addresses of all requests, data: among them."""
        return [event["request"]["url"] for event in self.told("Network.requestWillBeSent")]

    def bodies(self, url: str) -> list[str]:
        """What each finished request for an address was answered, in order."""
        finished = {event["requestId"] for event in self.told("Network.loadingFinished")}
        asked = [
            event["requestId"]
            for event in self.told("Network.requestWillBeSent")
            if event["request"]["url"] == url and event["requestId"] in finished
        ]
        return [self.call("Network.getResponseBody", requestId=id_)["body"] for id_ in asked]

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))


@contextmanager
def open_tab(program: str, directory: Path) -> Iterator[Tab]:
    """Starts a browser that keeps its files in a directory; it has ended on leaving."""
    its_input, to_it = os.pipe()
    from_it, its_output = os.pipe()
    # It reads commands from descriptor 3 and answers on 4.
    script = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, *_OPTIONS, f"--user-data-dir={directory}", "about:blank"],
        pass_fds=(its_input, its_output),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Tab(process, to_it, from_it)
    finally:
        os.close(to_it)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(from_it)
