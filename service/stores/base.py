"""What the scorer may expect of an online store: bytes by user id, and nothing of their meaning."""

from collections.abc import Iterable
from typing import Protocol


class OnlineStore(Protocol):
    """Key-value store of user records.

    Every store passes the same tests. All methods raise only `StoreError` (and `ValueError` for
    a misuse), and `StoreUnavailable` once the store is closed.
    """

    @property
    def max_get_s(self) -> float:
        """Most seconds that one `get` takes; infinite if nothing of its own ends it."""
        ...

    async def get(self, user_id: str) -> bytes | None:
        """Fetches one record.

        A cancelled call changes nothing for the calls beside it.

        Args:
            user_id: Canonical id string.

        Returns:
            The bytes as they were set, possibly empty; None if the user has no record or it
            has expired.

        Raises:
            StoreError: `StoreTimeout`, `StoreUnavailable` or `StoreMisconfigured`.
        """
        ...

    async def set_many(self, records: Iterable[tuple[str, bytes]], *, ttl_s: int | None) -> int:
        """Writes records, replacing value and expiry of those that exist.

        Not atomic: when it raises, the records before the failure may have been written.

        Args:
            records: Pairs of canonical id string and record. Of a repeated id the last one wins.
            ttl_s: Seconds until the records expire, at least 1; None keeps them.

        Returns:
            Number of pairs written, repeated ids included.

        Raises:
            StoreError: As for `get`.
            ValueError: `ttl_s` is below 1.
        """
        ...

    async def delete(self, user_id: str) -> bool:
        """Deletes one record.

        Args:
            user_id: Canonical id string.

        Returns:
            Whether there was one.

        Raises:
            StoreError: As for `get`.
        """
        ...

    async def ping(self) -> None:
        """Returns once the store has answered; meant for the start of the service.

        Raises:
            StoreError: As for `get`; a wrong password is `StoreMisconfigured`.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections and tasks; never raises, and does nothing the second time."""
        ...


def check_ttl(ttl_s: int | None) -> None:
    """Refuses an expiry that would drop the records it is set on.

    Raises:
        ValueError: `ttl_s` is below 1.
    """
    if ttl_s is not None and ttl_s < 1:
        raise ValueError(f"ttl_s: got {ttl_s}, expected at least 1, or None to keep the records")
