"""One of several worker processes: the service on a socket of its own, beside its siblings.

The supervisor starts it, as `python -m service.worker INDEX NUM_RESTARTS CHANNEL_FD DIRECTORY` with
its settings in the environment.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from service.app import create_app
from service.cli import run_and_exit
from service.item_files import ItemFiles
from service.log_lines import configure_logging
from service.observe import Metrics
from service.server import run_server
from service.settings import load_settings
from service.worker_metrics import WorkerMetrics

_BEAT_S = 1.0  # many times in the supervisor's limit
_READY, _ALIVE = b"r", b"a"


def serve(*, index: int, num_restarts: int, channel: socket.socket, directory: Path) -> int:
    """Serves until a signal, or until the supervisor is gone; returns the exit code.

    Args:
        index: Number of this worker, from 0.
        num_restarts: How often a worker of this number has been started again.
        channel: Told when this worker is ready, and from then on that its event loop turns; its end
            says that the supervisor is gone.
        directory: Shared by the workers, for item tables and metrics.
    """
    settings = load_settings()
    configure_logging(settings.log_level)

    def leave() -> None:
        asyncio.get_running_loop().remove_reader(channel)
        os.kill(os.getpid(), signal.SIGTERM)

    def say(what: bytes) -> None:
        # If the supervisor stands still, nobody needs to hear it; if it is gone, `leave` is due.
        with contextlib.suppress(OSError):
            channel.send(what)
        asyncio.get_running_loop().call_later(_BEAT_S, say, _ALIVE)

    def announce(url: str) -> None:
        del url
        channel.setblocking(False)
        say(_READY)
        asyncio.get_running_loop().add_reader(channel, leave)

    def share(metrics: Metrics) -> WorkerMetrics:
        return WorkerMetrics(
            metrics,
            worker=index,
            num_workers=settings.workers,
            num_restarts=num_restarts,
            directory=directory,
        )

    app = create_app(
        settings,
        open_items=ItemFiles(directory, log_level=settings.log_level),
        share_metrics=share,
    )
    return run_server(app, settings, announce=announce, is_shared=True)


def main() -> None:
    """Takes the supervisor's arguments."""
    index, num_restarts, channel_fd = map(int, sys.argv[1:4])
    with socket.socket(fileno=channel_fd) as channel:
        code = serve(
            index=index,
            num_restarts=num_restarts,
            channel=channel,
            directory=Path(sys.argv[4]),
        )
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit(main)
