"""HTTP: routes, and every error as application/problem+json. Scores nothing itself.

`POST /score` is a plain ASGI endpoint below FastAPI: on the hot path the framework's request and
response objects would cost more than the rest of the service.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
    StoreError,
    Unavailable,
    error_codes,
)
from service.gate import Gate, Head
from service.observe import CONTENT_TYPE, Metrics
from service.openapi import openapi_document
from service.scorer import Scorer
from service.settings import LimitSettings
from service.wire import encode_answer, encode_json, is_request_id, parse_body, too_large

_log = logging.getLogger(__name__)

# Key of a request's state: when it reached this machine, in `time.monotonic`. Set by a protocol
# that has asked the gate already.
ARRIVED_AT = "arrived_at"

_REQUEST_ID = b"x-request-id"
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")


@dataclass(frozen=True, slots=True)
class Problem:
    """What HTTP says of an error code: the status and a title that never changes."""

    status: int
    title: str


_INTERNAL = Problem(500, "The service has a bug")

# Errors of the store become `degraded` in the scorer; one that got here is a bug.
PROBLEMS: Mapping[str, Problem] = {
    "invalid_request": Problem(422, "The request is not valid"),
    "too_many_candidates": Problem(413, "The request has too many candidates"),
    "payload_too_large": Problem(413, "The request body is too large"),
    "not_ready": Problem(503, "The service is not ready"),
    "overloaded": Problem(503, "The service is overloaded"),
    "shutting_down": Problem(503, "The service is shutting down"),
    "deadline_exceeded": Problem(504, "The request took longer than its time-out"),
    "inference_failed": Problem(500, "The model cannot score this request"),
    "internal_error": _INTERNAL,
    **dict.fromkeys(error_codes(StoreError), _INTERNAL),
    "not_found": Problem(404, "There is no such path"),
    "method_not_allowed": Problem(405, "The path does not take this method"),
    "http_error": Problem(400, "The request is not valid HTTP for this path"),
}
_CODES_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}


class ServiceStatus:
    """Whether the service takes requests, as routes and server see it. Changes; one per app."""

    def __init__(self, metrics: Metrics) -> None:
        """Starts without a scorer: not ready."""
        self.metrics = metrics
        self.scorer: Scorer | None = None
        self.is_draining = False
        # Of this process; several workers put one in its place that tells of all of them.
        self.render_metrics: Callable[[], Awaitable[bytes]] = self._render_metrics

    def model_wait_s(self) -> float:
        """Predicted seconds until the model will have run what it was given; 0 without one."""
        return 0.0 if self.scorer is None else self.scorer.model_wait_s

    def set_scorer(self, scorer: Scorer | None) -> None:
        """Begins to score, or (None) ceases to."""
        self.scorer = scorer
        self.metrics.ready_changed(is_ready=scorer is not None and not self.is_draining)

    def begin_drain(self) -> None:
        """Fails readiness; requests are still scored."""
        self.is_draining = True
        self.metrics.ready_changed(is_ready=False)

    def require_scorer(self) -> Scorer:
        """The scorer.

        Raises:
            NotReady, ShuttingDown: There is none yet, or no longer.
        """
        if self.scorer is None:
            raise self._unavailable()
        return self.scorer

    def require_ready(self) -> Scorer:
        """The scorer, unless the service is draining.

        Raises:
            NotReady, ShuttingDown: See above.
        """
        if self.is_draining:
            raise self._unavailable()
        return self.require_scorer()

    async def _render_metrics(self) -> bytes:
        return self.metrics.render()

    def _unavailable(self) -> ServiceError:
        if self.is_draining:
            return ShuttingDown("the service is shutting down")
        return NotReady("no bundle is being served yet")


class _DisconnectedError(Exception):
    pass


class ScoreEndpoint:
    """ASGI endpoint of `POST /score`."""

    def __init__(self, status: ServiceStatus, *, limits: LimitSettings, gate: Gate) -> None:
        """Takes what it answers from, and who decides which requests are let in."""
        self._status = status
        self._gate = gate
        self._metrics = status.metrics
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; a caller that hangs up gets nothing."""
        # Durations are not measured in the loop's time: uvloop tells it in whole milliseconds.
        began_at = time.perf_counter()
        outcome, num_scored = "cancelled", 0
        try:
            try:
                answer, outcome, num_scored = await self._score(scope, receive)
                await _send(send, 200, answer, [_JSON])
            except ServiceError as exc:
                outcome = exc.code
                if exc.code in ("internal_error", "inference_failed"):
                    _log.error("request failed", exc_info=exc, extra=_log_extra(scope))
                await send_problem(scope, send, exc)
            except _DisconnectedError:
                pass
            except Exception:  # noqa: BLE001 - the task's outer edge: logged, counted, answered
                outcome = ServiceError.code
                _log.exception("request failed", extra=_log_extra(scope))
                await send_problem(scope, send, ServiceError("see the service's log"))
        finally:
            seconds = time.perf_counter() - began_at
            self._metrics.request_finished(outcome=outcome, seconds=seconds, candidates=num_scored)

    async def _score(self, scope: Scope, receive: Receive) -> tuple[bytes, str, int]:
        scorer = self._status.require_scorer()
        arrived_at = scope["state"].get(ARRIVED_AT)
        head = self._gate.read_head(scope["headers"], arrived_at=arrived_at)
        if arrived_at is None:
            self._gate.check(head)
        data = await self._read_body(receive, head)
        # Only now: a caller that is slow to send takes nobody's time.
        work = self._gate.admission.enter(body_bytes=len(data))
        try:
            return await self._answer(scope, scorer, data, head)
        finally:
            self._gate.admission.leave(work)

    async def _answer(
        self, scope: Scope, scorer: Scorer, data: bytes | bytearray, head: Head
    ) -> tuple[bytes, str, int]:
        received_at = time.perf_counter()
        body = parse_body(data, limits=self._limits)
        if body.request_id is not None:
            scope["state"]["request_id"] = body.request_id
        parsed_at = time.perf_counter()
        self._metrics.stage_finished(stage="parse", seconds=parsed_at - received_at)
        named = [ms for ms in (head.timeout_ms, body.timeout_ms) if ms is not None]
        deadline = head.arrived_at + min(named, default=self._limits.timeout_ms) / 1000
        result = await scorer.score(body.request, deadline=deadline)
        scored_at = time.perf_counter()
        answer = encode_answer(result, request_id=scope["state"]["request_id"], layout=body.layout)
        self._metrics.stage_finished(stage="respond", seconds=time.perf_counter() - scored_at)
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the deadline passed while the answer was written")
        return answer, "degraded" if result.degraded else "ok", len(result.item_ids)

    async def _read_body(self, receive: Receive, head: Head) -> bytes | bytearray:
        limit = self._limits.body_limit_bytes
        if head.body_bytes > limit:
            raise too_large(self._limits)
        deadline = head.arrived_at + self._limits.max_timeout_ms / 1000
        data = bytearray()
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _DisconnectedError
                    chunk: bytes = message.get("body", b"")
                    if not message.get("more_body", False):
                        if not data and len(chunk) <= limit:
                            return chunk
                        data += chunk
                        break
                    data += chunk
                    if len(data) > limit:
                        break
        except TimeoutError as exc:
            raise DeadlineExceeded("the request body did not arrive in time") from exc
        if len(data) > limit:
            raise too_large(self._limits)
        return data


