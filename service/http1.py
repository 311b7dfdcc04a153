"""uvicorn's httptools protocol, made to say when a request arrived, and to ignore upgrades.

Java's client and `curl --http2` offer h2c with their first request. httptools then stops parsing
and the request's body is lost; without the offer it is an ordinary HTTP/1.1 request.
"""

import asyncio
import re
import socket
import struct
import time
from contextlib import suppress

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import ARRIVED_AT

_OFFER = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*", re.IGNORECASE)


# tcpi_last_data_recv of Linux's `struct tcp_info`: milliseconds since the last data came.
_SINCE_DATA = struct.Struct("<52xI")
_TCP_INFO = getattr(socket, "TCP_INFO", None)


class Http1Protocol(HttpToolsProtocol):
    """Takes the offer out of a request's head before it is parsed.

    Puts into the request's state, as `ARRIVED_AT`, when its bytes reached the machine, in
    `time.monotonic`. A busy event loop reads them late, and a deadline counts from before that.
    """

    _socket: socket.socket | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
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

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        self.scope["state"][ARRIVED_AT] = time.monotonic() - self._waited_s()

    def _waited_s(self) -> float:
        # The kernel knows to a few milliseconds when it got the data, and nobody else does: the
        # loop cannot tell a socket that has been ready for long from one that is ready just now.
        if self._socket is not None and _TCP_INFO is not None:
            with suppress(OSError, struct.error):  # a Unix socket, or another system
                info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SINCE_DATA.size)
                milliseconds: int = _SINCE_DATA.unpack(info)[0]
                return milliseconds / 1000
        return 0.0
