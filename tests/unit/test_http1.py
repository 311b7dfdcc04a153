"""The protocol on real sockets, before an exchange and an app that keep what they were given."""

import asyncio
import functools
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service.admission import Admission
from service.answers import JSON, Answer
from service.api import ARRIVED_AT
from service.errors import Overloaded
from service.exchange import ScoreExchange, Scoring
from service.gate import Gate, Head
from service.http1 import Http1Protocol
from service.observe import Metrics
from service.settings import LimitSettings
from service.status import ServiceStatus

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0


class Echo(ScoreExchange):
    """Answers `scored`, at once or when it is let."""

    def __init__(self, status: ServiceStatus, *, limits: LimitSettings, gate: Gate) -> None:
        super().__init__(status, limits=limits, gate=gate)
        self.heads: list[Head] = []
        self.bodies: list[bytes] = []
        self.was_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.error: Exception | None = None

    async def answer(self, head: Head, data: bytes | bytearray, *, request_id: str) -> Answer:
        self.heads.append(head)
        self.bodies.append(bytes(data))
        self.was_asked.set()
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return Answer(200, b"scored", JSON, request_id)


class Rig:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.admission = Admission()
        self.model_wait_s = 0.0
        limits = LimitSettings(timeout_ms=100, body_limit_bytes=2000)
        metrics = Metrics(self.registry)
        self.gate = Gate(
            self.admission, model_wait_s=lambda: self.model_wait_s, metrics=metrics, limits=limits
        )
        self.status = ServiceStatus(metrics)
        self.exchange = Echo(self.status, limits=limits, gate=self.gate)
        self.server_state = ServerState()
        # Of the app, that is: not answered by the protocol.
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.was_left = asyncio.Event()
        self.port = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.was_left.set()
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.scopes.append(scope)
        self.bodies.append(body)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    def count(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(LIMIT_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers, body

    async def is_closed(self) -> bool:
        async with asyncio.timeout(LIMIT_S):
            return await self._reader.read(1) == b""


@asynccontextmanager
async def serving() -> AsyncIterator[Rig]:
    rig = Rig()
    config = uvicorn.Config(
        rig.app, interface="asgi3", lifespan="off", ws="none", log_config=None, proxy_headers=False
    )
    config.load()
    new_ids = (f"new-{number}" for number in itertools.count())
    make: Any = functools.partial(
        Http1Protocol,
        scoring=Scoring(
            exchange=rig.exchange,
            gate=rig.gate,
            status=rig.status,
            new_id=lambda: next(new_ids),
        ),
        config=config,
        server_state=rig.server_state,
        app_state={},
    )
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    rig.port = server.sockets[0].getsockname()[1]
    async with server:
        yield rig


@asynccontextmanager
async def connected(rig: Rig) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


def post(body: bytes = b"{}", *, path: str = "/score", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


async def test_request_in_time_is_answered_below_asgi() -> None:
    async with serving() as rig, connected(rig) as connection:
        before = asyncio.get_running_loop().time()
        connection.send(post(b'{"a": 1}', extra="x-request-id: mine\r\nx-timeout-ms: 70\r\n"))
        status, headers, body = await connection.answer()

        assert (status, body) == (200, b"scored")
        assert headers == {
            "content-type": "application/json",
            "content-length": "6",
            "x-request-id": "mine",
        }
        assert rig.exchange.bodies == [b'{"a": 1}']
        (head,) = rig.exchange.heads
        assert head.timeout_ms == 70
        # The kernel tells it in ticks of some milliseconds.
        assert before - 0.02 <= head.arrived_at <= asyncio.get_running_loop().time()
        assert rig.scopes == []


async def test_body_in_parts_is_answered_whole() -> None:
    async with serving() as rig, connected(rig) as connection:
        whole = post(b"a" * 1000 + b"b" * 500)
        for part in (whole[:-1200], whole[-1200:-300], whole[-300:]):
            connection.send(part)
            await asyncio.sleep(0.01)
        assert (await connection.answer())[2] == b"scored"
        assert rig.exchange.bodies == [b"a" * 1000 + b"b" * 500]


async def test_body_that_is_long_in_coming_is_waited_for_by_the_app() -> None:
    async with serving() as rig, connected(rig) as connection:
        before = asyncio.get_running_loop().time()
        connection.send(post(b"0123456789")[:-7])
        await asyncio.sleep(0.2)
        connection.send(b"3456789")
        assert (await connection.answer())[2] == b"ok"
        assert rig.bodies == [b"0123456789"]
        assert rig.exchange.bodies == []
        # The gate has let it in: the app is not to ask again.
        assert before - 0.02 <= rig.scopes[0]["state"][ARRIVED_AT] <= before + 0.1


async def test_caller_that_leaves_within_its_body_is_told_to_the_app() -> None:
    async with serving() as rig:
        async with connected(rig) as connection:
            connection.send(post(b"0123456789")[:-7])
            await asyncio.sleep(0.01)
        async with asyncio.timeout(LIMIT_S):
            await rig.was_left.wait()
        assert rig.exchange.bodies == []


async def test_caller_that_leaves_before_its_answer_disturbs_nobody() -> None:
    async with serving() as rig:
        rig.exchange.may_answer.clear()
        async with connected(rig) as connection:
            connection.send(post(b"one"))
            await rig.exchange.was_asked.wait()
        rig.exchange.may_answer.set()
        async with connected(rig) as connection:
            connection.send(post(b"two"))
            assert (await connection.answer())[2] == b"scored"
        assert rig.exchange.bodies == [b"one", b"two"]


async def test_answer_that_fails_closes_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.exchange.error = ZeroDivisionError("a bug")
        connection.send(post(b"one"))
        assert await connection.is_closed()
        assert "an answer could not be sent" in caplog.text


async def test_shut_down_answers_what_it_was_asked_and_closes() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.exchange.may_answer.clear()
        connection.send(post(b"one"))
        await rig.exchange.was_asked.wait()
        (protocol,) = rig.server_state.connections
        protocol.shutdown()
        rig.exchange.may_answer.set()
        _, headers, body = await connection.answer()
        assert body == b"scored"
        assert headers["connection"] == "close"
        assert await connection.is_closed()


async def test_while_draining_an_answer_closes_the_connection() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.status.begin_drain()
        connection.send(post(b"one"))
        _, headers, body = await connection.answer()
        assert body == b"scored"
        assert headers["connection"] == "close"
        assert await connection.is_closed()


async def test_while_draining_a_refusal_closes_after_its_body() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.status.begin_drain()
        rig.model_wait_s = 1.0
        whole = post(b"a" * 1000)
        connection.send(whole[:-1000])
        status, headers, _ = await connection.answer()
        assert status == 503
        assert headers["connection"] == "close"
        # A connection closed with something unread is reset, which can cost the answer.
        connection.send(whole[-1000:])
        assert await connection.is_closed()


async def test_refused_request_reaches_nobody() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 3.2
        connection.send(post(extra="x-request-id: mine\r\n"))
        status, headers, body = await connection.answer()

        assert status == 503
        assert headers["retry-after"] == "4"
        assert headers["content-type"] == "application/problem+json"
        assert headers["x-request-id"] == "mine"
        problem = json.loads(body)
        assert problem["code"] == "overloaded"
        assert problem["request_id"] == "mine"
        assert rig.exchange.bodies == []
        assert rig.scopes == []
        assert rig.count("scoring_batch_drops_total", reason="backlog") == 1
        assert rig.count("scoring_request_seconds_count", outcome="overloaded") == 1


async def test_refused_request_without_an_id_is_given_one() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(post())
        _, first, _ = await connection.answer()
        connection.send(post())
        _, second, _ = await connection.answer()

        assert (first["x-request-id"], second["x-request-id"]) == ("new-0", "new-1")


async def test_connection_serves_on_after_a_refusal() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(post(b"one"))
        assert (await connection.answer())[0] == 503
        rig.model_wait_s = 0.0
        connection.send(post(b"two"))
        assert (await connection.answer())[0] == 200
        assert rig.exchange.bodies == [b"two"]


async def test_body_that_comes_after_its_refusal_is_ignored() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        whole = post(b"a" * 1000)
        connection.send(whole[:-1000])
        assert (await connection.answer())[0] == 503
        rig.model_wait_s = 0.0
        connection.send(whole[-1000:-300])
        await asyncio.sleep(0)
        connection.send(whole[-300:] + post(b"two"))
        assert (await connection.answer())[0] == 200
        assert rig.exchange.bodies == [b"two"]


async def test_time_out_in_the_head_is_what_the_wait_is_compared_with() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 0.15
        for header, expected in (("", 503), ("x-timeout-ms: 1500\r\n", 200)):
            connection.send(post(extra=header))
            assert (await connection.answer())[0] == expected


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(path="/other"),
        b"GET /score HTTP/1.1\r\nhost: x\r\n\r\n",
        post(b"a" * 3000),
        post(extra="x-timeout-ms: soon\r\n"),
        post(extra="connection: close\r\n"),
        b"POST /score HTTP/1.0\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=["path", "method", "too long", "no number", "close", "http/1.0"],
)
async def test_what_is_out_of_the_ordinary_is_left_to_the_app(request_bytes: bytes) -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(request_bytes)
        status, _, body = await connection.answer()
        assert (status, body) == (200, b"ok")


async def test_request_behind_another_waits_for_its_answer() -> None:
    async with serving() as rig, connected(rig) as connection:
        connection.send(post(b"one") + post(b"two"))
        assert (await connection.answer())[2] == b"scored"
        assert (await connection.answer())[2] == b"ok"
        assert (rig.exchange.bodies, rig.bodies) == ([b"one"], [b"two"])
        assert ARRIVED_AT not in rig.scopes[0]["state"]


async def test_refused_requests_in_one_packet_are_each_answered() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(post(b"one") + post(b"two"))
        assert (await connection.answer())[0] == 503
        assert (await connection.answer())[0] == 503
        assert (rig.exchange.bodies, rig.bodies) == ([], [])


async def test_requests_read_in_one_turn_count_before_they_begin() -> None:
    async with serving() as rig:
        # Each is a millisecond of the loop at first: of 200 at once, about 66 fit into 100 ms.
        refused = 0
        for _ in range(200):
            try:
                rig.gate.admit_early([], arrived_at=asyncio.get_running_loop().time())
            except Overloaded:
                refused += 1
        assert 100 < refused < 180
        await asyncio.sleep(0)
        assert not rig.admission.has_announced


async def test_offer_to_upgrade_is_ignored() -> None:
    async with serving() as rig, connected(rig) as connection:
        offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n"
        connection.send(post(b"body", extra=offer))
        assert (await connection.answer())[0] == 200
        assert rig.exchange.bodies == [b"body"]
