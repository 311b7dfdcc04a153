"""What the store tests share: an opened store, polling, and a server that answers as told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis

from service.errors import StoreError
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.base import OnlineStore
from service.stores.redis import RedisStore

LIMIT_S = 20.0
# Busy machines stall for tens of milliseconds: only tests about time-outs set short ones.
PATIENT = {"timeout_ms": 5000, "connect_timeout_ms": 5000}


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[OnlineStore]:
    store = open_store(url, StoreSettings(**{**PATIENT, **settings}))
    try:
        yield store
    finally:
        await store.aclose()


async def until(is_true: Callable[[], Awaitable[bool]], *, limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not await is_true():  # noqa: ASYNC110 - another process gives no event
            await asyncio.sleep(0.005)


async def error_of(call: Awaitable[object]) -> type[StoreError] | None:
    try:
        await call
    except StoreError as exc:
        return type(exc)
    return None


def is_idle(store: OnlineStore) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        assert isinstance(store, RedisStore)
        return store.is_idle

    return check


class ScriptedServer:
    """Speaks enough of the protocol to answer GET the way a test wants."""

    def __init__(self, reply: Callable[[bytes], bytes]) -> None:
        self.reply = reply
        self.may_reply = asyncio.Event()
        self.may_reply.set()
        self.num_connections = 0
        self.num_gets = 0
        self.url = ""
        self._handlers: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.num_connections += 1
        parser = hiredis.Reader()
        commands: asyncio.Queue[list[bytes]] = asyncio.Queue()
        # Reads on while it does not reply, as a kernel would.
        replying = asyncio.create_task(self._reply(commands, writer))
        try:
            while data := await reader.read(65_536):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    self.num_gets += command[0] == b"GET"
                    commands.put_nowait(command)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            replying.cancel()
            writer.close()

    async def _reply(
        self, commands: "asyncio.Queue[list[bytes]]", writer: asyncio.StreamWriter
    ) -> None:
        while True:
            command = await commands.get()
            await self.may_reply.wait()
            writer.write(self.reply(command[1]) if command[0] == b"GET" else b"+OK\r\n")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedServer"]:
        listener = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            listener.close()
            for task in self._handlers:
                task.cancel()
            await asyncio.gather(*self._handlers, return_exceptions=True)
            await listener.wait_closed()


def echo(key: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(key), key)
