"""Refuses requests that would be answered too late, before any work is done for them.

Knows no HTTP, no rows and no model: only how many requests are under way, how large their bodies
are, and how long others took that found as many before them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import Overloaded

# A request's share of the work that does not grow with its body, as bytes of body.
_FIXED_BYTES = 2000
# A prediction is an average, and half of all requests take longer.
_SAFETY = 1.5
# Sums keep this much of themselves per sample: the last 50 or so decide.
_KEEP = 0.98
# Before anything was measured: seconds of a request with nobody before it.
_FIRST_GUESS_S = 2e-3


class LearntRatio:
    """Observed over predicted of late: what a machine, or its load, does to every prediction."""

    __slots__ = ("_observed", "_predicted", "value")

    def __init__(self, *, observed: float, predicted: float) -> None:
        """Begins with one sample, soon outweighed; `predicted` above 0."""
        self._observed = observed
        self._predicted = predicted
        self.value = observed / predicted

    def add(self, *, observed: float, predicted: float) -> None:
        """Learns from one sample. Its weight is its prediction: long waits teach more."""
        self._observed = _KEEP * self._observed + observed
        self._predicted = _KEEP * self._predicted + predicted
        self.value = self._observed / self._predicted


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that was let in.

    Attributes:
        work: Its own work.
        ahead: The work that was under way when it came.
        entered_at: By the clock.
    """

    work: float
    ahead: float
    entered_at: float


class Admission:
    """Lets in what can be answered in time. For one event loop; not thread-safe.

    Little's law: a request that finds so much work before it is answered after that work and its
    own, at the pace at which work was done of late. Whatever limits the pace (decoding, the
    store, the model, a neighbour on the machine) is thereby in the prediction.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins empty; the clock tells seconds."""
        self._clock = clock
        self._under_way = 0.0
        self.announced = 0.0
        self._num_under_way = 0
        self._pace = LearntRatio(observed=_FIRST_GUESS_S, predicted=_work(0))

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until what is under way and announced now will have been answered."""
        return (self._under_way + self.announced) * self._pace.value

    def check(self, *, body_bytes: int, arrived_at: float, timeout_s: float) -> None:
        """Refuses a request that would be answered too late.

        Args:
            body_bytes: The body's length as announced, 0 if it is not.
            arrived_at: When the request reached this machine, by the clock.
            timeout_s: From then on.

        Raises:
            Overloaded: See above. Never because of its own size: a request that finds nobody
                before it may try, unless its time is over already.
        """
        left_s = arrived_at + timeout_s - self._clock()
        wait_s = self.predicted_wait_s
        if wait_s > 0:
            needed_s = _SAFETY * wait_s + _work(body_bytes) * self._pace.value
            if needed_s <= left_s:
                return
        elif left_s > 0:
            return
        raise Overloaded(
            f"{self._num_under_way} requests are under way and take about {1000 * wait_s:.0f} ms, "
            f"the time left is {1000 * left_s:.0f} ms",
            retry_after_s=wait_s,
        )

    def announce(self, *, body_bytes: int) -> None:
        """Counts a request that was let in and will `enter` before long."""
        self.announced += _work(body_bytes)

    def forget_announced(self) -> None:
        """Those announced are about to enter one by one, or never will."""
        self.announced = 0.0

    def enter(self, *, body_bytes: int) -> Ticket:
        """Counts a request as under way; it must `leave`, whatever becomes of it."""
        work = _work(body_bytes)
        ticket = Ticket(work, self._under_way, self._clock())
        self._under_way += work
        self._num_under_way += 1
        return ticket

    def leave(self, ticket: Ticket, *, teaches: bool) -> None:
        """A request that was let in has ended.

        Args:
            ticket: What `enter` gave.
            teaches: Whether it went all the way, or until its deadline: then its duration says
                something of the next one's.
        """
        self._under_way -= ticket.work
        self._num_under_way -= 1
        if teaches:
            self._pace.add(
                observed=self._clock() - ticket.entered_at, predicted=ticket.ahead + ticket.work
            )


def _work(body_bytes: int) -> float:
    return float(_FIXED_BYTES + body_bytes)
