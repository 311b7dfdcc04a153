"""The moment when the port is closed: whoever has come through it gets an answer."""

import asyncio
import gc
import json
import socket
from collections.abc import Callable, Coroutine, Iterator

import pytest
import tiny
import uvloop

from service.app import create_app
from service.listen import bind
from service.server import ScoringServer
from service.settings import Settings
from service.stores.memory import MemoryStore

NUM_CALLERS = 20
LIMIT_S = 20.0
BODY = json.dumps({"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, 2]}).encode()
REQUEST = (
    b"POST /score HTTP/1.1\r\nhost: service\r\ncontent-type: application/json\r\n"
    b"x-timeout-ms: 20000\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)

Scenario = Callable[[Settings, socket.socket], Coroutine[None, None, list[bytes]]]


@pytest.fixture(autouse=True)
def _thaw() -> Iterator[None]:
    yield
    gc.unfreeze()  # The server freezes what there is when it has started.


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as found:
        yield found


async def started(settings: Settings, listener: socket.socket) -> ScoringServer:
    app = create_app(settings, store=MemoryStore())
    server = ScoringServer(app, settings, announce=lambda url: None)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listener])
    return server


def connect(listener: socket.socket) -> socket.socket:
    """A connection that the kernel has made: the server need not have taken it."""
    return socket.create_connection(listener.getsockname(), LIMIT_S)


async def read_all(caller: socket.socket) -> bytes:
    reader, writer = await asyncio.open_connection(sock=caller)
    async with asyncio.timeout(LIMIT_S):
        try:
            return await reader.read()
        except ConnectionError as exc:
            return repr(exc).encode()
        finally:
            writer.close()


async def shut_down_with_callers_waiting(
    settings: Settings, listener: socket.socket
) -> list[bytes]:
    server = await started(settings, listener)
    address = listener.getsockname()
    callers = [connect(listener) for _ in range(NUM_CALLERS)]
    for caller in callers:
        caller.sendall(REQUEST)
    # The loop has had no turn since: they are all in the port's queue.
    server.handle_exit(15, None)
    await asyncio.sleep(0)
    closing = asyncio.create_task(server.shutdown([listener]))
    answers = await asyncio.gather(*(read_all(caller) for caller in callers))
    await closing
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, LIMIT_S)
    return answers


async def shut_down_with_requests_on_their_way(
    settings: Settings, listener: socket.socket
) -> list[bytes]:
    server = await started(settings, listener)
    callers = [connect(listener) for _ in range(NUM_CALLERS)]
    async with asyncio.timeout(LIMIT_S):
        while len(server.server_state.connections) < NUM_CALLERS:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.01)
    server.handle_exit(15, None)
    await asyncio.sleep(0.01)
    for caller in callers:
        caller.sendall(REQUEST)
    await server.shutdown([listener])
    return await asyncio.gather(*(read_all(caller) for caller in callers))


# With uvloop, as `ctr serve` does: asyncio's own server loses whom it is just accepting.
@pytest.mark.parametrize(
    "scenario", [shut_down_with_callers_waiting, shut_down_with_requests_on_their_way]
)
def test_callers_who_came_before_the_port_was_closed_are_answered(
    settings: Settings,
    listener: socket.socket,
    scenario: Scenario,
) -> None:
    answers = uvloop.run(scenario(settings, listener))

    assert [answer.partition(b"\r\n")[0] for answer in answers] == [
        b"HTTP/1.1 200 OK"
    ] * NUM_CALLERS
    assert all(b"connection: close" in answer.lower() for answer in answers)
