"""How late the event loop wakes who asked to be woken: what every request waits for beside it."""

import asyncio
import time
from collections.abc import Callable
from typing import Self

# A pause of this length or more is always seen; 50 wakes a second cost 0.05 % of a core.
_INTERVAL_S = 0.02


class LagProbe:
    """A timer that measures its own lateness while this context manager is open, on one loop."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        """Starts nothing yet; `observe` gets seconds, which uvloop's timers have to 1 ms."""
        self._observe = observe
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        """Begins to measure, on the running loop."""
        self._arm()
        return self

    def __exit__(self, *exc: object) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        # Not in the loop's time: uvloop tells the one at which the present turn began.
        self._due_at = time.perf_counter() + _INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL_S, self._wake)

    def _wake(self) -> None:
        self._observe(max(0.0, time.perf_counter() - self._due_at))
        self._arm()
