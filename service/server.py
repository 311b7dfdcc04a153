"""The HTTP server process: listens, announces itself, and leaves without dropping a request."""

import asyncio
import contextlib
import functools
import gc
import importlib.util
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI

from service.listen import bind, listening_url
from service.settings import Settings
from service.status import ServiceStatus

_log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # longer than the usual 60 s of a load balancer, which then closes first
_FORCED_CLOSE_S = 1.0
_LAST_REQUESTS_S = 0.1  # for requests that are on their way when the port is closed


class ScoringServer(uvicorn.Server):
    """Serves one app until a signal.

    The first SIGTERM or SIGINT fails readiness; after `drain_delay_ms`, during which requests are
    still answered, it stops listening and finishes what it has within `drain_timeout_ms`. A second
    signal ends it at once. SIGHUP loads bundle and items again. Errors
    of the app's lifespan leave `run` as they are.
    """

    def __init__(
        self, app: FastAPI, settings: Settings, *, announce: Callable[[str], None]
    ) -> None:
        """Prepares the server; `run` opens everything.

        Args:
            app: Made by `create_app`.
            settings: Address and drain times.
            announce: Called with the server's URL once it answers.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(app),
                loop="uvloop" if _is_installed("uvloop") else "asyncio",
                ws="none",
                lifespan="off",  # entered here, so that its errors reach the command line
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout_ms / 1000),
            )
        )
        self._app = app
        self._announce = announce
        self._drain_delay_s = settings.drain_delay_ms / 1000
        self._leave_at: float | None = None
        self._forced_by: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lifespan_stack = AsyncExitStack()
        status: ServiceStatus = app.state.status
        status.metrics.connections_counted(lambda: len(self.server_state.connections))

    @property
    def exit_code(self) -> int:
        """0 after a drain, 128 + signal if a second one cut it short."""
        return 0 if self._forced_by is None else 128 + self._forced_by

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the app, then listens."""
        self._loop = asyncio.get_running_loop()
        lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan_stack.enter_async_context(lifespan)
        try:
            await super().startup(sockets)
        except BaseException:
            await self._lifespan_stack.aclose()
            raise
        self._loop.add_signal_handler(signal.SIGHUP, self._app.state.reload)
        # What was built until now lives as long as the process: no need to look at it again.
        gc.collect()
        gc.freeze()
        if sockets:
            self._announce(listening_url(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes the requests under way, then closes the app."""
        await self._stop_listening(sockets or [])
        await super().shutdown(sockets)
        try:
            async with asyncio.timeout(_FORCED_CLOSE_S if self.force_exit else None):
                await self._lifespan_stack.aclose()
        except TimeoutError:
            _log.warning("closed by force")

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Closes the port, and drops no caller who has come through it already.

        The kernel has made connections that the loop has not taken yet; closing the port would
        reset them. And a connection that has just been taken has a request that was not read yet.
        """
        kept = [listener.dup() for listener in sockets]
        for server in self.servers:
            server.close()
        waiting: list[socket.socket] = []
        for listener in kept:
            with listener, contextlib.suppress(BlockingIOError):
                listener.setblocking(False)
                while True:
                    waiting.append(listener.accept()[0])
        loop = asyncio.get_running_loop()
        for connection in waiting:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._make_protocol, connection)
        if not self.force_exit:
            await asyncio.sleep(_LAST_REQUESTS_S)

    def _make_protocol(self) -> asyncio.Protocol:
        make = self.config.http_protocol_class
        return make(  # type: ignore[call-arg]  # uvicorn's own protocols and ours take these
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """Ends the main loop once the drain delay is over."""
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal, between any two instructions: so no lock is taken here."""
        del frame
        if self._leave_at is not None:
            self._forced_by = sig
            self.should_exit = self.force_exit = True
            return
        self._leave_at = time.monotonic() + self._drain_delay_s
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        _log.info("%s: draining", signal.Signals(sig).name)
        status: ServiceStatus = self._app.state.status
        status.begin_drain()


def run_server(
    app: FastAPI, settings: Settings, *, announce: Callable[[str], None], is_shared: bool = False
) -> int:
    """Serves until a signal and returns the process's exit code.

    Args:
        app: See `ScoringServer`.
        settings: See there.
        announce: See there.
        is_shared: Whether other processes listen at the same address.

    Raises:
        SettingsError: The address cannot be listened on.
    """
    # Bound before the bundle is loaded, so that a taken port is reported at once.
    listener = bind(settings.host, settings.port, is_shared=is_shared)
    # Until the app can load anything again, the signal is not to end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = ScoringServer(app, settings, announce=announce)
        server.run(sockets=[listener])
    finally:
        listener.close()
    return server.exit_code


def http_protocol(app: FastAPI) -> "type[asyncio.Protocol] | Literal['h11']":
    """What uvicorn is to speak HTTP with: ours, if httptools is there."""
    if not _is_installed("httptools"):
        return "h11"
    from service.http1 import Http1Protocol

    # uvicorn only ever calls it.
    return functools.partial(Http1Protocol, scoring=app.state.scoring)  # type: ignore[return-value]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
