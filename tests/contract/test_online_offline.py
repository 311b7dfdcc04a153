"""What the service answers is what encoder and graph say of the same raw rows, and of an upload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import tiny
from conftest import RunningApp

from model.contract.blocks import Blocks
from model.contract.ids import hash_ids
from model.contract.record import HistoryEntries, MatchEntries, RecentEntries, UserRecord
from model.contract.times import format_time
from service.state import ServingState

pytestmark = pytest.mark.anyio

NUM_REQUESTS = 60
# Alone against batched: batching changes the last bits.
TOLERANCE = 1e-6

ITEMS = tiny.item_snapshot().drop("colour").rows_by_key("item_id", named=True, unique=True)


class Impressions:
    """One request as a log has it (offline) and as it is posted (online)."""

    def __init__(self, rng: np.random.Generator, user_id: int) -> None:
        self.user_id = user_id
        self.time = float(tiny.NOON + rng.integers(-300, 300) * 3600)
        num_rows = int(rng.choice([1, 2, 7, 30]))
        self.item_ids = [int(i) for i in rng.integers(1, 7, num_rows)]
        self.context = {"store_id": str(rng.integers(1, 4)), "basket": _maybe(rng, 5.0)}
        self.inline = {
            "display": [str(i) if i else None for i in rng.choice([0, 1, 5, 9], num_rows)],
            "discount": [_maybe(rng, float(x)) for x in rng.random(num_rows)],
        }
        self.loyalty = _maybe(rng, "gold")
        self.scalars = {
            "age_band": _maybe(rng, "65+"),
            "trips": _maybe(rng, int(rng.integers(0, 90))),
            "last_trip": _maybe(rng, tiny.NOON - float(rng.integers(-50, 500)) * 3600),
        }
        events = sorted(float(t) for t in rng.integers(-100, 500, 6) * 3600)
        self.history_times = [int(tiny.NOON - t) for t in events]
        self.history = [int(i) for i in rng.integers(1, 7, 6)]
        visits = sorted(float(t) for t in rng.integers(-100, 900, int(rng.integers(8))) * 3600)
        self.visit_times = [int(tiny.NOON - t) for t in visits]
        self.visits = rng.integers(0, 40, len(visits)).tolist()
        stores = rng.integers(1, 4, len(visits)).tolist()
        self.visit_stores = [_maybe(rng, str(store)) for store in stores]
        self.bought_items = {str(i): _bought(rng) for i in (1, 3, 6)}
        self.bought_brands = {name: _bought(rng) for name in ("acme", "7")}

    @property
    def record(self) -> UserRecord:
        return UserRecord(
            updated_at=tiny.NOON,
            features=self.scalars,
            matches={
                "bought_item": _entries(self.bought_items),
                "bought_brand": _entries(self.bought_brands),
            },
            histories={
                "recent": HistoryEntries(
                    ids=tuple(self.history), times=np.array(self.history_times, np.int64)
                )
            },
            recents={
                "visits": RecentEntries(
                    values=np.array(self.visits, np.float32),
                    times=np.array(self.visit_times, np.int64),
                    keys=hash_ids(self.visit_stores),
                )
            },
        )

    @property
    def body(self) -> dict[str, Any]:
        return {
            "user_id": self.user_id,
            "time": format_time(self.time),
            "context": self.context,
            "user_features": {"loyalty": self.loyalty},
            "candidates": {"item_id": self.item_ids, **self.inline},
        }

    def offline(self, state: ServingState) -> dict[str, np.ndarray[Any, Any]]:
        request = {name: [value] for name, value in {**self.context, **self.scalars}.items()}
        request |= {"recent": [self.history], "recent_time": [self.history_times]}
        request |= {"visits": [self.visits], "visits_time": [self.visit_times]}
        request |= {"visits_store_id": [self.visit_stores]}
        request |= {"loyalty": [self.loyalty]}
        brands = [ITEMS.get(i, {}).get("brand") for i in self.item_ids]
        seen = [self.bought_items.get(str(i), (None, None)) for i in self.item_ids]
        seen_brands = [self.bought_brands.get(brand or "", (None, None)) for brand in brands]
        candidate: dict[str, list[Any]] = {
            "item_id": self.item_ids,
            "brand": brands,
            "price": [ITEMS.get(i, {}).get("price") for i in self.item_ids],
            "bought_item_count": [count for count, _ in seen],
            "bought_item_last_time": [time for _, time in seen],
            "bought_brand_count": [count for count, _ in seen_brands],
            "bought_brand_last_time": [time for _, time in seen_brands],
            **self.inline,
        }
        num_rows = len(self.item_ids)
        blocks = Blocks(
            request=state.encoder.request_block(request, time=np.array([self.time])),
            candidate=state.encoder.candidate_block(candidate, time=np.full(num_rows, self.time)),
            request_of=np.zeros(num_rows, np.int64),
        )
        return dict(state.runtime.run(blocks))


def _maybe(rng: np.random.Generator, value: Any) -> Any:
    return value if rng.random() < 0.7 else None


def _bought(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(1, 9)), int(tiny.NOON + rng.integers(-3000, 300) * 3600)


def _entries(bought: dict[str, tuple[int, int]]) -> MatchEntries:
    keys = hash_ids(bought)
    order = np.argsort(keys)
    counts, times = zip(*bought.values(), strict=True)
    return MatchEntries(
        keys=keys[order],
        counts=np.array(counts, np.uint32)[order],
        last_times=np.array(times, np.int64)[order],
    )


def assert_same(answer: httpx.Response, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert answer.status_code == 200
    items = pl.DataFrame(answer.json()["items"])
    assert len(expected) == 3
    for name, values in expected.items():
        np.testing.assert_allclose(items[name].to_numpy(), values, rtol=0, atol=TOLERANCE)


@asynccontextmanager
async def loaded(running: RunningApp) -> AsyncIterator[list[Impressions]]:
    rng = np.random.default_rng(11)
    requests = [Impressions(rng, user_id) for user_id in range(100, 100 + NUM_REQUESTS)]
    for request in requests:
        await running.put_record(str(request.user_id), request.record)
    yield requests


async def test_alone_the_service_answers_what_the_graph_says(
    running: RunningApp, tiny_state: ServingState
) -> None:
    async with loaded(running) as requests:
        for request in requests:
            answer = await running.client.post("/score", json=request.body)
            assert_same(answer, request.offline(tiny_state))


async def test_in_a_batch_the_service_answers_what_the_graph_says(
    running: RunningApp, tiny_state: ServingState
) -> None:
    async with loaded(running) as requests:
        answers = await asyncio.gather(
            *(running.client.post("/score", json=request.body) for request in requests)
        )

    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, request.offline(tiny_state))


async def test_requests_differ_so_that_the_comparison_means_something(
    running: RunningApp, tiny_state: ServingState
) -> None:
    async with loaded(running) as requests:
        first = [request.offline(tiny_state)["pctr"][0] for request in requests]

    assert len(set(first)) == NUM_REQUESTS
