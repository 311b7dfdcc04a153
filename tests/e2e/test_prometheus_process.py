"""A real Prometheus scrapes a real run: every query of every rule and panel has data."""

import asyncio
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny
from deployed import Query, alerts, as_values, needs, queries
from prometheus_rig import Prometheus, prometheus
from test_serve_process import LIMIT_S, Served, serving, wait_until

from model.contract.encode import Encoder
from model.contract.record import pack_record
from model.histograms import histograms
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.embedded import EmbeddedRedis

pytestmark = [pytest.mark.process, pytest.mark.redis, needs("prometheus")]

NUM_REQUESTS = 180  # before the swaps, and after
BRAND_NEW = {"brand": "nobody knows", "price": 3.0, "display": "5"}
# One of each kind, all but the last two answered; the first has enough candidates for drift.
BODIES: list[dict[str, object]] = [
    {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, 2, 3, 4] * 100},
    {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, 2, 3, 4] * 3},
    {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [{"item_id": 1, "discount": 0.1}] * 4},
    {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [{"item_id": 99, **BRAND_NEW}, 98]},
    {"user_id": "unknown", "time": tiny.NOON_TEXT, "candidates": [1, 2]},
    {"user_id": "corrupt", "time": tiny.NOON_TEXT, "candidates": [1, 2]},
    {"user_id": 7, "time": "2024-01-15T12:00:00Z", "candidates": [1, 2]},
    {"user_id": 7, "context": {"store_id": 31, "unheard": 1}, "candidates": [1]},
    {"user_id": 7, "candidates": []},
    {"user_id": 7, "candidates": [1] * 2000},
]
# Busy machines stall; the service believes a time limit before it has read a body.
PATIENT = {"x-timeout-ms": "2000"}
SETTINGS = {
    "CTR_WORKERS": 2,
    "CTR_RELOAD_POLL_S": 0,
    "CTR_DRAIN_DELAY_MS": 0,
    "CTR_STORE__TIMEOUT_MS": 1000,
    "CTR_HEALTH__SAMPLE_EVERY": 1,
}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, tiny_items: Path) -> Iterator[Prometheus]:
    """After a run with every kind of answer, a swap, and one that was refused."""
    directory = tmp_path_factory.mktemp("scraped")
    bundle = tiny.write(directory / "bundles", histograms=_histograms_of_golden_rows())
    snapshot = Path(shutil.copy(tiny_items, directory / "items.parquet"))
    with EmbeddedRedis(directory / "redis") as redis:
        asyncio.run(_write_records(redis.url))
        with (
            serving(directory, bundle, snapshot, CTR_STORE__URL=redis.url, **SETTINGS) as served,
            prometheus(directory / "prometheus", target=f"127.0.0.1:{served.port}") as server,
        ):
            _run(served, snapshot, server)
            yield server
            served.process.terminate()
            served.wait()


def _histograms_of_golden_rows() -> bytes:
    encoder = Encoder(tiny.fitted_schema())
    blocks = tiny.golden(encoder, tiny.graph(encoder)).blocks
    return histograms(tiny.encoded_split(blocks), encoder).model_dump_json().encode()


async def _write_records(url: str) -> None:
    store = open_store(url, StoreSettings(timeout_ms=5000))
    records = [("7", pack_record(tiny.record())), ("corrupt", b"no record")]
    try:
        await store.set_many(records, ttl_s=None)
    finally:
        await store.aclose()


def _run(served: Served, snapshot: Path, server: Prometheus) -> None:
    _post(served.url, NUM_REQUESTS)
    _post_until_refused(served.url)
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.values('sum(scoring_swaps_total{part="bundle"})') == [2.0])
    snapshot.write_bytes(b"no parquet")
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.values('sum(scoring_swaps_refused_total{part="bundle"})') == [2.0])

    def is_corruption_seen() -> bool:
        # What came before the first scrape is no increase.
        _post(served.url, NUM_REQUESTS)
        found = server.values(
            'sum(increase(scoring_store_errors_total{code="record_corrupt"}[15m]))'
        )
        return found != [] and found[0] > 10

    wait_until(is_corruption_seen)


def _post(url: str, times: int) -> None:
    # Each worker has connections of its own: two are more likely to reach both.
    with httpx.Client(base_url=url) as one, httpx.Client(base_url=url) as other:
        for number in range(times):
            client, body = (one, other)[number % 2], BODIES[number % len(BODIES)]
            status = client.post("/score", json=body, headers=PATIENT).status_code
            assert status in (200, 413, 422)


def _post_until_refused(url: str) -> None:
    async def burst() -> set[int]:
        async with httpx.AsyncClient(base_url=url) as client:
            headers = {"x-timeout-ms": "2"}
            posts = [client.post("/score", json=BODIES[0], headers=headers) for _ in range(50)]
            return {answer.status_code for answer in await asyncio.gather(*posts)}

    wait_until(lambda: 503 in asyncio.run(burst()))


def _has_data(server: Prometheus, query: Query) -> bool:
    return any(map(math.isfinite, server.values(as_values(query.expr))))


def test_every_query_of_every_rule_and_panel_has_data(scraped: Prometheus) -> None:
    asked = queries()
    empty = asked
    limit = time.monotonic() + LIMIT_S / 4
    # Recorded values come with the next evaluations.
    while empty and time.monotonic() < limit:
        empty = [query for query in empty if not _has_data(scraped, query)]
    assert not empty, "no data:\n" + "\n".join(query.where for query in empty)
    assert len(asked) > 150


def test_every_rule_was_evaluated(scraped: Prometheus) -> None:
    groups = scraped.get("rules")["groups"]
    found = {
        rule["name"]: (rule["health"], rule.get("lastError")) for g in groups for rule in g["rules"]
    }
    assert {name: state for name, state in found.items() if state != ("ok", None)} == {}
    assert set(alerts()) <= set(found)


def test_what_the_run_did_is_told(scraped: Prometheus) -> None:
    told = {
        "candidates": "sum(scoring_candidates_total)",
        "corrupt": 'sum(scoring_store_errors_total{code="record_corrupt"})',
        "refused": 'sum(scoring_batch_drops_total{reason=~"backlog|queue_full|queue_time"})',
        "invalid": 'sum(scoring_request_seconds_count{outcome="invalid_request"})',
    }
    assert [name for name, expr in told.items() if scraped.values(expr)[0] < 1] == []


def test_texts_of_alerts_can_be_filled_in(scraped: Prometheus) -> None:
    # Those of the run: a refused swap, a bundle of 2023, records that are corrupt.
    expected = {"ScoringSwapRefused", "ScoringRecordsCorrupt"}

    def are_active() -> bool:
        return expected <= {a["labels"]["alertname"] for a in scraped.get("alerts")["alerts"]}

    wait_until(are_active)  # Alerts come with the next evaluations.
    active = scraped.get("alerts")["alerts"]
    texts = [text for alert in active for text in alert["annotations"].values()]
    assert [text for text in texts if "error" in text or "{{" in text] == []
