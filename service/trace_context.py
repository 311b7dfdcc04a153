"""W3C Trace Context: what a caller's `traceparent` and `tracestate` say; knows no transport.

Source: W3C Recommendation "Trace Context", level 1, sections 3.2 and 3.3. A `traceparent` that is
malformed, or there twice, is ignored and the `tracestate` with it; a malformed `tracestate` is
ignored alone. The service calls nobody that could take them further, so they go into its log and
into its problem answers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TRACEPARENT = b"traceparent"
_TRACESTATE = b"tracestate"

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}"
    r"(?P<rest>-.*)?"
)
_KEY = r"[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rf"(?P<key>{_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")
_MAX_MEMBERS = 32


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a request stands in its caller's trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        parent_id: Of the caller's span, 16 hexadecimal digits.
        state: The `tracestate`, as sent; None if there is none, or a malformed one.
    """

    trace_id: str
    parent_id: str
    state: str | None

    def log_fields(self) -> dict[str, str]:
        """For a log line's `extra`."""
        state = {} if self.state is None else {"tracestate": self.state}
        return {"trace_id": self.trace_id, "parent_id": self.parent_id, **state}


def trace_context_of(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The context in a request's headers, whose names are in lower case; None if there is none."""
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == _TRACEPARENT:
            parents.append(value)
        elif name == _TRACESTATE:
            states.append(value)
    if len(parents) != 1:
        return None
    found = _PARENT.fullmatch(str(parents[0], "latin-1").strip(" \t"))
    if found is None or not _is_valid(found):
        return None
    return TraceContext(found["trace"], found["parent"], _state(states))


def _is_valid(found: re.Match[str]) -> bool:
    version = found["version"]
    # Version 00 has nothing behind the flags; later ones may. Version ff is forbidden.
    return (
        version != "ff"
        and (version != "00" or found["rest"] is None)
        and found["trace"].strip("0") != ""
        and found["parent"].strip("0") != ""
    )


def _state(values: list[bytes]) -> str | None:
    text = ",".join(str(value, "latin-1") for value in values)
    members = [member.strip(" \t") for member in text.split(",")]
    matches = [_MEMBER.fullmatch(member) for member in members if member]
    if not matches or len(matches) > _MAX_MEMBERS or None in matches:
        return None
    keys = {match["key"] for match in matches if match is not None}
    return text.strip(" \t") if len(keys) == len(matches) else None
