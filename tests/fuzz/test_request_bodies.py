"""Whatever is posted, the answer is 200, or a problem that blames the request; never a 500."""

import json
from collections.abc import Iterator
from typing import Any

import anyio.from_thread
import httpx
import pytest
from conftest import StartApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.answers import PROBLEMS
from service.settings import Settings

FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", 1, 1.0, "acme", 10**400, -1, 2**63, 1e300, "\x00", ""])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "age_band", "loyalty", "trips", "last_trip", "recent", "recent_time", "store_id", "basket",
        "item_id", "brand", "price", "display", "discount", "position", "bought_item_count",
        "bought_item_last_time", "bought_brand_count", "bought_brand_last_time", "hour", "user_id",
        "time", "", "visits", "visits_time",
    ]
)  # fmt: skip
FEATURES = st.dictionaries(NAMES, JSON, max_size=6)
IDS = st.integers() | st.text(max_size=5) | st.floats(allow_nan=False) | SCALARS
CANDIDATES = (
    st.lists(IDS, max_size=5)
    | st.lists(st.builds(lambda i, f: {**f, "item_id": i}, IDS, FEATURES), max_size=4)
    | st.integers(0, 4).flatmap(
        lambda n: st.dictionaries(NAMES, st.lists(JSON, min_size=n, max_size=n), max_size=5)
    )
    | JSON
)
TIMES = (
    st.sampled_from(
        ["2023-11-15T12:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
    )
    | JSON
)
BODIES = st.fixed_dictionaries(
    {"user_id": IDS, "candidates": CANDIDATES},
    optional={
        "time": TIMES,
        "context": FEATURES | JSON,
        "user_features": FEATURES | JSON,
        "request_id": JSON,
        "timeout_ms": st.just(20_000) | JSON,
        "other": JSON,
    },
)


class Poster:
    """Posts from a thread without an event loop, which hypothesis needs."""

    def __init__(self, portal: anyio.from_thread.BlockingPortal, client: httpx.AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def __call__(self, content: bytes) -> httpx.Response:
        async def post() -> httpx.Response:
            return await self._client.post("/score", content=content)

        return self._portal.call(post)


@pytest.fixture
def post(settings: Settings, start_app: StartApp) -> Iterator[Poster]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(start_app(settings)) as running,
    ):
        yield Poster(portal, running.client)


def assert_answered(response: httpx.Response) -> None:
    if response.status_code == 200:
        for item in response.json()["items"]:
            assert 0 <= item["pctcvr"] <= item["pctr"] <= 1
        return
    problem = response.json()
    assert response.status_code in (413, 422), problem
    assert PROBLEMS[problem["code"]].status == response.status_code
    assert problem["code"] != "invalid_request" or problem["field"]


@FUZZ
@given(body=BODIES)
def test_any_json_body_is_answered_or_refused(post: Poster, body: Any) -> None:
    assert_answered(post(json.dumps(body).encode("utf-8", "surrogatepass")))


@FUZZ
@given(body=BODIES, data=st.data())
def test_any_damaged_body_is_answered_or_refused(
    post: Poster, body: Any, data: st.DataObject
) -> None:
    content = bytearray(json.dumps(body).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 1] = data.draw(st.binary(max_size=2))
        if not content:
            break
    assert_answered(post(bytes(content)))


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes_are_answered_or_refused(post: Poster, content: bytes) -> None:
    assert_answered(post(content))


@FUZZ
@given(
    features=st.dictionaries(
        st.sampled_from(["trips", "last_trip", "age_band", "loyalty"]),
        st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    ),
    prices=st.lists(
        st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=5,
    ),
)
def test_any_finite_numbers_give_probabilities_or_a_reason(
    post: Poster, features: dict[str, Any], prices: list[Any]
) -> None:
    candidates = {"item_id": [1] * len(prices), "price": prices, "discount": prices}
    body = {"user_id": 1, "user_features": features, "candidates": candidates}
    response = post(json.dumps(body).encode())
    if response.status_code == 200:
        statuses = {item["status"] for item in response.json()["items"]}
        assert statuses <= {"ok", "non_finite"}
    else:
        assert response.status_code == 422
