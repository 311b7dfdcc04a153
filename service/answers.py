"""Answers as HTTP has them, and every error as application/problem+json; no transport."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

from service.errors import InvalidRequest, Overloaded, ServiceError, StoreError, Unavailable
from service.errors import error_codes as codes_of
from service.trace_context import trace_context_of
from service.wire import encode_json, is_request_id

REQUEST_ID = b"x-request-id"
JSON = b"application/json"
PROBLEM_JSON = b"application/problem+json"
CLOSE = (b"connection", b"close")

Headers = Iterable[tuple[bytes, bytes]]


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
    **dict.fromkeys(codes_of(StoreError), _INTERNAL),
    "not_found": Problem(404, "There is no such path"),
    "method_not_allowed": Problem(405, "The path does not take this method"),
    "http_error": Problem(400, "The request is not valid HTTP for this path"),
}


class Answer(NamedTuple):
    """What goes back to a caller.

    Attributes:
        status: Of HTTP.
        body: Whole.
        media_type: Of the body.
        request_id: The caller's, or one made for it.
        headers: Further ones, names in lower case.
    """

    status: int
    body: bytes
    media_type: bytes
    request_id: str
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """Those of the body, then the further ones; without the request's id."""
        length = b"%d" % len(self.body)
        return [
            (b"content-type", self.media_type),
            (b"content-length", length),
            *self.headers,
        ]


def problem_answer(error: ServiceError, *, request_id: str, headers: Headers = ()) -> Answer:
    """The answer with an error; `headers` are those of the request, names in lower case."""
    field = error.field if isinstance(error, InvalidRequest) else None
    content = problem(error.code, str(error), request_id=request_id, field=field, headers=headers)
    return Answer(
        content["status"], encode_json(content), PROBLEM_JSON, request_id, _headers_of(error)
    )


# Any: JSON values.
def problem(
    code: str,
    detail: str,
    *,
    request_id: str | None,
    status: int | None = None,
    field: str | None = None,
    headers: Headers = (),
) -> dict[str, Any]:
    """The JSON of a problem; `status` in place of the code's own, `headers` of the request."""
    known = PROBLEMS[code]
    content = {
        "type": f"urn:ctr-scoring:problem:{code}",
        "title": known.title,
        "status": known.status if status is None else status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
    }
    if field is not None:
        content["field"] = field
    trace = trace_context_of(headers)
    if trace is not None:
        content["trace_id"] = trace.trace_id
    return content


def http1_bytes(answer: Answer, *, default_headers: Headers = (), is_last: bool = False) -> bytes:
    """The answer as HTTP/1.1 sends it.

    Args:
        answer: What to send.
        default_headers: Of the server.
        is_last: Whether the connection ends with it.
    """
    parts = [_STATUS_LINES[answer.status]]
    for name, value in default_headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (
        b"content-type: %b\r\ncontent-length: %d\r\n" % (answer.media_type, len(answer.body)),
        b"x-request-id: %b\r\n" % answer.request_id.encode(),
    )
    for name, value in answer.headers:
        parts += (name, b": ", value, b"\r\n")
    if is_last and CLOSE not in answer.headers:
        parts.append(b"connection: close\r\n")
    parts += (b"\r\n", answer.body)
    return b"".join(parts)


def request_id_of(headers: Headers) -> str | None:
    """The caller's id for the exchange; None if there is none, or none that can be used."""
    for name, value in headers:
        if name == REQUEST_ID:
            text = str(value, "latin-1")
            if is_request_id(text):
                return text
    return None


_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def _headers_of(error: ServiceError) -> tuple[tuple[bytes, bytes], ...]:
    if isinstance(error, Unavailable):
        seconds = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        return ((b"retry-after", b"%d" % max(1, math.ceil(seconds))),)
    if PROBLEMS[error.code].status == 413:
        # The rest of the body is not read, so the connection is of no use any more.
        return (CLOSE,)
    return ()
