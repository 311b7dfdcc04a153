"""The load generator against real servers on loopback, good and bad ones."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest

from loadtest.generator import GeneratorError, generate
from loadtest.openloop import BROKEN, REFUSED, OpenLoop, Plan, Trace, http_request
from loadtest.procs import cpu_seconds, proportional_bytes, resident_bytes, tree
from loadtest.rig import free_port, wait_for_port
from loadtest.schedule import arrival_times, steps

REQUEST = http_request("localhost", "/score", b'{"n":1}')


@pytest.fixture
def null_server() -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "loadtest.nullserver", str(port)])
    try:
        wait_for_port(port)
        yield port, process
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def _talking(parts: list[bytes], *, close: bool = False) -> Iterator[int]:
    """A server that answers each request with these pieces, one send each."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def talk(connection: socket.socket) -> None:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while connection.recv(65536):
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(0.002)
                    if close:
                        return

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])


def _run(port: int, count: int = 5, **options: object) -> Trace:
    plan = Plan(
        host="127.0.0.1",
        port=port,
        requests=[REQUEST],
        order=np.zeros(count, np.int64),
        times=np.arange(count, dtype=np.float64) * 0.005,
        connections=1,
        **options,  # type: ignore[arg-type]  # fields of Plan
    )
    return OpenLoop(plan).run(lambda _: None)


def test_poisson_schedule_is_seeded_and_keeps_its_rate() -> None:
    one, again = (arrival_times(500.0, 20.0, rng=np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, again)
    assert len(one) == pytest.approx(10_000, rel=0.05)
    assert (np.diff(one) > 0).all()
    assert one[-1] < 20.0


def test_bursts_come_in_clumps_at_the_same_rate() -> None:
    rng = np.random.default_rng(1)
    gaps = np.diff(arrival_times(500.0, 60.0, rng=rng, arrivals="gamma"))
    assert gaps.mean() == pytest.approx(1 / 500, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.1)


def test_steps_follow_one_another() -> None:
    times = steps([100.0, 1000.0], 10.0, rng=np.random.default_rng(1))
    assert (times < 10.0).sum() == pytest.approx(1000, rel=0.15)
    assert ((times >= 10.0) & (times < 20.0)).sum() == pytest.approx(10_000, rel=0.05)


def test_every_request_is_answered_and_kept_in_order() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with _talking([answer]) as port:
        trace = _run(port, keep_answers=True)
    assert trace.status.tolist() == [200] * 5
    assert trace.answers == [b"{}"] * 5
    assert (trace.latency > 0).all()


def test_degraded_flag_is_seen_when_head_and_body_come_apart() -> None:
    body = b'{"request_id":"1","degraded":["user_features"]}'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    with _talking([head, body]) as port:
        apart = _run(port)
    with _talking([head[:10], head[10:] + body]) as port:
        together = _run(port)
    assert apart.degraded.all()
    assert together.degraded.all()


def test_a_connection_that_closes_before_the_answer_is_cut_off() -> None:
    with _talking([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"], close=True) as port:
        trace = _run(port)
    assert trace.status.tolist() == [BROKEN] * 5


def test_a_connection_that_asks_to_be_closed_is_not_used_again() -> None:
    answer = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nConnection: close\r\n\r\n"
    with _talking([answer], close=True) as port:
        trace = _run(port)
    assert trace.status.tolist() == [503] * 5


def test_latency_counts_from_the_scheduled_time_while_the_server_stands_still(
    null_server: tuple[int, "subprocess.Popen[bytes]"],
) -> None:
    port, process = null_server
    times = np.arange(0.0, 1.2, 0.01)
    plan = Plan(
        host="127.0.0.1", port=port, requests=[REQUEST], order=np.zeros(1, np.int64), times=times
    )
    trace = generate(
        plan,
        actions=[
            (0.3, lambda: process.send_signal(signal.SIGSTOP)),
            (0.9, lambda: process.send_signal(signal.SIGCONT)),
        ],
    )
    assert (trace.status == 200).all()
    # Whoever should have left early in the stall waited for its end, though the server saw all of
    # them at once; a closed loop would have sent one.
    stalled = (times > 0.4) & (times < 0.6)
    assert (trace.latency[stalled] > 0.25).all()


def test_a_server_that_dies_leaves_no_request_without_a_fate(
    null_server: tuple[int, "subprocess.Popen[bytes]"],
) -> None:
    port, process = null_server
    plan = Plan(
        host="127.0.0.1",
        port=port,
        requests=[REQUEST],
        order=np.zeros(1, np.int64),
        times=np.arange(0.0, 0.8, 0.005),
    )
    trace = generate(plan, actions=[(0.4, process.kill)])
    assert set(trace.status.tolist()) <= {200, BROKEN, REFUSED}
    assert trace.status[0] == 200
    assert trace.status[-1] == REFUSED


def test_closed_loop_goes_on_for_its_time_with_one_request_per_caller(
    null_server: tuple[int, "subprocess.Popen[bytes]"],
) -> None:
    port, _ = null_server
    plan = Plan(
        host="127.0.0.1",
        port=port,
        requests=[REQUEST],
        order=np.zeros(1, np.int64),
        callers=3,
        seconds=0.4,
    )
    trace = generate(plan)
    begun = np.sort(trace.scheduled)
    ended = np.sort(trace.scheduled + trace.latency)
    assert (trace.status == 200).all()
    assert trace.scheduled.max() < 0.4
    # At most three at a time: the fourth begins no sooner than the first ends.
    assert (begun[3:] >= ended[:-3]).all()


def test_no_server_at_all_is_an_error() -> None:
    plan = Plan(
        host="127.0.0.1",
        port=free_port(),
        requests=[REQUEST],
        order=np.zeros(1, np.int64),
        times=np.zeros(1),
    )
    with pytest.raises(GeneratorError, match="exit code 1"):
        generate(plan)


def test_cpu_and_memory_of_a_tree_count_its_children() -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'input()'])\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        _until(lambda: len(tree(process.pid)) == 2)
        child = next(pid for pid in tree(process.pid) if pid != process.pid)
        _until(lambda: resident_bytes(child) > 1 << 20)
        assert resident_bytes(process.pid) > resident_bytes(child)
        # Two interpreters share most of their code.
        assert 0 < proportional_bytes(process.pid) < resident_bytes(process.pid)
        _until(lambda: cpu_seconds(process.pid) > 0.0)
    finally:
        process.communicate(b"\n", timeout=10)
    assert tree(process.pid) == [process.pid]
    assert resident_bytes(process.pid) == 0


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
