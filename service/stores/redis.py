"""Online store in one Redis server (not a Cluster); the only module that knows redis-py.

A request makes one GET, as a task of its own. Whoever waits for it may be cancelled or run out of
time; the task then finishes alone and its reply is dropped. Cancelling it inside redis-py instead
could leave a reply on the connection for the next caller to read (redis-py issue 2624), and
would give up connections that only needed a little longer to open.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Self, cast

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

if TYPE_CHECKING:
    from service.settings import StoreSettings

_log = logging.getLogger(__name__)

# One pipeline of set_many. Its replies are waited for together, off the request path, and a
# server that is writing its append-only file may take far longer than a request would wait.
_PIPELINE_RECORDS = 500
_PIPELINE_BYTES = 1 << 20
_PIPELINE_TIMEOUT_S = 2.0

_URL_OPTIONS = frozenset({"db", "host", "port", "path", "username", "password"})

# First row that fits wins. redis-py derives its authentication, pool and loading errors from its
# ConnectionError, and wraps errors of the handshake on a unix socket into a bare one, so a row is
# compared with the whole chain of causes before the next row is looked at.
_TRANSLATIONS: tuple[tuple[tuple[type[BaseException], ...], type[StoreError]], ...] = (
    (
        (
            redis.exceptions.AuthenticationError,
            redis.exceptions.AuthorizationError,
            redis.exceptions.AuthenticationWrongNumberOfArgsError,
            redis.exceptions.ExternalAuthProviderError,
            redis.exceptions.NoPermissionError,
            ssl.SSLCertVerificationError,
            PermissionError,
        ),
        StoreMisconfigured,
    ),
    (
        (
            redis.exceptions.BusyLoadingError,
            redis.exceptions.MaxConnectionsError,
            redis.exceptions.MasterDownError,
            redis.exceptions.ClusterDownError,
            redis.exceptions.TryAgainError,
            redis.exceptions.OutOfMemoryError,
        ),
        StoreUnavailable,
    ),
    # Any other error reply: wrong database, wrong type, MOVED, read-only replica, no Redis at all.
    ((redis.exceptions.ResponseError, redis.exceptions.InvalidResponse), StoreMisconfigured),
    ((redis.exceptions.TimeoutError, TimeoutError), StoreTimeout),
    ((redis.exceptions.RedisError, OSError), StoreUnavailable),
)


class RedisStore:
    """User records as plain string values under `key_prefix` + user id.

    While the server does not answer, a circuit breaker refuses `get` without asking it, and lets
    one probe through per open period. For one event loop; the owner calls `aclose`.
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
            max_connections: Most commands under way at once; further ones wait.
            key_prefix: Put before every user id.
            breaker: Used by `get` only.

        Raises:
            StoreMisconfigured: The URL cannot be understood or sets something else.
        """
        self._timeout_s = timeout_s
        # A command outlives its caller's time-out by this, so that a late reply or a slow
        # handshake ends in a usable connection and not in another reconnect.
        self._command_timeout_s = timeout_s + connect_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._key_prefix = key_prefix.encode()
        self._breaker = breaker
        self._slots = asyncio.Semaphore(max_connections)
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_closed = False
        self._client = _make_client(
            url,
            socket_timeout_s=self._command_timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
        )
        self._bulk_client = _make_client(
            url,
            socket_timeout_s=_PIPELINE_TIMEOUT_S,
            connect_timeout_s=_PIPELINE_TIMEOUT_S,
            max_connections=2,
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

    async def get(self, user_id: str) -> bytes | None:
        """See `OnlineStore.get`: one round trip, no retry.

        Takes at most `timeout_s`, and as much longer as the event loop itself was late then.
        """
        self._require_open()
        permit = self._breaker.admit()
        if permit is None:
            raise StoreUnavailable("redis: not asked, as it kept failing a moment ago")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        await self._acquire_slot(permit, deadline=deadline)
        if self._is_closed:
            self._slots.release()
            permit.release()
        self._require_open()
        task = self._start(permit, self._key_prefix + user_id.encode())
        # Does not touch the task, neither at the deadline nor when this call is cancelled.
        await asyncio.wait({task}, timeout=deadline - loop.time())
        if not task.done():
            # If this process was late itself (garbage collection, a long callback), what it was
            # late is not the store's fault: one pause would fail all look-ups under way at once
            # and open the breaker.
            late_s = min(loop.time() - deadline, self._timeout_s)
            await asyncio.wait({task}, timeout=late_s)
        if not task.done():
            permit.fail()
            raise StoreTimeout(f"redis: no reply within {self._timeout_s * 1000:.0f} ms")
        if task.cancelled():
            raise StoreUnavailable("redis: closed while a command was under way")
        return cast("bytes | None", task.result())

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
                raise _translate(exc) from exc
            num_written += len(chunk)
        return num_written

    async def ping(self) -> None:
        """See `OnlineStore.ping`; asks the server whatever the breaker says."""
        self._require_open()
        try:
            async with asyncio.timeout(_PIPELINE_TIMEOUT_S):
                await self._bulk_client.ping()
        except (redis.exceptions.RedisError, OSError) as exc:
            raise _translate(exc) from exc

    async def aclose(self) -> None:
        """See `OnlineStore.aclose`; waits shortly for the commands under way."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._timeout_s)
        abandoned = list(self._tasks)
        for task in abandoned:
            task.cancel("store is closing")
        await asyncio.gather(*abandoned, return_exceptions=True)
        for client in (self._client, self._bulk_client):
            try:
                await client.aclose()
            except (redis.exceptions.RedisError, OSError) as exc:
                _log.warning("redis: closing connections: %s", exc)

    async def _acquire_slot(self, permit: Permit, *, deadline: float) -> None:
        if not self._slots.locked():
            await self._slots.acquire()  # Free, so this neither waits nor can be cancelled.
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError as exc:
            permit.fail()
            raise StoreTimeout(
                f"redis: all connections busy for {self._timeout_s * 1000:.0f} ms"
            ) from exc
        except asyncio.CancelledError:
            permit.release()
            raise

    def _start(self, permit: Permit, key: bytes) -> asyncio.Task[object]:
        async def run() -> object:
            try:
                return await self._client.get(key)
            except redis.exceptions.ResponseError as exc:
                if str(exc).startswith("WRONGTYPE"):
                    raise RecordCorrupt("redis: the key holds no string") from exc
                raise _translate(exc) from exc
            except (redis.exceptions.RedisError, OSError) as exc:
                raise _translate(exc) from exc

        def finish(task: asyncio.Task[object]) -> None:
            self._tasks.discard(task)
            self._slots.release()
            if task.cancelled():
                permit.release()
            elif task.exception() is None or isinstance(task.exception(), RecordCorrupt):
                permit.succeed()  # An answer about one key says nothing against the server.
            else:
                permit.fail()

        task = asyncio.create_task(run(), name="redis-get")
        self._tasks.add(task)
        task.add_done_callback(finish)
        return task

    def _require_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("redis: this store is closed")


def _make_client(
    url: str, *, socket_timeout_s: float, connect_timeout_s: float, max_connections: int
) -> "redis.asyncio.Redis":
    try:
        options = redis.asyncio.connection.parse_url(url)
    except ValueError:
        # Without the cause: its text may quote the URL, and with it the password.
        raise StoreMisconfigured("store URL: cannot be understood") from None
    for name in options:
        # redis-py lets the URL's query override every argument, time-outs included.
        if name not in _URL_OPTIONS | {"connection_class"} and not name.startswith("ssl_"):
            raise StoreMisconfigured(f"store URL: option {name[:40]!r} cannot be set there")
    pool = redis.asyncio.ConnectionPool.from_url(
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
    return redis.asyncio.Redis.from_pool(pool)


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


def _translate(exc: BaseException) -> StoreError:
    chain = list(_causes(exc))
    text = str(exc)[:200] or type(exc).__name__
    for foreign, ours in _TRANSLATIONS:
        if any(isinstance(cause, foreign) for cause in chain):
            return ours(f"redis: {text}")
    return StoreUnavailable(f"redis: {text}")


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while exc is not None and exc not in seen:
        seen.append(exc)
        yield exc
        exc = exc.__cause__ or exc.__context__
