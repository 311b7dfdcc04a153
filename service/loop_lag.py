"""How late the event loop wakes who asked to be woken: what every request waits for beside it."""

import asyncio
import time
from collections.abc import Callable

# A pause of this length or more is always seen; 50 wakes a second cost 0.05 % of a core.
_INTERVAL_S = 0.02


class LagProbe:
    """A timer that measures its own lateness. For one event loop."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        """Starts nothing yet; `observe` gets seconds, which uvloop's timers have to 1 ms."""
        self._observe = observe
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to measure, on the running loop."""
        loop = asyncio.get_running_loop()
        # Not in the loop's time: uvloop tells the one at which the present turn began.
        self._due_at = time.perf_counter() + _INTERVAL_S
        self._timer = loop.call_later(_INTERVAL_S, self._wake)

    def stop(self) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._observe(max(0.0, time.perf_counter() - self._due_at))
        self.start()
