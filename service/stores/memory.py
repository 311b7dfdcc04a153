"""Online store in this process: for tests, demonstrations and a service without user records."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

from service.errors import StoreUnavailable
from service.stores.base import check_ttl

if TYPE_CHECKING:
    from service.settings import StoreSettings


class MemoryStore:
    """A dict with expiry; lost with the process.

    An expired record is dropped when it is next asked for, so it keeps its memory until then.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts empty.

        Args:
            clock: Monotonic seconds; decides when records expire.
        """
        self._clock = clock
        self._records: dict[str, tuple[bytes, float | None]] = {}
        self._is_closed = False

    @classmethod
    def from_settings(
        cls, url: str, settings: "StoreSettings", *, clock: Callable[[], float] = time.monotonic
    ) -> Self:
        """Builds the store for `memory://`; neither url nor settings say anything it needs."""
        del url, settings
        return cls(clock=clock)

    @property
    def max_get_s(self) -> float:
        """See `OnlineStore.max_get_s`: it waits for nothing."""
        return 0.0

    async def get(self, user_id: str) -> bytes | None:
        """See `OnlineStore.get`."""
        self._require_open()
        found = self._records.get(user_id)
        if found is None:
            return None
        record, expires_at = found
        if expires_at is not None and self._clock() >= expires_at:
            del self._records[user_id]
            return None
        return record

    async def set_many(self, records: Iterable[tuple[str, bytes]], *, ttl_s: int | None) -> int:
        """See `OnlineStore.set_many`."""
        self._require_open()
        check_ttl(ttl_s)
        expires_at = None if ttl_s is None else self._clock() + ttl_s
        num_written = 0
        for user_id, record in records:
            self._records[user_id] = (record, expires_at)
            num_written += 1
        return num_written

    async def delete(self, user_id: str) -> bool:
        """See `OnlineStore.delete`."""
        was_there = await self.get(user_id) is not None
        self._records.pop(user_id, None)
        return was_there

    async def ping(self) -> None:
        """See `OnlineStore.ping`."""
        self._require_open()

    async def aclose(self) -> None:
        """See `OnlineStore.aclose`; forgets the records."""
        self._is_closed = True
        self._records.clear()

    def _require_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("memory store: closed")