class ScoringApp(FastAPI):
    """The framework's app, but `POST /score` goes straight to its endpoint.

    Routing and the framework's middleware would cost as much again as the rest of the exchange.
    """

    score: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        score = self.score
        if (
            score is not None
            and scope["type"] == "http"
            and scope["path"] == "/score"
            and scope["method"] == "POST"
        ):
            await score(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class RequestIdMiddleware:
    """Gives every exchange an id: the caller's `x-request-id`, else a new one; and says it back.

    While the service drains, answers also ask the caller to open its next connection elsewhere.
    """

    def __init__(self, app: ASGIApp, *, status: ServiceStatus, new_id: Callable[[], str]) -> None:
        """Wraps an app.

        Args:
            app: What answers.
            status: Says whether the service drains.
            new_id: Makes an id for a caller that sent none, or an unusable one.
        """
        self._app = app
        self._status = status
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id_of(scope["headers"]) or self._new_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (_REQUEST_ID, state["request_id"].encode())]
                if self._status.is_draining:
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_id)


def add_routes(
    app: ScoringApp,
    status: ServiceStatus,
    *,
    limits: LimitSettings,
    gate: Gate,
    new_id: Callable[[], str],
) -> None:
    """Adds every route, error handler and the request ids to the app."""
    endpoint = ScoreEndpoint(status, limits=limits, gate=gate)
    app.score = RequestIdMiddleware(endpoint, status=status, new_id=new_id)
    # For other methods, and where the app is mounted under a path.
    app.router.routes.append(Route("/score", endpoint, methods=["POST"]))
    app.add_middleware(RequestIdMiddleware, status=status, new_id=new_id)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return _response({"status": "ok"})

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        scorer = status.require_ready()
        return _response({"status": "ready", "bundle": scorer.state.manifest.bundle_id})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(await status.render_metrics(), media_type=CONTENT_TYPE)

    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, ServiceError)
        return _problem_response(request.scope, exc)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = _CODES_BY_STATUS.get(exc.status_code, "http_error")
        content = _problem(request.scope, code, str(exc.detail), status=exc.status_code)
        return Response(
            encode_json(content),
            exc.status_code,
            headers=exc.headers,
            media_type="application/problem+json",
        )

    @app.exception_handler(Exception)
    async def on_bug(request: Request, exc: Exception) -> Response:
        del exc  # The framework logs it.
        return _problem_response(request.scope, ServiceError("see the service's log"))

    app.openapi = openapi_document  # type: ignore[method-assign]  # FastAPI's documented way


