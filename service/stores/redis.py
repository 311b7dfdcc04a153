"""Online store in one Redis server (not a Cluster); the only module that knows redis-py.

redis-py opens connections (TLS, password, database) and writes records in bulk. Look-ups go over
one such connection by a protocol of our own, `Pipe`: a third of the cost, and concurrent ones share
round trips. Whoever waits may be cancelled or run out of time; its reply is then dropped when it
comes. Cancelling a command inside redis-py could leave its reply on the connection for the next
caller to read (redis-py issue 2624).
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Self, cast

import hiredis
import redis.asyncio
import redis.asyncio.connection
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import (
    RecordCorrupt,
    StoreError,
    StoreMisconfigured,
    StoreTimeout,
    StoreUnavailable,
)
from service.stores.base import check_ttl
from service.stores.breaker import CircuitBreaker, Permit
from service.stores.pipe import Pipe
from service.stores.redis_errors import reply_error, translate

if TYPE_CHECKING:
    from service.settings import StoreSettings

_log = logging.getLogger(__name__)

# One pipeline of set_many. Its replies are waited for together, off the request path, and a
# server that is writing its append-only file may take far longer than a request would wait.
_PIPELINE_RECORDS = 500
_PIPELINE_BYTES = 1 << 20
_PIPELINE_TIMEOUT_S = 2.0

_URL_OPTIONS = frozenset({"db", "host", "port", "path", "username", "password"})


class _Lookup:
    """One GET under way: the caller's future, and the breaker's permit."""

    __slots__ = ("_is_extended", "_store", "deadline", "future", "permit", "sent_at")

    def __init__(
        self, store: "RedisStore", permit: Permit, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._store = store
        self._is_extended = False
        self.permit = permit
        self.deadline = deadline
        self.sent_at = 0.0
        self.future: asyncio.Future[bytes | None] = loop.create_future()

    def reply(self, value: object) -> None:
        """See `Command`."""
        self._store._free_slot()
        error = reply_error(value) if isinstance(value, hiredis.ReplyError) else None
        if error is None or isinstance(error, RecordCorrupt):
            self.permit.succeed()  # An answer about one key says nothing against the server.
        else:
            self.permit.fail()
        if self.future.done():
            return
        if error is None:
            self.future.set_result(cast("bytes | None", value))
        else:
            self.future.set_exception(error)

    def lose(self, error: Exception, *, was_proven: bool) -> None:
        """See `Command`."""
        self._store._free_slot()
        if self.future.done():
            self.permit.release()
        elif was_proven and not isinstance(error, TimeoutError) and not self._store.is_closed:
            self.future.set_exception(_IdleLossError())
        else:
            self.permit.fail()
            self.future.set_exception(translate(error))

    def expire(self, now: float) -> float | None:
        """See `Command`."""
        if self.future.done():
            return None
        # If this process was late itself (garbage collection, a long callback), what it was late
        # is not the store's fault: one pause would fail all look-ups under way at once and open
        # the breaker.
        if not self._is_extended and now > self.deadline:
            self._is_extended = True
            return now + min(now - self.deadline, self._store.timeout_s)
        self.permit.fail()
        self.future.set_exception(
            StoreTimeout(f"redis: no reply within {self._store.timeout_s * 1000:.0f} ms")
        )
        return None


class _IdleLossError(Exception):
    """A connection that had been of use was closed: worth one more try."""


class RedisStore:
    """User records as plain string values under `key_prefix` + user id.

    Look-ups share one connection, which is opened by the first. While the server does not answer,
    a circuit breaker refuses `get` without asking it, and lets one probe through per open period.
    For one event loop; the owner calls `aclose`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        max_connections: int,
        key_prefix: str,
        breaker: CircuitBreaker,
    ) -> None:
        """Prepares the clients; connects at the first call.

        Args:
            url: `redis://`, `rediss://` or `unix://`, with user, password and database if needed.
            timeout_s: Most seconds one `get` takes, waiting for a connection included.
            connect_timeout_s: Most seconds for opening a connection; may be longer than
                `timeout_s`, as the connection is then there for the next call.
            max_connections: Most look-ups under way at once; further ones wait.
            key_prefix: Put before every user id.
            breaker: Used by `get` only.

        Raises:
            StoreMisconfigured: The URL cannot be understood or sets something else.
        """
        self.timeout_s = timeout_s
        # A command outlives its caller's time-out by this, so that a late reply or a slow
        # handshake ends in a usable connection and not in another reconnect.
        self._command_timeout_s = timeout_s + connect_timeout_s
        self._key_prefix = key_prefix.encode()
        self._breaker = breaker
        self._num_slots = self._num_free = max_connections
        self._drained: asyncio.Future[None] | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._pipe: Pipe | None = None
        self._connection: redis.asyncio.connection.AbstractConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.is_closed = False
        self._pool = _make_pool(
            url,
            socket_timeout_s=self._command_timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=1,
        )
        self._bulk_client = redis.asyncio.Redis.from_pool(
            _make_pool(
                url,
                socket_timeout_s=_PIPELINE_TIMEOUT_S,
                connect_timeout_s=_PIPELINE_TIMEOUT_S,
                max_connections=2,
            )
        )

    @classmethod
    def from_settings(
        cls, url: str, settings: "StoreSettings", *, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """Builds the store and its breaker from the service's settings.

        Raises:
            StoreMisconfigured: As for the constructor.
        """
        return cls(
            url,
            timeout_s=settings.timeout_ms / 1000,
            connect_timeout_s=settings.connect_timeout_ms / 1000,
            max_connections=settings.max_connections,
            key_prefix=settings.key_prefix,
            breaker=CircuitBreaker(
                max_failures=settings.breaker_failures,
                open_s=settings.breaker_open_ms / 1000,
                clock=clock,
            ),
        )

    @property
    def is_idle(self) -> bool:
        """Whether no look-up and no attempt to connect is under way, their callers gone or not."""
        return self._connecting is None and (self._pipe is None or not self._pipe.num_pending)

    @property
    def max_get_s(self) -> float:
        """See `OnlineStore.max_get_s`: `timeout_s`, and as much again if this process was late."""
        return 2 * self.timeout_s

    async def get(self, user_id: str) -> bytes | None:
        """See `OnlineStore.get`: one round trip.

        Asks again, once, only if the server closed a connection that had been of use before.
        Takes at most `timeout_s`, and as much longer as the event loop itself was late then.
        """
        self._require_open()
        permit = self._breaker.admit()
        if permit is None:
            raise StoreUnavailable("redis: not asked, as it kept failing a moment ago")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s
        key = self._key_prefix + user_id.encode()
        command = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)
        for is_last in (False, True):
            pipe = self._pipe
            if pipe is None or not self._num_free:
                pipe = await self._wait_for_room(permit, deadline)
            lookup = _Lookup(self, permit, deadline, loop)
            lookup.sent_at = loop.time()
            self._num_free -= 1
            pipe.send(lookup, command)
            try:
                # A caller that is cancelled here leaves its command to the pipe.
                return await lookup.future
            except _IdleLossError:
                if is_last:
                    break
        permit.fail()
        raise StoreUnavailable("redis: the connection was closed by the server")

    async def set_many(self, records: Iterable[tuple[str, bytes]], *, ttl_s: int | None) -> int:
        """See `OnlineStore.set_many`; pipelines of at most 500 records or about 1 MiB.

        Takes no part in the breaker and in `timeout_s`: each pipeline has 2 s.
        """
        self._require_open()
        check_ttl(ttl_s)
        num_written = 0
        for chunk in _chunks(records):
            pipeline = self._bulk_client.pipeline(transaction=False)
            for user_id, record in chunk:
                pipeline.set(self._key_prefix + user_id.encode(), record, ex=ttl_s)
            try:
                async with asyncio.timeout(_PIPELINE_TIMEOUT_S):
                    await pipeline.execute()
            except (redis.exceptions.RedisError, OSError) as exc:
                raise translate(exc) from exc
            num_written += len(chunk)
        return num_written

    async def delete(self, user_id: str) -> bool:
        """See `OnlineStore.delete`; asks the server whatever the breaker says."""
        self._require_open()
        try:
            async with asyncio.timeout(_PIPELINE_TIMEOUT_S):
                num_deleted: int = await self._bulk_client.delete(
                    self._key_prefix + user_id.encode()
                )
        except (redis.exceptions.RedisError, OSError) as exc:
            raise translate(exc) from exc
        return num_deleted > 0

    async def ping(self) -> None:
        """See `OnlineStore.ping`; asks the server whatever the breaker says."""
        self._require_open()
        try:
            async with asyncio.timeout(_PIPELINE_TIMEOUT_S):
                await self._bulk_client.ping()
        except (redis.exceptions.RedisError, OSError) as exc:
            raise translate(exc) from exc

    async def aclose(self) -> None:
        """See `OnlineStore.aclose`; waits shortly for the commands under way."""
        if self.is_closed:
            return
        self.is_closed = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        if self._connecting is not None:
            self._connecting.cancel("store is closing")
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._pipe is not None and self._pipe.num_pending:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._drained}, timeout=self.timeout_s)
        if self._pipe is not None:
            self._pipe.close(ConnectionError("this store is closed"))
            await asyncio.sleep(0)
        await self._drop_connection()
        try:
            await self._bulk_client.aclose()
        except (redis.exceptions.RedisError, OSError) as exc:
            _log.warning("redis: closing connections: %s", exc)

    async def _wait_for_room(self, permit: Permit, deadline: float) -> Pipe:
        """An open pipe with a slot to spare; every error settles the permit."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    self._require_open()
                    if self._pipe is None:
                        await self._connect()
                    elif self._num_free:
                        return self._pipe
                    else:
                        await self._wait_for_slot()
        except TimeoutError as exc:
            permit.fail()
            what = "no connection" if self._pipe is None else "all look-ups busy"
            raise StoreTimeout(f"redis: {what} for {self.timeout_s * 1000:.0f} ms") from exc
        except StoreError:
            if self.is_closed:
                permit.release()
            else:
                permit.fail()
            raise
        except asyncio.CancelledError:
            permit.release()
            raise

    async def _connect(self) -> None:
        """Waits for the one attempt that is under way, or begins one; it outlives its callers."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._open_pipe(), name="redis-connect")
            self._connecting.add_done_callback(self._end_connecting)
        task = self._connecting
        await asyncio.wait({task})
        if task.cancelled():
            raise StoreUnavailable("redis: closed while connecting")
        exc = task.exception()
        if exc is not None:
            raise translate(exc) from exc

    def _end_connecting(self, task: "asyncio.Task[None]") -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # Its callers may all have gone.

    async def _open_pipe(self) -> None:
        await self._drop_connection()
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py has none
        await connection.connect()
        self._connection = connection
        # redis-py does the handshake; from here on the transport is ours.
        writer = connection._writer
        assert writer is not None
        transport = cast("asyncio.Transport", writer.transport)
        self._pipe = Pipe(transport, patience_s=self._command_timeout_s, on_lost=self._lose_pipe)
        if transport.is_closing():
            self._pipe = None
            raise ConnectionError("the connection was closed by the server")

    def _lose_pipe(self) -> None:
        self._pipe = None

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _wait_for_slot(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await waiting
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _free_slot(self) -> None:
        self._num_free += 1
        if self._drained is not None and self._num_free == self._num_slots:
            if not self._drained.done():
                self._drained.set_result(None)
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return

    def _require_open(self) -> None:
        if self.is_closed:
            raise StoreUnavailable("redis: this store is closed")


def _make_pool(
    url: str, *, socket_timeout_s: float, connect_timeout_s: float, max_connections: int
) -> "redis.asyncio.ConnectionPool":
    try:
        options = redis.asyncio.connection.parse_url(url)
    except ValueError:
        # Without the cause: its text may quote the URL, and with it the password.
        raise StoreMisconfigured("store URL: cannot be understood") from None
    for name in options:
        # redis-py lets the URL's query override every argument, time-outs included.
        if name not in _URL_OPTIONS | {"connection_class"} and not name.startswith("ssl_"):
            raise StoreMisconfigured(f"store URL: option {name[:40]!r} cannot be set there")
    return redis.asyncio.ConnectionPool.from_url(
        url,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=connect_timeout_s,
        max_connections=max_connections,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
        # RESP2 and no client info: a new connection sends AUTH and SELECT if needed, and no more.
        protocol=2,
        driver_info=None,
    )


def _chunks(records: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    chunk: list[tuple[str, bytes]] = []
    num_bytes = 0
    for record in records:
        chunk.append(record)
        num_bytes += len(record[1])
        if len(chunk) >= _PIPELINE_RECORDS or num_bytes >= _PIPELINE_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
