"""Stand-ins for what a test cannot make fail on demand."""

import asyncio
import math
from collections.abc import Iterable

from service.errors import StoreError


class FailingStore:
    """An online store that answers every call with one error, ping included."""

    def __init__(self, error: StoreError) -> None:
        self.error = error
        self.is_closed = False

    max_get_s = math.inf

    async def get(self, user_id: str) -> bytes | None:
        raise self.error

    async def set_many(self, records: Iterable[tuple[str, bytes]], *, ttl_s: int | None) -> int:
        raise self.error

    async def delete(self, user_id: str) -> bool:
        raise self.error

    async def ping(self) -> None:
        raise self.error

    async def aclose(self) -> None:
        self.is_closed = True


class SilentStore:
    """An online store that never answers a look-up; counts those that were given up."""

    def __init__(self) -> None:
        self.num_abandoned = 0

    max_get_s = math.inf

    async def get(self, user_id: str) -> bytes | None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_abandoned += 1
            raise
        raise AssertionError("not reached")

    async def set_many(self, records: Iterable[tuple[str, bytes]], *, ttl_s: int | None) -> int:
        raise AssertionError("not expected")

    async def delete(self, user_id: str) -> bool:
        raise AssertionError("not expected")

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return
