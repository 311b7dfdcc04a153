"""Cases of the W3C recommendation's sections 3.2 and 3.3."""

import pytest

from service.trace_context import TraceContext, trace_context_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{PARENT}-01"


def context(parent: str | None, *states: str) -> TraceContext | None:
    headers = [(b"host", b"x")]
    if parent is not None:
        headers.append((b"traceparent", parent.encode("latin-1")))
    headers += [(b"tracestate", state.encode("latin-1")) for state in states]
    return trace_context_of(headers)


@pytest.mark.parametrize(
    "parent",
    [
        VALID,
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-ff",
        f" {VALID}\t",
        f"01-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like",
    ],
)
def test_valid_parent_is_read(parent: str) -> None:
    assert context(parent) == TraceContext(TRACE, PARENT, None)


@pytest.mark.parametrize(
    "parent",
    [
        None,
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}0-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-0x",
        f"00-{TRACE}-{PARENT}-01-more",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"cc-{TRACE}-{PARENT}-011",
        f"0-{TRACE}-{PARENT}-01",
        f"{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\xff",
        f"{VALID},{VALID}",
    ],
)
def test_malformed_parent_is_ignored_and_the_state_with_it(parent: str | None) -> None:
    assert context(parent, "congo=t61rcWkgMzE") is None


def test_parent_that_is_there_twice_is_ignored() -> None:
    headers = [(b"traceparent", VALID.encode())] * 2

    assert trace_context_of(headers) is None


@pytest.mark.parametrize(
    ("states", "read"),
    [
        (["congo=t61rcWkgMzE"], "congo=t61rcWkgMzE"),
        (["rojo=1,congo=2"], "rojo=1,congo=2"),
        (["rojo=1", "congo=2"], "rojo=1,congo=2"),
        (["rojo=1 , congo=2,"], "rojo=1 , congo=2,"),
        (["fw529a3039@dt=FfAdH-nE", "a_-*/0=!~ x"], "fw529a3039@dt=FfAdH-nE,a_-*/0=!~ x"),
        ([",".join(f"k{i}=v" for i in range(32))], ",".join(f"k{i}=v" for i in range(32))),
        (["k=" + "v" * 256], "k=" + "v" * 256),
    ],
)
def test_state_is_read(states: list[str], read: str) -> None:
    found = context(VALID, *states)

    assert found is not None
    assert found.state == read


@pytest.mark.parametrize(
    "state",
    [
        "",
        " , ",
        "rojo",
        "rojo=",
        "Rojo=1",
        "1rojo=1",
        "rojo=1,rojo=2",
        "rojo=a=b",
        "rojo=\xe9",
        "tenant@1=1",
        "k=" + "v" * 257,
        "k" * 257 + "=v",
        ",".join(f"k{i}=v" for i in range(33)),
    ],
)
def test_malformed_state_is_ignored_alone(state: str) -> None:
    assert context(VALID, state) == TraceContext(TRACE, PARENT, None)


def test_log_has_what_the_caller_sent() -> None:
    found = context(VALID, "rojo=1")

    assert found is not None
    assert found.log_fields() == {"trace_id": TRACE, "parent_id": PARENT, "tracestate": "rojo=1"}
