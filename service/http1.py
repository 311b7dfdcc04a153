"""uvicorn's httptools protocol, made to answer scoring requests itself.

A request of `POST /score` is refused, or answered, below ASGI: without a scope, an exchange of
messages and their checks it costs half as much to read and to answer. What is out of the ordinary
takes uvicorn's way to the app, which answers the same.

It also ignores offers to upgrade, as HTTP lets a server do: Java's client and `curl --http2` offer
h2c with their first request. httptools then stops parsing and the request's body is lost; without
the offer it is an ordinary HTTP/1.1 request.
"""

import asyncio
import logging
import re
import socket
import struct
import time
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.answers import CLOSE, Answer, http1_bytes, problem_answer, request_id_of
from service.api import ARRIVED_AT
from service.errors import Overloaded
from service.exchange import Scoring
from service.gate import Head

_log = logging.getLogger(__name__)

_OFFER = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*", re.IGNORECASE)
# tcpi_last_data_recv of Linux's `struct tcp_info`: milliseconds since the last data came.
_SINCE_DATA = struct.Struct("<52xI")
_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
# A body that takes longer to come is waited for by the app, whose patience has limits.
_BODY_WAIT_S = 0.1


class _Cycle:
    """What uvicorn asks of, and tells, an exchange under way."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    # uvicorn wakes who waits for a message of ASGI; here nobody does.
    message_event = asyncio.Event()

    def __init__(self) -> None:
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False


class Http1Protocol(HttpToolsProtocol):
    """Takes a scoring request to the gate as soon as its head is read, and answers it.

    When its bytes reached the machine is asked of the kernel: a busy event loop reads them late.
    """

    def __init__(self, *args: Any, scoring: Scoring, **kwargs: Any) -> None:  # Any: uvicorn's
        """Takes uvicorn's arguments and what to answer with."""
        super().__init__(*args, **kwargs)
        self._scoring = scoring
        self._socket: socket.socket | None = None
        self._is_refused = False
        # Of a request whose body is not complete yet.
        self._head: Head | None = None
        self._chunks: list[bytes] = []
        self._body_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """Called by the event loop."""
        super().connection_made(transport)
        if _TCP_INFO is not None:
            self._socket = transport.get_extra_info("socket")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if self._head is not None:
            self._leave_to_app()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what arrived."""
        if b"pgrade" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _OFFER.sub(b"", head) + end + rest
        super().data_received(data)
        if self._head is not None and self._body_timer is None:
            self._body_timer = self.loop.call_later(_BODY_WAIT_S, self._leave_to_app)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self.url == b"/score" and self._is_ordinary():
            arrived_at = time.monotonic() - self._waited_s()
            try:
                head = self._scoring.gate.admit_early(self.headers, arrived_at=arrived_at)
            except Overloaded as exc:
                self._is_refused = True
                self._send(problem_answer(exc, request_id=self._request_id()))
                return
            if head is not None and head.body_bytes:
                self._head = head
                return
            self.scope["state"][ARRIVED_AT] = arrived_at
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each part of a body; that of a refused request is ignored."""
        if self._head is not None:
            self._chunks.append(body)
        elif not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser at a request's end."""
        if self._head is not None:
            head, data = self._take_request()
            cycle = _Cycle()
            self.cycle = cast(RequestResponseCycle, cycle)
            task = self.loop.create_task(self._answer(cycle, head, data, self._request_id()))
            task.add_done_callback(self._answered)
            self.tasks.add(task)
        elif self._is_refused:
            self._is_refused = False
            # Not before the body is there: the answer could be lost with what is left unread.
            if self._scoring.status.is_draining:
                self.transport.close()
            self.on_response_complete()
        else:
            super().on_message_complete()

    def shutdown(self) -> None:
        """Called by the server: what has been asked is answered, then the connection closes."""
        if self._head is not None:
            self._leave_to_app()
        super().shutdown()

    async def _answer(self, cycle: _Cycle, head: Head, data: bytes, request_id: str) -> None:
        answer = await self._scoring.exchange.answer(head, data, request_id=request_id)
        if self.flow.write_paused:
            await self.flow.drain()
        cycle.response_complete = True
        if not cycle.disconnected and self._send(answer, is_last=not cycle.keep_alive):
            self.transport.close()
        self.on_response_complete()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an answer could not be sent", exc_info=error)
            self.transport.close()

    def _send(self, answer: Answer, *, is_last: bool = False) -> bool:
        # Returns whether the connection is to be closed.
        is_last |= self._scoring.status.is_draining or CLOSE in answer.headers
        headers = self.server_state.default_headers
        self.transport.write(http1_bytes(answer, default_headers=headers, is_last=is_last))
        return is_last

    def _leave_to_app(self) -> None:
        """Goes uvicorn's way from here on, with what of the body has come."""
        assert self._head is not None
        self.scope["state"][ARRIVED_AT] = self._head.arrived_at
        _, data = self._take_request()
        super().on_headers_complete()
        if data:
            super().on_body(data)

    def _take_request(self) -> tuple[Head, bytes]:
        assert self._head is not None
        head, self._head = self._head, None
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        return head, data

    def _request_id(self) -> str:
        return request_id_of(self.headers) or self._scoring.new_id()

    def _is_ordinary(self) -> bool:
        # Not if an earlier request has no answer yet, a body is to be asked for, or the connection
        # is to be closed.
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
            try:
                info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SINCE_DATA.size)
                milliseconds: int = _SINCE_DATA.unpack(info)[0]
            except (OSError, struct.error):  # a Unix socket, or another system
                return 0.0
            return milliseconds / 1000
        return 0.0
