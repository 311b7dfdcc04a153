"""The protocol on real sockets, before an app that says what it was given."""

import asyncio
import functools
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
from service.api import ARRIVED_AT
from service.gate import Gate
from service.http1 import Http1Protocol
from service.observe import Metrics
from service.settings import LimitSettings

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0


class Rig:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.admission = Admission()
        self.model_wait_s = 0.0
        self.gate = Gate(
            self.admission,
            model_wait_s=lambda: self.model_wait_s,
            metrics=Metrics(self.registry),
            limits=LimitSettings(timeout_ms=100, body_limit_bytes=2000),
        )
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.port = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
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


@asynccontextmanager
async def serving() -> AsyncIterator[Rig]:
    rig = Rig()
    config = uvicorn.Config(
        rig.app, interface="asgi3", lifespan="off", ws="none", log_config=None, proxy_headers=False
    )
    config.load()
    make: Any = functools.partial(
        Http1Protocol,
        gate=rig.gate,
        config=config,
        server_state=ServerState(),
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


async def test_request_in_time_reaches_the_app_with_its_arrival() -> None:
    async with serving() as rig, connected(rig) as connection:
        before = asyncio.get_running_loop().time()
        connection.send(post(b'{"a": 1}'))
        status, _, _ = await connection.answer()

        assert status == 200
        assert rig.bodies == [b'{"a": 1}']
        # The kernel tells it in ticks of some milliseconds.
        arrived_at = rig.scopes[0]["state"][ARRIVED_AT]
        assert before - 0.02 <= arrived_at <= asyncio.get_running_loop().time()


async def test_refused_request_never_reaches_the_app() -> None:
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

        assert len(first["x-request-id"]) == 32
        assert first["x-request-id"] != second["x-request-id"]


async def test_connection_serves_on_after_a_refusal() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(post(b"one"))
        assert (await connection.answer())[0] == 503
        rig.model_wait_s = 0.0
        connection.send(post(b"two"))
        assert (await connection.answer())[0] == 200
        assert rig.bodies == [b"two"]


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
        assert rig.bodies == [b"two"]


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
        assert (await connection.answer())[0] == 200


async def test_request_behind_another_waits_for_its_answer() -> None:
    async with serving() as rig, connected(rig) as connection:
        connection.send(post(b"one") + post(b"two"))
        assert (await connection.answer())[0] == 200
        assert (await connection.answer())[0] == 200
        assert rig.bodies == [b"one", b"two"]
        assert ARRIVED_AT not in rig.scopes[1]["state"]


async def test_refused_requests_in_one_packet_are_each_answered() -> None:
    async with serving() as rig, connected(rig) as connection:
        rig.model_wait_s = 1.0
        connection.send(post(b"one") + post(b"two"))
        assert (await connection.answer())[0] == 503
        assert (await connection.answer())[0] == 503
        assert rig.bodies == []


async def test_requests_read_in_one_turn_count_before_they_begin() -> None:
    async with serving() as rig:
        # Each is a millisecond of the loop at first: of 200 at once, about 66 fit into 100 ms.
        refused = 0
        for _ in range(200):
            error = rig.gate.refuse_early([], arrived_at=asyncio.get_running_loop().time())
            refused += error is not None
        assert 100 < refused < 180
        await asyncio.sleep(0)
        assert not rig.admission.has_announced


async def test_offer_to_upgrade_is_ignored() -> None:
    async with serving() as rig, connected(rig) as connection:
        offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n"
        connection.send(post(b"body", extra=offer))
        assert (await connection.answer())[0] == 200
        assert rig.bodies == [b"body"]
