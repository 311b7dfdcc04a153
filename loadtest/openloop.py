"""The load generator's loop: sends each request at its scheduled time, whatever became of others.

Latency counts from the scheduled time, so a stall of the server is seen by every request that
should have left during it. One thread, raw HTTP/1.1 on epoll: timers of uvloop and of asyncio count
in milliseconds, and a generator that is late by that much measures itself. Measured at 500 timers a
second on a busy machine: uvloop 0.7 ms too early to 0.7 ms too late (p10, p90), asyncio 0.2 to
1.6 ms late, this loop 25 to 125 us. Linux only.
"""

import ctypes
import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# In place of an HTTP status, for a request without an answer:
REFUSED = 0  # no connection could be opened
BROKEN = 1  # the connection closed before the answer was whole
UNANSWERED = 2  # nothing came within GRACE_S of the last request

GRACE_S = 5.0
MAX_CONNECTIONS = 900  # below the 1,024 file descriptors that a process gets by default

_PR_SET_TIMERSLACK = 29
_RECEIVE_BYTES = 1 << 18
_MAX_EVENTS = 16  # then it is looked again whether a request is due
_CONNECT_TIMEOUT_S = 5.0
_DEGRADED, _DEGRADED_WITHIN = b'"degraded":["', 600


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send, and when.

    Attributes:
        host: Of the server.
        port: Of the server.
        requests: Different requests, as the bytes that go over the wire.
        order: int64 [n], the request to send n-th; a closed loop goes round in it.
        times: float64 [n], ascending seconds from the start; None for a closed loop.
        callers: Of a closed loop: each sends its next request when the last is answered.
        seconds: How long a closed loop goes on.
        connections: Opened before the start; more are opened when all are in use.
        keep_answers: Whether the answers' bodies are kept.
    """

    host: str
    port: int
    requests: list[bytes]
    order: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64] | None = None
    callers: int = 0
    seconds: float = 0.0
    connections: int = 64
    keep_answers: bool = False


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What became of each request, in the order of the plan; seconds from the start.

    Attributes:
        scheduled: float64 [n], when it should have left.
        late: float64 [n], how much later than that the generator turned to it.
        latency: float64 [n], from `scheduled` to the last byte of the answer.
        status: int64 [n], HTTP status, or REFUSED, BROKEN, UNANSWERED.
        degraded: bool [n], the answer says that it was made with defaults.
        started_at: CLOCK_MONOTONIC of second 0, the same clock in every process.
        cpu_share: CPU time of the generator by its wall time.
        answers: Bodies, empty unless they were to be kept.
    """

    scheduled: npt.NDArray[np.float64]
    late: npt.NDArray[np.float64]
    latency: npt.NDArray[np.float64]
    status: npt.NDArray[np.int64]
    degraded: npt.NDArray[np.bool_]
    started_at: float
    cpu_share: float
    answers: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scheduled)

    def between(self, begin: float, end: float) -> "Trace":
        """The requests scheduled in [begin, end); without answers."""
        chosen = (self.scheduled >= begin) & (self.scheduled < end)
        return Trace(
            scheduled=self.scheduled[chosen],
            late=self.late[chosen],
            latency=self.latency[chosen],
            status=self.status[chosen],
            degraded=self.degraded[chosen],
            started_at=self.started_at,
            cpu_share=self.cpu_share,
        )


