"""`ctr serve --workers N` as processes: one port, one /metrics, one end; and memory over swaps."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import polars as pl
import psutil
import pytest
from test_serve_process import (
    BODY,
    LIMIT_S,
    Served,
    command,
    environment,
    is_refused,
    serving,
    wait_until,
)

pytestmark = pytest.mark.process

CANDIDATES = "scoring_candidates_total"
SWAPS = 'scoring_swaps_total{part="bundle"}'
QUIET = {"CTR_STORE__URL": "memory://", "CTR_RELOAD_POLL_S": 0, "CTR_DRAIN_DELAY_MS": 0}


@contextmanager
def two_workers(tmp_path: Path, bundle: Path, items: Path) -> Iterator[Served]:
    with serving(tmp_path, bundle, items, CTR_WORKERS=2, **QUIET) as process:
        yield process
        process.process.terminate()
        process.wait()  # Workers, too, have its stderr.


@pytest.fixture
def served(tmp_path: Path, tiny_bundle: Path, tiny_items: Path) -> Iterator[Served]:
    with two_workers(tmp_path, tiny_bundle, tiny_items) as process:
        yield process


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, tiny_items: Path) -> Path:
    """The snapshot of `shared`, which a test may replace."""
    return Path(shutil.copy(tiny_items, tmp_path_factory.mktemp("snapshot")))


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, snapshot: Path
) -> Iterator[Served]:
    """For tests that leave it with two workers, whatever they have counted."""
    with two_workers(tmp_path_factory.mktemp("workers"), tiny_bundle, snapshot) as process:
        yield process


SHORT_PATIENCE_S = 3.0
SHORT_PATIENCE = f"""
from service import supervisor
from service.cli import main
supervisor._SILENCE_LIMIT_S = {SHORT_PATIENCE_S}
main()
"""


@contextmanager
def impatiently_serving(tmp_path: Path, bundle: Path, items: Path) -> Iterator[Served]:
    settings = {**QUIET, "CTR_WORKERS": 2, "CTR_DRAIN_TIMEOUT_MS": 0}
    with serving(tmp_path, bundle, items, program=SHORT_PATIENCE, **settings) as process:
        yield process
        process.process.terminate()
        process.wait()  # Workers, too, have its stderr.


@pytest.fixture(scope="module")
def impatient(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, tiny_items: Path
) -> Iterator[Served]:
    """For tests that leave it with two workers."""
    directory = tmp_path_factory.mktemp("impatient")
    with impatiently_serving(directory, tiny_bundle, tiny_items) as process:
        yield process


def workers(served: Served) -> list[psutil.Process]:
    found = psutil.Process(served.process.pid).children()
    return [child for child in found if "service.worker" in child.cmdline()]


def score_on_new_connections(served: Served, times: int) -> None:
    for _ in range(times):
        body = {**BODY, "timeout_ms": 2000}
        assert httpx.post(f"{served.url}/score", json=body).status_code == 200


def metric(served: Served, series: str) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.M)
    assert found is not None, series
    return float(found[1])


def listening_pids(port: int) -> set[int | None]:
    return {
        connection.pid
        for connection in psutil.net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


def test_each_worker_listens_and_any_tells_all(shared: Served) -> None:
    before = metric(shared, CANDIDATES)
    score_on_new_connections(shared, 20)
    told = {metric(shared, CANDIDATES) for _ in range(8)}

    pids = {worker.pid for worker in workers(shared)}
    assert len(pids) == 2
    assert listening_pids(shared.port) == pids
    assert told == {before + 60}


def test_killed_worker_is_started_again_and_counters_go_on(shared: Served) -> None:
    score_on_new_connections(shared, 10)
    before = metric(shared, CANDIDATES)
    pids = {worker.pid for worker in workers(shared)}
    workers(shared)[0].kill()
    told: list[float] = []

    def is_back() -> bool:
        try:
            told.append(metric(shared, CANDIDATES))
            return metric(shared, "scoring_worker_restarts_total") == 1
        except httpx.TransportError:
            return False  # Connections that the kernel had given to the killed one.

    wait_until(is_back)
    score_on_new_connections(shared, 10)

    assert set(told) == {before}
    assert metric(shared, CANDIDATES) == before + 30
    assert len({worker.pid for worker in workers(shared)} & pids) == 1


def test_worker_that_stands_still_is_replaced(impatient: Served) -> None:
    still, other = workers(impatient)
    still.suspend()
    wait_until(lambda: not still.is_running())
    wait_until(lambda: len(listening_pids(impatient.port)) == 2)
    score_on_new_connections(impatient, 10)

    pids = {worker.pid for worker in workers(impatient)}
    assert other.pid in pids
    assert len(pids) == 2
    assert sum("not been heard of" in line for line in impatient.lines) == 1


def test_workers_of_a_service_that_stood_still_as_a_whole_live_on(impatient: Served) -> None:
    everybody = [psutil.Process(impatient.process.pid), *workers(impatient)]
    pids = {worker.pid for worker in workers(impatient)}
    for process in everybody:
        process.suspend()
    time.sleep(SHORT_PATIENCE_S + 1.0)  # This is what is tested.
    for process in everybody:
        process.resume()
    time.sleep(0.5)  # Several looks.
    score_on_new_connections(impatient, 4)

    assert {worker.pid for worker in workers(impatient)} == pids


def test_sigterm_ends_a_worker_that_stands_still(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    with impatiently_serving(tmp_path, tiny_bundle, tiny_items) as served:
        still, _ = workers(served)
        still.suspend()
        served.process.terminate()
        code = served.wait()

        assert code == 128 + signal.SIGKILL
        assert not still.is_running()


def test_sighup_gives_all_workers_the_new_items(shared: Served, snapshot: Path) -> None:
    before = metric(shared, SWAPS)
    pl.DataFrame({"item_id": [1, 2, 3, 4, 5]}).write_parquet(snapshot)
    shared.process.send_signal(signal.SIGHUP)

    def rows() -> list[float]:
        return [metric(shared, f'scoring_item_table_rows{{worker="{w}"}}') for w in (0, 1)]

    # A worker that has also looked at the file by itself has swapped twice.
    wait_until(lambda: metric(shared, SWAPS) >= before + 2 and rows() == [5, 5])


def test_sigterm_drains_all_workers(served: Served) -> None:
    children = workers(served)
    served.process.send_signal(signal.SIGTERM)

    assert served.wait() == 0
    assert [child for child in children if child.is_running()] == []
    assert sum("SIGTERM: draining" in line for line in served.lines) == 2


def test_workers_leave_if_their_supervisor_is_killed(served: Served) -> None:
    children = workers(served)
    served.process.kill()

    wait_until(lambda: not any(child.is_running() for child in children))
    assert is_refused(served.port)


def run(tmp_path: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command("serve", "--workers", 3, *arguments),
        env=environment(tmp_path, CTR_LOG_LEVEL="error", **QUIET),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_bundle_that_cannot_be_served_is_told_once(tmp_path: Path, tiny_bundle: Path) -> None:
    done = run(tmp_path, "--bundle", tmp_path / "absent", "--port", 0)

    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no bundle at" in done.stderr


@pytest.mark.parametrize("is_shared", [False, True])
def test_taken_port_is_told_once(tmp_path: Path, tiny_bundle: Path, is_shared: bool) -> None:
    with socket.socket() as taken:
        if is_shared:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(tmp_path, "--bundle", tiny_bundle, "--port", port)

    assert done.returncode == 2
    assert done.stderr == (
        f"ctr: CTR_HOST, CTR_PORT: cannot listen on 127.0.0.1:{port}: {os.strerror(98)}\n"
    )


def test_memory_is_flat_over_50_swaps(tmp_path: Path, tiny_bundle: Path, tiny_items: Path) -> None:
    with serving(tmp_path, tiny_bundle, tiny_items, **QUIET) as served:
        process = psutil.Process(served.process.pid)
        sizes = []
        for number in range(1, 61):
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda wanted=number: metric(served, SWAPS) == wanted)
            sizes.append(process.memory_info().rss)
        num_threads = process.num_threads()

    assert sizes[-1] - sizes[9] < 20 << 20
    assert num_threads < 16


def test_workers_that_wait_for_a_bundle_all_serve_it_once_it_is_there(
    tmp_path: Path, tiny_bundle: Path, tiny_items: Path
) -> None:
    link, items = tmp_path / "current", tmp_path / "items.parquet"
    late = QUIET | {"CTR_WAIT_FOR_BUNDLE": True, "CTR_RELOAD_POLL_S": 0.1, "CTR_WORKERS": 2}
    with serving(tmp_path, link, items, **late) as served:
        alive = httpx.get(f"{served.url}/healthz").status_code
        before = httpx.get(f"{served.url}/readyz").status_code
        shutil.copy(tiny_items, tmp_path / "part")
        (tmp_path / "part").rename(items)
        link.symlink_to(tiny_bundle)
        ready = [f'scoring_ready{{worker="{worker}"}}' for worker in (0, 1)]
        wait_until(lambda: [metric(served, series) for series in ready] == [1, 1])
        score_on_new_connections(served, 4)
        served.process.terminate()
        code = served.wait()

    assert (alive, before) == (200, 503)
    assert code == 0
