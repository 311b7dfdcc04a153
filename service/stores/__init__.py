"""Online stores: one table from URL scheme to class, and the function that opens one."""

import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from service.errors import StoreMisconfigured
from service.stores.base import OnlineStore

if TYPE_CHECKING:
    from service.settings import StoreSettings

# URL scheme -> "module:class". Strings, so that a store's client library is imported only when
# that store is opened.
STORES = {
    "memory": "service.stores.memory:MemoryStore",
    "redis": "service.stores.redis:RedisStore",
    "rediss": "service.stores.redis:RedisStore",
    "unix": "service.stores.redis:RedisStore",
}


class _StoreClass(Protocol):
    def from_settings(
        self, url: str, settings: "StoreSettings", *, clock: Callable[[], float]
    ) -> OnlineStore: ...


def open_store(
    url: str, settings: "StoreSettings", *, clock: Callable[[], float] = time.monotonic
) -> OnlineStore:
    """Builds the store that a URL names; connects to nothing yet.

    Args:
        url: Where the store is; may hold a password, so it appears in no message.
        settings: Time-outs and limits. Its own `url` is not read: None there means that the
            caller has started a server and passes that server's URL here.
        clock: Monotonic seconds.

    Returns:
        The open store; the caller closes it.

    Raises:
        StoreMisconfigured: The URL cannot be understood, or its scheme is not in `STORES`.
    """
    scheme, separator, _ = url.partition("://")
    target = STORES.get(scheme) if separator else None
    if target is None:
        expected = ", ".join(f"{known}://" for known in sorted(STORES))
        raise StoreMisconfigured(f"store URL: expected it to begin with one of {expected}")
    module_name, _, class_name = target.partition(":")
    store_class = cast("_StoreClass", getattr(importlib.import_module(module_name), class_name))
    return store_class.from_settings(url, settings, clock=clock)