def http_request(
    host: str, path: str, body: bytes, *, headers: tuple[tuple[str, str], ...] = ()
) -> bytes:
    """The bytes of one POST; `content-type: application/json` unless the headers say otherwise."""
    lines = {"host": host, "content-type": "application/json", **dict(headers)}
    lines["content-length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class _Connection:
    """One socket with at most one request under way."""

    __slots__ = ("head", "index", "is_open", "left", "outgoing", "socket")

    def __init__(self, sock: socket.socket, *, is_open: bool) -> None:
        self.socket = sock
        self.is_open = is_open
        self.index = -1  # of the request under way
        self.left = 0  # bytes of its answer that are still to come, once the head is there
        self.head = b""  # what has come while the head is not whole, or all if answers are kept
        self.outgoing = b""  # what the socket has not taken yet


class OpenLoop:
    """Runs one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._order: list[int] = plan.order.tolist()
        self._times: list[float] = [] if plan.times is None else plan.times.tolist()
        count = len(self._times)
        self._scheduled = list(self._times)
        self._late, self._latency = [0.0] * count, [0.0] * count
        self._status, self._degraded = [-1] * count, [False] * count
        self._answers: list[bytes] = [b""] * count if plan.keep_answers else []
        self._poll = select.epoll()
        self._by_fd: dict[int, _Connection] = {}
        # First in, first out: all connections, so all workers behind one port, take turns.
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[int] = deque()
        self._num_left = count
        self._start = 0.0

    def run(self, on_start: Callable[[float], None]) -> Trace:
        """Sends everything and waits for the answers; `on_start` is told `Trace.started_at`."""
        # The kernel wakes a sleeping thread up to 50 us late unless it is asked not to.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        for _ in range(max(self._plan.connections, self._plan.callers)):
            self._idle.append(self._connect_now())
        self._start = time.monotonic() + 0.02
        on_start(self._start)
        cpu_before = time.process_time()
        if self._plan.times is None:
            self._run_closed()
        else:
            self._run_open()
        wall = time.monotonic() - self._start
        cpu_share = (time.process_time() - cpu_before) / wall
        for connection in list(self._by_fd.values()):
            self._close(connection)
        self._poll.close()
        return self._trace(cpu_share)

    def _run_open(self) -> None:
        times, count = self._times, len(self._times)
        give_up = (times[-1] if times else 0.0) + GRACE_S
        position = 0
        while self._num_left:
            now = time.monotonic() - self._start
            while position < count and times[position] <= now:
                self._late[position] = now - times[position]
                self._begin(position)
                position += 1
                now = time.monotonic() - self._start
            due = times[position] if position < count else give_up
            if due <= now and position == count:
                break
            self._wait(due - now)
        self._give_up(time.monotonic() - self._start)

    def _run_closed(self) -> None:
        end = self._plan.seconds
        time.sleep(max(self._start - time.monotonic(), 0.0))
        for _ in range(self._plan.callers):
            self._begin_next()
        while self._num_left:
            now = time.monotonic() - self._start
            if now > end + GRACE_S:
                break
            self._wait(end + GRACE_S - now)
        self._give_up(time.monotonic() - self._start)

    def _begin_next(self) -> None:
        now = time.monotonic() - self._start
        if now >= self._plan.seconds:
            return
        self._scheduled.append(now)
        self._late.append(0.0)
        self._latency.append(0.0)
        self._status.append(-1)
        self._degraded.append(False)
        if self._plan.keep_answers:
            self._answers.append(b"")
        self._num_left += 1
        self._begin(len(self._scheduled) - 1)

    def _wait(self, seconds: float) -> None:
        # epoll counts in milliseconds; select on the epoll's own descriptor in microseconds.
        if seconds > 0:
            select.select((self._poll.fileno(),), (), (), seconds)
        for fd, event in self._poll.poll(0, _MAX_EVENTS):
            connection = self._by_fd.get(fd)
            if connection is None:
                continue
            if connection.outgoing and event & (select.EPOLLOUT | select.EPOLLERR):
                self._on_writable(connection)
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and fd in self._by_fd:
                self._on_readable(connection)

    def _begin(self, index: int) -> None:
        if self._idle:
            connection = self._idle.popleft()
        elif len(self._by_fd) < MAX_CONNECTIONS:
            opened = self._connect_later()
            if opened is None:
                self._finish(index, REFUSED, time.monotonic())
                return
            connection = opened
        else:
            self._waiting.append(index)
            return
        self._send(connection, index)

    def _send(self, connection: _Connection, index: int) -> None:
        request = self._plan.requests[self._order[index % len(self._order)]]
        connection.index, connection.left, connection.head = index, 0, b""
        if not connection.is_open:
            connection.outgoing = request
            return
        try:
            sent = connection.socket.send(request)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._fail(connection, BROKEN)
            return
        if sent < len(request):
            connection.outgoing = request[sent:]
            self._poll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _on_writable(self, connection: _Connection) -> None:
        if not connection.is_open:
            if connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(connection, REFUSED)
                return
            connection.is_open = True
        try:
            sent = connection.socket.send(connection.outgoing)
        except BlockingIOError:
            return
        except OSError:
            self._fail(connection, BROKEN)
            return
        connection.outgoing = connection.outgoing[sent:]
        if not connection.outgoing:
            self._poll.modify(connection.socket.fileno(), select.EPOLLIN)

    def _on_readable(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        index = connection.index
        if not data:
            self._fail(connection, BROKEN if connection.is_open else REFUSED)
            return
        if index < 0:  # Nothing was asked: a server that says good-bye in words.
            self._close(connection)
            return
        if connection.left:
            connection.left -= len(data)
            # Head and body may come apart; the flag stands in the body's first bytes.
            self._degraded[index] |= data.find(_DEGRADED, 0, _DEGRADED_WITHIN) >= 0
            if self._answers:
                self._answers[index] += data
        else:
            self._read_head(connection, connection.head + data)
        if connection.left == 0 and not connection.head:
            done_at = time.monotonic()
            self._release(connection)
            self._finish(index, -self._status[index], done_at)

    def _read_head(self, connection: _Connection, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            connection.head = data
            return
        connection.head = b""
        head = data[:end].lower()
        place = head.find(b"\r\ncontent-length:")
        if place < 0:
            raise ValueError(f"an answer without a content-length: {data[:200]!r}")
        length = int(head[place + 17 :].split(b"\r\n", 1)[0])
        connection.left = end + 4 + length - len(data)
        index = connection.index
        # Negative until the last byte is there.
        self._status[index] = -int(data[9:12])
        self._degraded[index] = data.find(_DEGRADED, end, end + _DEGRADED_WITHIN) > 0
        if b"\r\nconnection: close" in head:
            connection.is_open = False
        if self._answers:
            self._answers[index] = data[end + 4 :]

    def _finish(self, index: int, status: int, done_at: float) -> None:
        self._latency[index] = done_at - self._start - self._scheduled[index]
        self._status[index] = status
        self._num_left -= 1
        if self._plan.times is None:
            self._begin_next()

    def _release(self, connection: _Connection) -> None:
        connection.index = -1
        if not connection.is_open:
            self._close(connection)
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _fail(self, connection: _Connection, status: int) -> None:
        index = connection.index
        self._close(connection)
        if index >= 0:
            self._finish(index, status, time.monotonic())
        if self._waiting:
            self._begin(self._waiting.popleft())

    def _close(self, connection: _Connection) -> None:
        self._by_fd.pop(connection.socket.fileno(), None)
        if connection.index < 0 and connection in self._idle:
            self._idle.remove(connection)
        connection.socket.close()

    def _connect_now(self) -> _Connection:
        sock = socket.create_connection((self._plan.host, self._plan.port), _CONNECT_TIMEOUT_S)
        return self._register(sock, is_open=True)

    def _connect_later(self) -> _Connection | None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        code = sock.connect_ex((self._plan.host, self._plan.port))
        if code in (0, errno.EINPROGRESS):
            return self._register(sock, is_open=False)
        sock.close()
        return None

    def _register(self, sock: socket.socket, *, is_open: bool) -> _Connection:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, is_open=is_open)
        self._by_fd[sock.fileno()] = connection
        self._poll.register(
            sock.fileno(), select.EPOLLIN if is_open else select.EPOLLIN | select.EPOLLOUT
        )
        return connection

    def _give_up(self, now: float) -> None:
        for index, status in enumerate(self._status):
            if status < 0:
                self._status[index] = UNANSWERED
                self._latency[index] = now - self._scheduled[index]

    def _trace(self, cpu_share: float) -> Trace:
        return Trace(
            scheduled=np.array(self._scheduled, np.float64),
            late=np.array(self._late, np.float64),
            latency=np.array(self._latency, np.float64),
            status=np.array(self._status, np.int64),
            degraded=np.array(self._degraded, np.bool_),
            started_at=self._start,
            cpu_share=cpu_share,
            answers=self._answers,
        )