async def send_problem(scope: Scope, send: Send, error: ServiceError) -> None:
    """Answers with an error; for endpoints below the framework."""
    content = _problem_of(scope, error)
    headers = [_PROBLEM, *((k.encode(), v.encode()) for k, v in _problem_headers(error).items())]
    await _send(send, content["status"], encode_json(content), headers)


def refusal_answer(error: Overloaded, *, request_id: str) -> bytes:
    """The whole HTTP/1.1 answer with an error, for a request that never became an exchange."""
    content = _problem({"state": {"request_id": request_id}}, error.code, str(error))
    body = encode_json(content)
    head = [
        f"HTTP/1.1 {content['status']} Service Unavailable",
        f"{_REQUEST_ID.decode()}: {request_id}",
        f"content-type: {_PROBLEM[1].decode()}",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in _problem_headers(error).items()),
    ]
    return "\r\n".join((*head, "\r\n")).encode() + body


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The caller's id for the exchange; None if there is none, or none that can be used."""
    for name, value in headers:
        if name == _REQUEST_ID:
            text = str(value, "latin-1")
            if is_request_id(text):
                return text
    return None


def _problem_response(scope: Scope, error: ServiceError) -> Response:
    content = _problem_of(scope, error)
    return Response(
        encode_json(content),
        content["status"],
        headers=_problem_headers(error),
        media_type="application/problem+json",
    )


def _problem_of(scope: Scope, error: ServiceError) -> dict[str, Any]:
    field = error.field if isinstance(error, InvalidRequest) else None
    return _problem(scope, error.code, str(error), field=field)


# Any: JSON values.
def _problem(
    scope: Scope, code: str, detail: str, *, status: int | None = None, field: str | None = None
) -> dict[str, Any]:
    problem = PROBLEMS[code]
    content = {
        "type": f"urn:ctr-scoring:problem:{code}",
        "title": problem.title,
        "status": problem.status if status is None else status,
        "code": code,
        "detail": detail,
        "request_id": scope.get("state", {}).get("request_id"),
    }
    if field is not None:
        content["field"] = field
    return content


def _problem_headers(error: ServiceError) -> dict[str, str]:
    if isinstance(error, Unavailable):
        seconds = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        return {"retry-after": str(max(1, math.ceil(seconds)))}
    if PROBLEMS[error.code].status == 413:
        # The rest of the body is not read, so the connection is of no use any more.
        return {"connection": "close"}
    return {}


def _response(content: object) -> Response:
    return Response(encode_json(content), media_type="application/json")


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _log_extra(scope: Scope) -> dict[str, object]:
    return {"request_id": scope.get("state", {}).get("request_id")}
