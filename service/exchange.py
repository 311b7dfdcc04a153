"""One scoring exchange, from a request's head and body to its answer; knows no transport."""

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from service.answers import JSON, Answer, Headers, problem_answer
from service.errors import DeadlineExceeded, ServiceError, StoreError
from service.gate import Gate, Head
from service.request_log import RequestLog
from service.settings import LimitSettings
from service.status import ServiceStatus
from service.trace_context import trace_context_of
from service.wire import encode_answer, parse_body

_log = logging.getLogger(__name__)

ReadBody = Callable[[Head], Awaitable[bytes | bytearray]]


class Disconnected(Exception):
    """The caller has hung up; there is nobody to answer."""


class _Call:
    """What becomes known of a request while it is answered."""

    __slots__ = ("headers", "num_scored", "outcome", "request_id")

    def __init__(self, request_id: str, headers: Headers) -> None:
        self.request_id = request_id
        self.headers = headers
        self.outcome = "cancelled"
        self.num_scored = 0


class ScoreExchange:
    """Answers requests, whatever brings them, and counts what became of each."""

    def __init__(
        self,
        status: ServiceStatus,
        *,
        limits: LimitSettings,
        gate: Gate,
        request_log: RequestLog | None = None,
    ) -> None:
        """Takes what it answers from, who decides which requests are let in, and who keeps some."""
        self._status = status
        self._gate = gate
        self._metrics = status.metrics
        self._limits = limits
        self._request_log = request_log

    async def answer(
        self, head: Head, data: bytes | bytearray, *, request_id: str, headers: Headers = ()
    ) -> Answer:
        """Answers a request that the gate has let in and whose body is there.

        Args:
            head: As the gate read it.
            data: The whole body.
            request_id: For the answer, unless the body names one.
            headers: Names in lower case; looked at only if the request fails.
        """
        call = _Call(request_id, headers)
        return await self._concluded(call, self._score(call, head, data))

    async def receive_and_answer(
        self, headers: Headers, read_body: ReadBody, *, request_id: str, arrived_at: float | None
    ) -> Answer:
        """Answers a request of which no more than the headers are there.

        Args:
            headers: Names in lower case.
            read_body: Waits for the body.
            request_id: For the answer, unless the body names one.
            arrived_at: In `time.monotonic`, if the gate has let it in already; None asks it.

        Raises:
            Disconnected: From `read_body`.
        """
        call = _Call(request_id, headers)
        return await self._concluded(call, self._receive(call, headers, read_body, arrived_at))

    async def _concluded(self, call: _Call, work: Coroutine[None, None, bytes]) -> Answer:
        # Durations are not measured in the loop's time: uvloop tells it in whole milliseconds.
        began_at = time.perf_counter()
        try:
            try:
                return Answer(200, await work, JSON, call.request_id)
            except Disconnected:
                raise
            except Exception as exc:  # noqa: BLE001 - the task's outer edge: logged, counted, answered
                error = ServiceError("see the service's log")
                # Errors of the store become `degraded` in the scorer; one that got here is a bug.
                if isinstance(exc, ServiceError) and not isinstance(exc, StoreError):
                    error = exc
                call.outcome, call.num_scored = error.code, 0
                if error.code in ("internal_error", "inference_failed"):
                    _log.error("request failed", exc_info=exc, extra=self._log_fields(call))
                return problem_answer(error, request_id=call.request_id, headers=call.headers)
        finally:
            self._metrics.request_finished(
                outcome=call.outcome,
                seconds=time.perf_counter() - began_at,
                candidates=call.num_scored,
            )

    def _log_fields(self, call: _Call) -> dict[str, str]:
        fields = {"request_id": call.request_id}
        if self._status.scorer is not None:
            fields["bundle"] = self._status.scorer.state.manifest.bundle_id
        trace = trace_context_of(call.headers)
        return fields if trace is None else fields | trace.log_fields()

    async def _receive(
        self, call: _Call, headers: Headers, read_body: ReadBody, arrived_at: float | None
    ) -> bytes:
        self._status.require_scorer()
        head = self._gate.read_head(headers, arrived_at=arrived_at)
        if arrived_at is None:
            self._gate.check(head)
        # A caller that is slow to send takes nobody's time.
        return await self._score(call, head, await read_body(head))

    async def _score(self, call: _Call, head: Head, data: bytes | bytearray) -> bytes:
        scorer = self._status.require_scorer()
        work = self._gate.admission.enter(body_bytes=len(data))
        try:
            received_at = time.perf_counter()
            body = parse_body(data, limits=self._limits)
            call.request_id = body.request_id or call.request_id
            self._metrics.stage_finished(stage="parse", seconds=time.perf_counter() - received_at)
            deadline = self._gate.deadline(head, timeout_ms=body.timeout_ms)
            result = await scorer.score(body.request, deadline=deadline)
            scored_at = time.perf_counter()
            answer = encode_answer(result, request_id=call.request_id, layout=body.layout)
            self._metrics.stage_finished(stage="respond", seconds=time.perf_counter() - scored_at)
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the deadline passed while the answer was written")
        finally:
            self._gate.admission.leave(work)
        call.outcome = "degraded" if result.degraded else "ok"
        call.num_scored = len(result.item_ids)
        if self._request_log is not None:
            self._request_log.offer(call.request_id, body.request, result)
        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What a protocol answers with, below ASGI.

    Attributes:
        exchange: Answers.
        gate: Decides which requests are let in.
        status: Says whether the service drains.
        new_id: Makes an id for a caller that sent none, or an unusable one.
    """

    exchange: ScoreExchange
    gate: Gate
    status: ServiceStatus
    new_id: Callable[[], str]
