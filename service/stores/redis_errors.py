"""Errors of redis-py, of the network and in replies, as errors of the store."""

import ssl
from collections.abc import Iterator

import hiredis
import redis._parsers
import redis.exceptions

from service.errors import (
    RecordCorrupt,
    StoreError,
    StoreMisconfigured,
    StoreTimeout,
    StoreUnavailable,
)
from service.stores.pipe import ProtocolError

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
    (
        (redis.exceptions.ResponseError, redis.exceptions.InvalidResponse, ProtocolError),
        StoreMisconfigured,
    ),
    ((redis.exceptions.TimeoutError, TimeoutError), StoreTimeout),
    ((redis.exceptions.RedisError, OSError), StoreUnavailable),
)


def translate(exc: BaseException) -> StoreError:
    """The error of the store that says the same; for raising from `exc`."""
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


def reply_error(reply: hiredis.ReplyError) -> StoreError:
    """What an error reply to GET means."""
    text = str(reply)
    if text.startswith("WRONGTYPE"):
        return RecordCorrupt("redis: the key holds no string")
    error = redis._parsers.BaseParser.parse_error(text)  # type: ignore[no-untyped-call]  # redis-py has none
    return translate(error)
