"""Keeps several worker processes that listen on one port, each on a socket of its own.

Scores nothing, and starts no thread. A worker that ends is started again, later and later if it
keeps ending; one whose event loop has stood still for half a minute is killed first. The port stays
taken meanwhile. Workers leave by themselves should this process go.
"""

import logging
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from service.listen import listening_url, reserve_port
from service.settings import Settings, environment_of

_log = logging.getLogger(__name__)

_TICK_S = 0.1
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0  # after which an end is a first one again
_READY = b"r"
_MAX_BYTES = 64  # of what a worker has said since the last look
# A worker's event loop says something every second, whatever the load.
_SILENCE_LIMIT_S = 30.0
# A look that comes later than this was kept from coming, and the workers may have been, too: a
# container that was paused does not come back to workers that are all killed.
_LONGEST_TICK_S = 1.0
_TO_WORKERS = (signal.SIGTERM, signal.SIGINT)


@dataclass(slots=True)
class _Worker:
    index: int
    process: "subprocess.Popen[bytes] | None" = None
    # Says when the worker is ready, and then that it lives; its end tells it to leave.
    channel: socket.socket | None = None
    is_ready: bool = False
    silent_s: float = 0.0
    started_at: float = 0.0
    num_restarts: int = 0
    num_failures: int = 0
    start_at: float = 0.0


class Supervisor:
    """Runs the workers of one service until a signal."""

    def __init__(
        self, settings: Settings, *, directory: Path, announce: Callable[[str], None]
    ) -> None:
        """Starts nothing yet.

        Args:
            settings: With a store's URL; `workers` says how many.
            directory: For what workers share; short, since unix sockets lie in it.
            announce: Called with the service's URL once every worker answers.
        """
        self._settings = settings
        self._directory = directory
        self._announce = announce
        self._workers = [_Worker(index) for index in range(settings.workers)]
        self._selector = selectors.DefaultSelector()
        self._ticked_at = time.monotonic()
        self._is_leaving = False

    def run(self) -> int:
        """Returns the exit code: 0 after a drain, else that of a worker.

        A worker that cannot start the first time ends the service: it has said why on stderr. The
        first one is alone until it is ready, so that this is said once.

        Raises:
            SettingsError: The address cannot be listened on.
        """
        with reserve_port(self._settings.host, self._settings.port) as placeholder:
            port = placeholder.getsockname()[1]
            self._settings = self._settings.model_copy(update={"port": port})
            handlers = {s: signal.signal(s, self._pass_on) for s in (*_TO_WORKERS, signal.SIGHUP)}
            try:
                if self._bring_up(self._workers[:1]) and self._bring_up(self._workers):
                    self._announce(listening_url(placeholder))
                    while not self._is_leaving:
                        self._tick()
                        self._end_silent()
                        self._revive()
                return self._wait_for_all()
            finally:
                for worker in self._workers:
                    if worker.process is not None and worker.process.poll() is None:
                        worker.process.kill()
                        worker.process.wait()
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _bring_up(self, workers: list[_Worker]) -> bool:
        for worker in workers:
            if worker.process is None:
                self._start(worker)
        while not self._is_leaving and not all(worker.is_ready for worker in workers):
            self._tick()
            if any(w.process is not None and w.process.poll() is not None for w in self._workers):
                self._leave(signal.SIGTERM)
        return not self._is_leaving

    def _start(self, worker: _Worker) -> None:
        ours, theirs = socket.socketpair()
        command = [
            *(sys.executable, "-m", "service.worker"),
            *(str(worker.index), str(worker.num_restarts), str(theirs.fileno())),
            str(self._directory),
        ]
        with theirs:
            worker.process = subprocess.Popen(
                command,
                env=environment_of(self._settings),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C goes to the whole group of the terminal; a worker is to get it once.
                start_new_session=True,
            )
        worker.channel, worker.is_ready, worker.started_at = ours, False, time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ, worker)
        if self._is_leaving:  # The signal came before the process was known.
            worker.process.terminate()

    def _tick(self) -> None:
        heard = self._selector.select(_TICK_S)
        now = time.monotonic()
        passed_s, self._ticked_at = min(_LONGEST_TICK_S, now - self._ticked_at), now
        for worker in self._workers:
            worker.silent_s += passed_s
        for key, _ in heard:
            worker = key.data
            said = b"" if worker.channel is None else _said(worker.channel)
            if not said:
                self._hang_up(worker)
                continue
            worker.silent_s = 0.0
            worker.is_ready = worker.is_ready or _READY in said

    def _end_silent(self) -> None:
        for worker in self._workers:
            if worker.is_ready and worker.silent_s > _SILENCE_LIMIT_S:
                assert worker.process is not None  # It is ready.
                _log.error(
                    "worker %d has not been heard of for %.0f s, it is killed",
                    worker.index,
                    worker.silent_s,
                )
                worker.process.kill()
                self._hang_up(worker)

    def _hang_up(self, worker: _Worker) -> None:
        worker.is_ready = False
        if worker.channel is not None:
            self._selector.unregister(worker.channel)
            worker.channel.close()
            worker.channel = None

    def _revive(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is not None and worker.process.poll() is not None:
                self._hang_up(worker)
                is_steady = now - worker.started_at >= _STEADY_S
                worker.num_failures = 1 if is_steady else worker.num_failures + 1
                pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (worker.num_failures - 1))
                worker.start_at = now + pause_s
                _log.error(
                    "worker %d ended with status %d, started again in %.1f s",
                    worker.index,
                    worker.process.returncode,
                    pause_s,
                )
                worker.process = None
            elif worker.process is None and now >= worker.start_at:
                worker.num_restarts += 1
                self._start(worker)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        # Called between any two instructions: so no lock is taken here.
        del frame
        if number in _TO_WORKERS:
            self._leave(number)
            return
        for worker in self._workers:
            if worker.is_ready and worker.process is not None:
                worker.process.send_signal(number)

    def _leave(self, number: int) -> None:
        self._is_leaving = True
        for worker in self._workers:
            if worker.process is not None:
                worker.process.send_signal(number)

    def _wait_for_all(self) -> int:
        # Requests under way, and then the batches, each get the drain's time.
        drain_ms = self._settings.drain_delay_ms + 2 * self._settings.drain_timeout_ms
        leave_by = time.monotonic() + drain_ms / 1000 + _SILENCE_LIMIT_S
        codes = []
        for worker in self._workers:
            if worker.process is not None:
                code = _wait_until(leave_by, worker.process)
                codes.append(code if code >= 0 else 128 - code)
        # The worker that could not start comes before those that had to leave because of it.
        return next(
            (code for code in codes if code not in (0, 128 + signal.SIGTERM)), max(codes, default=0)
        )


def _wait_until(time_limit: float, process: "subprocess.Popen[bytes]") -> int:
    """Exit code of a process, which is killed if it does not end by the time."""
    try:
        return process.wait(max(0.0, time_limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        _log.error("process %d does not leave, it is killed", process.pid)
        process.kill()
        return process.wait()


def _said(channel: socket.socket) -> bytes:
    """What the worker has said, nothing if it is gone."""
    try:
        return channel.recv(_MAX_BYTES)
    except ConnectionError:
        return b""
