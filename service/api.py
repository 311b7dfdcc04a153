"""The ASGI app: routes, request ids, errors of the framework. Scores nothing itself.

Most requests of `POST /score` never come here: `service.http1` answers them below ASGI. The
endpoint is for all others, and for servers that speak another protocol.
"""

import asyncio
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.answers import (
    CLOSE,
    PROBLEM_JSON,
    REQUEST_ID,
    problem,
    problem_answer,
    request_id_of,
)
from service.dashboard.page import load_page
from service.errors import DeadlineExceeded, ServiceError
from service.exchange import Disconnected, ScoreExchange, Scoring
from service.exposition import CONTENT_TYPE
from service.gate import Head
from service.openapi import openapi_document
from service.settings import LimitSettings
from service.status import ServiceStatus
from service.wire import encode_explanation, encode_json, parse_body, too_large

# Key of a request's state: when it reached this machine, in `time.monotonic`. Set by a protocol
# that has asked the gate already.
ARRIVED_AT = "arrived_at"

# Candidates of one request: the model is asked about each as often as there are features.
MAX_EXPLAINED = 20

_CODES_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}


class ScoreEndpoint:
    """ASGI endpoint of `POST /score`."""

    def __init__(self, exchange: ScoreExchange, *, limits: LimitSettings) -> None:
        """Takes who answers."""
        self._exchange = exchange
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; a caller that hangs up gets nothing."""
        state = scope["state"]

        async def read_body(head: Head) -> bytes | bytearray:
            return await _read_body(receive, head, self._limits)

        try:
            answer = await self._exchange.receive_and_answer(
                scope["headers"],
                read_body,
                request_id=state["request_id"],
                arrived_at=state.get(ARRIVED_AT),
            )
        except Disconnected:
            return
        state["request_id"] = answer.request_id
        start = {"type": "http.response.start", "status": answer.status}
        await send({**start, "headers": answer.all_headers()})
        await send({"type": "http.response.body", "body": answer.body})


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
                headers = [*message.get("headers", ()), (REQUEST_ID, state["request_id"].encode())]
                if self._status.is_draining:
                    headers.append(CLOSE)
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_id)


def add_routes(app: FastAPI, scoring: Scoring, *, limits: LimitSettings) -> None:
    """Adds every route, error handler and the request ids to the app."""
    endpoint = ScoreEndpoint(scoring.exchange, limits=limits)
    app.router.routes.append(Route("/score", endpoint, methods=["POST"]))
    app.add_middleware(RequestIdMiddleware, status=scoring.status, new_id=scoring.new_id)
    _add_explain(app, scoring, limits)
    _add_operations(app, scoring.status)
    _add_error_handlers(app)
    app.openapi = openapi_document  # type: ignore[method-assign]  # FastAPI's documented way


def _add_explain(app: FastAPI, scoring: Scoring, limits: LimitSettings) -> None:
    few = limits.model_copy(update={"max_candidates": MAX_EXPLAINED})

    @app.post("/explain", include_in_schema=False)
    async def explain(request: Request) -> Response:
        head = scoring.gate.read_head(request.headers.raw, arrived_at=None)
        scoring.gate.check(head)
        data = await _read_body(request.receive, head, limits)
        body = parse_body(data, limits=few)
        request_id = body.request_id or request.scope["state"]["request_id"]
        request.scope["state"]["request_id"] = request_id
        deadline = scoring.gate.deadline(head, timeout_ms=body.timeout_ms)
        explanation = await scoring.status.require_scorer().explain(body.request, deadline=deadline)
        content = encode_explanation(explanation, request_id=request_id)
        return Response(content, media_type="application/json")


def _add_operations(app: FastAPI, status: ServiceStatus) -> None:
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

    page = load_page()

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> Response:
        return Response(page.body, headers=page.headers, media_type="text/html")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, ServiceError)
        return _problem_response(request.scope, exc)

    @app.exception_handler(Disconnected)
    async def on_hang_up(request: Request, exc: Exception) -> Response:
        del request, exc
        return Response()  # Nobody reads it.

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = _CODES_BY_STATUS.get(exc.status_code, "http_error")
        content = problem(
            code,
            str(exc.detail),
            request_id=request.scope["state"]["request_id"],
            status=exc.status_code,
            headers=request.scope["headers"],
        )
        return Response(
            encode_json(content),
            exc.status_code,
            headers=exc.headers,
            media_type=PROBLEM_JSON.decode(),
        )

    @app.exception_handler(Exception)
    async def on_bug(request: Request, exc: Exception) -> Response:
        del exc  # The framework logs it.
        return _problem_response(request.scope, ServiceError("see the service's log"))


async def _read_body(receive: Receive, head: Head, limits: LimitSettings) -> bytes | bytearray:
    limit = limits.body_limit_bytes
    if head.body_bytes > limit:
        raise too_large(limits)
    deadline = head.arrived_at + limits.max_timeout_ms / 1000
    data = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                data += message.get("body", b"")
                if len(data) > limit or not message.get("more_body", False):
                    break
    except TimeoutError as exc:
        raise DeadlineExceeded("the request body did not arrive in time") from exc
    if len(data) > limit:
        raise too_large(limits)
    return data


def _problem_response(scope: Scope, error: ServiceError) -> Response:
    answer = problem_answer(
        error, request_id=scope["state"]["request_id"], headers=scope["headers"]
    )
    headers = {name.decode(): value.decode() for name, value in answer.all_headers()}
    return Response(answer.body, answer.status, headers=headers)


def _response(content: object) -> Response:
    return Response(encode_json(content), media_type="application/json")
