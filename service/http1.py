"""uvicorn's httptools protocol, made to know when a request arrived, and to refuse it cheaply.

It also ignores offers to upgrade, as HTTP lets a server do: Java's client and `curl --http2` offer
h2c with their first request. httptools then stops parsing and the request's body is lost; without
the offer it is an ordinary HTTP/1.1 request.
"""

import asyncio
import random
import re
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import ARRIVED_AT, refusal_answer, request_id_of
from service.gate import Gate

_OFFER = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*", re.IGNORECASE)
# tcpi_last_data_recv of Linux's `struct tcp_info`: milliseconds since the last data came.
_SINCE_DATA = struct.Struct("<52xI")
_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)


class Http1Protocol(HttpToolsProtocol):
    """Takes a request to the gate as soon as its head is read.

    One that is refused gets its answer here: without a task, a scope's way through the app and a
    parsed body a refusal costs a third. One that is let in learns from its state, as `ARRIVED_AT`,
    when its bytes reached the machine: a busy event loop reads them late.
    """

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:  # Any: uvicorn's arguments
        """Takes uvicorn's arguments and whom to ask."""
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._socket: socket.socket | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Called by the event loop."""
        super().connection_made(transport)
        if _TCP_INFO is not None:
            self._socket = transport.get_extra_info("socket")

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what arrived."""
        if b"pgrade" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _OFFER.sub(b"", head) + end + rest
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self.url == b"/score" and self._can_refuse():
            arrived_at = time.monotonic() - self._waited_s()
            error = self._gate.refuse_early(self.headers, arrived_at=arrived_at)
            if error is not None:
                self._is_refused = True
                request_id = request_id_of(self.headers) or f"{random.getrandbits(128):032x}"
                self.transport.write(refusal_answer(error, request_id=request_id))
                return
            self.scope["state"][ARRIVED_AT] = arrived_at
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each part of a body; that of a refused request is ignored."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser at a request's end."""
        if not self._is_refused:
            super().on_message_complete()
            return
        self._is_refused = False
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _can_refuse(self) -> bool:
        # Anything out of the ordinary goes the long way: an earlier request without an answer yet,
        # a body to be asked for, a connection to be closed.
        return (
            (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.expect_100_continue
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
        )

    def _waited_s(self) -> float:
        # The kernel knows to a few milliseconds when it got the data, and nobody else does: the
        # loop cannot tell a socket that has been ready for long from one that is ready just now.
        if self._socket is not None and _TCP_INFO is not None:
            with suppress(OSError, struct.error):  # a Unix socket, or another system
                info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SINCE_DATA.size)
                milliseconds: int = _SINCE_DATA.unpack(info)[0]
                return milliseconds / 1000
        return 0.0
