"""Refuses requests that would be answered too late, before any work is done for them.

Knows no HTTP, no rows and no model: only how much is under way, what it costs the event loop, and
how much of the machine the loop gets.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import Overloaded

# A request's share of the work that does not grow with its body, as bytes of body.
_FIXED_BYTES = 2000
# A prediction is an average, and half of all requests take longer. More under way would not be
# answered any faster, either, but make every turn of the loop longer, and with it the time that
# answers of the store lie unread.
_SAFETY = 2.0
# What was observed counts less by a factor of e for each of these seconds observed since. Requests
# come and go in bunches of a turn or two of the loop: fewer would show one end of a bunch only.
_MEMORY_S = 0.5
# Of a turn of the loop in which nothing ran for long, only so much is taken for the rule.
_LONGEST_STALL_S = 0.1
# Before anything was measured: seconds of the loop for a request.
_FIRST_GUESS_S = 1e-3


class LearntRatio:
    """Observed over predicted of late: what a machine, or its load, does to every prediction."""

    __slots__ = ("_observed_s", "_predicted", "value")

    def __init__(self, *, observed_s: float, predicted: float) -> None:
        """Begins with one sample, soon outweighed; `predicted` above 0."""
        self._observed_s = observed_s
        self._predicted = predicted
        self.value = observed_s / predicted

    def add(self, *, observed_s: float, predicted: float) -> None:
        """Learns from one sample; a long one teaches more, and makes more be forgotten."""
        keep = math.exp(-observed_s / _MEMORY_S)
        self._observed_s = keep * self._observed_s + observed_s
        self._predicted = keep * self._predicted + predicted
        self.value = self._observed_s / self._predicted


@dataclass(frozen=True, slots=True)
class Clocks:
    """What time is told by, in seconds.

    Attributes:
        wall: The one deadlines are in.
        cpu: Time that the event loop's thread has been running; read on that thread.
    """

    wall: Callable[[], float] = time.monotonic
    cpu: Callable[[], float] = time.thread_time


class Admission:
    """Lets in what can be answered in time. For one event loop; not thread-safe.

    The loop works off what is under way at a pace, learnt as CPU time per work, and stretched by
    what else runs on its core, learnt as time per CPU time over turns of the loop. Durations of
    requests would say the same as long as they wait for the loop, but they also wait for others:
    with a slow store, refusing would not make them any shorter, and ever more would be refused.
    """

    def __init__(self, *, clocks: Clocks | None = None) -> None:
        """Begins empty."""
        self._clocks = clocks or Clocks()
        self._under_way = 0.0
        self._num_under_way = 0
        self._announced = 0.0
        self._pace = LearntRatio(observed_s=_FIRST_GUESS_S, predicted=_work(0))
        self._stretch = LearntRatio(observed_s=1e-3, predicted=1e-3)
        self._left_at_cpu: float | None = None
        self._turn: tuple[float, float] | None = None

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until the loop will have worked off what is under way and announced now."""
        return self._seconds(self._under_way + self._announced)

    @property
    def has_announced(self) -> bool:
        """Whether requests were let in that did not `enter` yet."""
        return self._announced > 0

    def check(
        self, *, body_bytes: int, arrived_at: float, timeout_s: float, other_wait_s: float = 0.0
    ) -> None:
        """Refuses a request that would be answered too late.

        Args:
            body_bytes: The body's length as announced, 0 if it is not.
            arrived_at: When the request reached this machine, by the clock.
            timeout_s: From then on.
            other_wait_s: What it will wait for besides the loop.

        Raises:
            Overloaded: See above. Never because of its own size: a request that finds nobody
                before it may try, unless its time is over already.
        """
        left_s = arrived_at + timeout_s - self._clocks.wall()
        wait_s = self.predicted_wait_s + other_wait_s
        if wait_s > 0:
            if _SAFETY * wait_s + self._seconds(_work(body_bytes)) <= left_s:
                return
        elif left_s > 0:
            return
        raise Overloaded(
            f"{self._num_under_way} requests are under way and take about {1000 * wait_s:.0f} ms, "
            f"the time left is {1000 * left_s:.0f} ms",
            retry_after_s=wait_s,
        )

    def announce(self, *, body_bytes: int) -> None:
        """Counts a request that was let in and will `enter` in this turn of the loop."""
        self._announced += _work(body_bytes)

    def begin_turn(self) -> None:
        """Those announced are about to enter one by one, or never will."""
        self._announced = 0.0
        self._turn = (self._clocks.wall(), self._clocks.cpu())

    def end_turn(self) -> None:
        """The loop went once through all that was due, without waiting for anything."""
        if self._turn is not None:
            wall_at, cpu_at = self._turn
            self._turn = None
            cpu_s = self._clocks.cpu() - cpu_at
            wall_s = min(self._clocks.wall() - wall_at, cpu_s + _LONGEST_STALL_S)
            self._stretch.add(observed_s=wall_s, predicted=cpu_s)

    def enter(self, *, body_bytes: int) -> float:
        """Counts a request as under way; gives the work with which it must `leave`."""
        work = _work(body_bytes)
        self._under_way += work
        self._num_under_way += 1
        if self._left_at_cpu is None:
            self._left_at_cpu = self._clocks.cpu()
        return work

    def leave(self, work: float) -> None:
        """A request that was let in has ended, one way or another."""
        self._num_under_way -= 1
        self._under_way = self._under_way - work if self._num_under_way else 0.0
        now = self._clocks.cpu()
        if self._left_at_cpu is not None:
            # All that the loop did since then, refusals too: they take time from the others.
            self._pace.add(observed_s=now - self._left_at_cpu, predicted=work)
        self._left_at_cpu = now

    def _seconds(self, work: float) -> float:
        return work * self._pace.value * max(1.0, self._stretch.value)


def _work(body_bytes: int) -> float:
    return float(_FIXED_BYTES + body_bytes)
