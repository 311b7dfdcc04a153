"""`ctr serve` as a process, with the Redis server it starts itself, up to its last signal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest
import tiny

from model.contract.record import pack_record

pytestmark = [pytest.mark.process, pytest.mark.redis]

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
H2C_OFFER = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAM"}
BODY = {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, "2", 99]}


class Served:
    """A running `ctr serve`: its process, its URL, what it wrote to stderr."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._is_ready = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._is_ready.wait(LIMIT_S), "".join(self.lines)
        assert self.url, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.match(r"ctr serve: (?:ready|listening), POST (http://\S+)/score", line)
            if found:
                self.url = found[1]
                self._is_ready.set()
        self._is_ready.set()

    def wait(self, limit_s: float = LIMIT_S) -> int:
        code = self.process.wait(limit_s)
        self._reader.join(LIMIT_S)
        return code

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


PROGRAM = "from service.cli import main; main()"


def command(*arguments: object, program: str = PROGRAM) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def environment(tmp_path: Path, **settings: object) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CTR_STORE__DATA_DIR": str(tmp_path / "redis"),
        **{name: str(value) for name, value in settings.items()},
    }


@contextmanager
def serving(
    tmp_path: Path,
    tiny_bundle: Path,
    tiny_items: Path,
    program: str = PROGRAM,
    **settings: object,
) -> Iterator[Served]:
    arguments = ("serve", "--bundle", tiny_bundle, "--items", tiny_items, "--port", 0)
    process = subprocess.Popen(
        command(*arguments, program=program),
        env=environment(tmp_path, **settings),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


def load_records(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    records = [pack_record(tiny.record())]
    pl.DataFrame({"user_id": ["7"], "record": records}).write_parquet(path)
    done = subprocess.run(
        command("load-records", path),
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "1 user records written\n"), done.stderr


def test_records_loaded_before_are_served_until_sigterm(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    load_records(tmp_path)

    with serving(tmp_path, tiny_bundle, tiny_items, CTR_DRAIN_DELAY_MS=0) as served:
        children = psutil.Process(served.process.pid).children()
        answer = httpx.post(f"{served.url}/score", json=BODY).json()
        offering = httpx.post(f"{served.url}/score", json=BODY, headers=H2C_OFFER)
        ready = httpx.get(f"{served.url}/readyz").json()
        served.process.send_signal(signal.SIGTERM)
        code = served.wait()

    assert [child.name() for child in children if child.is_running()] == []
    assert len(children) == 1
    assert code == 0
    assert ready == {"status": "ready", "bundle": tiny_bundle.name}
    assert offering.status_code == 200
    assert offering.json()["items"] == answer["items"]
    assert answer["user_status"] == "ok"
    assert answer["degraded"] == []
    assert [item["status"] for item in answer["items"]] == ["ok", "ok", "unknown_item"]
    logged = [line for line in served.lines if not line.startswith("ctr serve: ready")]
    assert all(json.loads(line)["level"] in ("info", "warning") for line in logged)
    assert sum("SIGTERM: draining" in line for line in logged) == 1


def test_score_without_server_agrees_with_the_service(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    load_records(tmp_path)
    options = ["--bundle", tiny_bundle, "--items", tiny_items, "--json"]
    done = subprocess.run(
        command("score", *options, "--record", tmp_path / "records.parquet"),
        env=environment(tmp_path),
        cwd=tmp_path,
        input=json.dumps(BODY),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )

    with serving(tmp_path, tiny_bundle, tiny_items) as served:
        answer = httpx.post(f"{served.url}/score", json=BODY).json()

    assert json.loads(done.stdout)["items"] == answer["items"]


def test_readiness_fails_first_and_nothing_is_dropped(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    outcomes: list[int | str] = []
    is_over = threading.Event()

    def post_for_ever(url: str) -> None:
        # As behind a load balancer: new requests come until readiness has been seen to fail.
        with httpx.Client(base_url=url) as client:
            while not is_over.is_set():
                try:
                    outcomes.append(client.post("/score", json=BODY).status_code)
                except httpx.HTTPError as exc:
                    outcomes.append(repr(exc))

    with serving(tmp_path, tiny_bundle, tiny_items, CTR_DRAIN_DELAY_MS=2000) as served:
        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(post_for_ever, served.url) for _ in range(4)]
            wait_until(lambda: len(outcomes) > 50)
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{served.url}/readyz").status_code == 503)
            num_before = len(outcomes)
            wait_until(lambda: len(outcomes) > num_before + 50)
            is_over.set()
            for worker in workers:
                worker.result(LIMIT_S)
        assert served.process.poll() is None
        code = served.wait()

    assert set(outcomes) == {200}
    assert code == 0


def test_request_under_way_is_finished_after_the_listener_is_gone(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    content = json.dumps({**BODY, "timeout_ms": 20_000}).encode()
    head = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    settings: dict[str, Any] = {
        "CTR_DRAIN_DELAY_MS": 0,
        "CTR_DRAIN_TIMEOUT_MS": 30_000,
        "CTR_LIMITS__MAX_TIMEOUT_MS": 30_000,
    }
    with (
        serving(tmp_path, tiny_bundle, tiny_items, **settings) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT_S) as connection,
    ):
        connection.sendall(head + content[:10])
        # An answer on another connection says that the first bytes have been read by now.
        assert httpx.get(f"{served.url}/readyz").status_code == 200
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(served.port))
        connection.sendall(content[10:])
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        code = served.wait()

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b'"user_status"' in answer
    assert code == 0


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_second_signal_ends_it_at_once(tmp_path: Path, tiny_bundle: Path, tiny_items: Path) -> None:
    with serving(tmp_path, tiny_bundle, tiny_items, CTR_DRAIN_DELAY_MS=600_000) as served:
        children = psutil.Process(served.process.pid).children()
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{served.url}/readyz").status_code == 503)
        served.process.send_signal(signal.SIGINT)
        code = served.wait()

    assert code == 128 + signal.SIGINT
    assert [child.name() for child in children if child.is_running()] == []


def test_damaged_snapshot_ends_with_3_and_one_line(tmp_path: Path, tiny_bundle: Path) -> None:
    path = tmp_path / "items.parquet"
    path.write_bytes(b"no parquet")

    done = subprocess.run(
        command("serve", "--bundle", tiny_bundle, "--items", path, "--port", 0),
        env=environment(tmp_path, CTR_LOG_LEVEL="error"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"ctr: item snapshot {path}: ")
    assert done.stderr.count("\n") == 1
