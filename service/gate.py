"""Judges a scoring request by its head: the first that is known of it, and the cheapest to refuse.

Knows header names, not answers.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.admission import Admission
from service.errors import InvalidRequest, Overloaded
from service.observe import Metrics
from service.settings import LimitSettings

TIMEOUT_MS = "x-timeout-ms"

_TIMEOUT_MS = TIMEOUT_MS.encode()


@dataclass(frozen=True, slots=True)
class Head:
    """What the head of a scoring request says about its body and its time.

    Attributes:
        arrived_at: When it reached this machine, in `time.monotonic`.
        timeout_ms: None if the head names none.
        body_bytes: 0 if the length is not announced.
    """

    arrived_at: float
    timeout_ms: int | None
    body_bytes: int


class Gate:
    """Decides which requests are let in. One per app and event loop."""

    def __init__(
        self,
        admission: Admission,
        *,
        model_wait_s: Callable[[], float],
        metrics: Metrics,
        limits: LimitSettings,
    ) -> None:
        """Takes what it decides by.

        Args:
            admission: Knows the event loop's backlog.
            model_wait_s: Tells the predicted time until the model is free.
            metrics: Told of refusals.
            limits: Time-outs.
        """
        self.admission = admission
        self._model_wait_s = model_wait_s
        self._metrics = metrics
        self._limits = limits

    @property
    def predicted_wait_s(self) -> float:
        """Predicted seconds until all that is under way has been answered."""
        return self.admission.predicted_wait_s + self._model_wait_s()

    def read_head(
        self, headers: Iterable[tuple[bytes, bytes]], *, arrived_at: float | None
    ) -> Head:
        """Reads a head.

        Args:
            headers: Names in lower case.
            arrived_at: None is now.

        Raises:
            InvalidRequest: The time-out is no number, or out of bounds.
        """
        timeout_ms, body_bytes = None, 0
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                body_bytes = int(value)
            elif name == _TIMEOUT_MS:
                timeout_ms = self._timeout_ms(value)
        return Head(time.monotonic() if arrived_at is None else arrived_at, timeout_ms, body_bytes)

    def check(self, head: Head) -> None:
        """Lets a request pass, or counts that it was refused.

        Raises:
            Overloaded: It would be answered too late. A time-out that only the body names is not
                known yet: the default counts.
        """
        timeout_ms = self._limits.timeout_ms if head.timeout_ms is None else head.timeout_ms
        try:
            self.admission.check(
                body_bytes=head.body_bytes,
                arrived_at=head.arrived_at,
                timeout_s=timeout_ms / 1000,
                other_wait_s=self._model_wait_s(),
            )
        except Overloaded:
            self._metrics.request_dropped(reason="backlog")
            raise

    def deadline(self, head: Head, *, timeout_ms: int | None) -> float:
        """When a request's time is over, in `time.monotonic`: by the shorter of what it names.

        Args:
            head: Of the request.
            timeout_ms: What its body names.
        """
        named = [ms for ms in (head.timeout_ms, timeout_ms) if ms is not None]
        return head.arrived_at + min(named, default=self._limits.timeout_ms) / 1000

    def admit_early(
        self, headers: Iterable[tuple[bytes, bytes]], *, arrived_at: float
    ) -> Head | None:
        """Reads and checks a head for the protocol, which reads all heads before any is worked on.

        Returns:
            The head of a request that is let in, which counts as announced; None for one with an
            error of the caller's, which others will tell.

        Raises:
            Overloaded: It is refused, and has been counted.
        """
        try:
            head = self.read_head(headers, arrived_at=arrived_at)
            if head.body_bytes > self._limits.body_limit_bytes:
                return None
            self.check(head)
        except InvalidRequest:
            return None
        except Overloaded as exc:
            seconds = time.monotonic() - arrived_at
            self._metrics.request_finished(outcome=exc.code, seconds=seconds)
            raise
        if not self.admission.has_announced:
            # Comes before the tasks of these requests, which are then counted as they begin.
            asyncio.get_running_loop().call_soon(self._begin_turn)
        self.admission.announce(body_bytes=head.body_bytes)
        return head

    def _begin_turn(self) -> None:
        self.admission.begin_turn()
        asyncio.get_running_loop().call_soon(self.admission.end_turn)

    def _timeout_ms(self, value: bytes) -> int:
        timeout_ms = int(value) if value.isdigit() and len(value) < 10 else 0
        if not 1 <= timeout_ms <= self._limits.max_timeout_ms:
            raise InvalidRequest(
                f"got {str(value[:20], 'latin-1')!r}, expected 1 to {self._limits.max_timeout_ms}",
                field=TIMEOUT_MS,
            )
        return timeout_ms
