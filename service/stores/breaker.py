"""Circuit breaker: stop asking a server that keeps failing; knows nothing of the server."""

import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class CircuitBreaker:
    """Closed, open or half-open.

    Closed, it admits everyone. After `max_failures` failures in a row it opens and admits
    nobody for `open_s` seconds; then it admits one probe at a time, whose success closes it
    and whose failure opens it for another `open_s`. For one event loop; not thread-safe.
    """

    def __init__(
        self, *, max_failures: int, open_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts closed.

        Args:
            max_failures: Failures in a row that open it, at least 1.
            open_s: Seconds it stays open before a probe.
            clock: Monotonic seconds.
        """
        self._max_failures = max_failures
        self._open_s = open_s
        self._clock = clock
        self._num_failures = 0
        self._opened_until: float | None = None
        self._is_probing = False
        self._epoch = 0

    @property
    def state(self) -> str:
        """One of `closed`, `open`, `half_open` (a probe is under way, or would be admitted)."""
        if self._opened_until is None:
            return "closed"
        if self._is_probing or self._clock() >= self._opened_until:
            return "half_open"
        return "open"

    def admit(self) -> "Permit | None":
        """Asks for permission to make one call.

        Returns:
            A permit on which the caller must report the outcome; None if the call must not
            be made.
        """
        if self._opened_until is not None:
            if self._is_probing or self._clock() < self._opened_until:
                return None
            self._is_probing = True
        return Permit(self, epoch=self._epoch)

    def _report(self, epoch: int, *, failed: bool) -> None:
        # Calls that were admitted before the last opening or closing say nothing about now.
        if epoch != self._epoch:
            return
        if not failed:
            self._num_failures = 0
            if self._opened_until is not None:
                _log.warning("the online store answers again")
                self._opened_until = None
                self._is_probing = False
                self._epoch += 1
            return
        self._num_failures += 1
        if self._is_probing or self._num_failures >= self._max_failures:
            if self._opened_until is None:
                _log.warning(
                    "the online store failed %d times in a row: answers are degraded until it "
                    "answers again",
                    self._num_failures,
                )
            self._opened_until = self._clock() + self._open_s
            self._is_probing = False
            self._epoch += 1

    def _release(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._is_probing = False


class Permit:
    """Permission for one call. The first report counts, later ones are ignored."""

    __slots__ = ("_breaker", "_epoch", "_is_settled")

    def __init__(self, breaker: CircuitBreaker, *, epoch: int) -> None:
        """Made by `CircuitBreaker.admit`."""
        self._breaker = breaker
        self._epoch = epoch
        self._is_settled = False

    def succeed(self) -> None:
        """The server answered."""
        if not self._is_settled:
            self._is_settled = True
            self._breaker._report(self._epoch, failed=False)

    def fail(self) -> None:
        """The server did not answer, or refused."""
        if not self._is_settled:
            self._is_settled = True
            self._breaker._report(self._epoch, failed=True)

    def release(self) -> None:
        """The call was not made after all."""
        if not self._is_settled:
            self._is_settled = True
            self._breaker._release(self._epoch)
