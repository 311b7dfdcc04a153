"""What callers see when Redis stops or dies under load, and how soon full answers are back.

    python -m loadtest.outage --bundle DIR --items items.parquet --records records.parquet \
        --request request.json

The service runs at half of the rate it saturates at. Twice, Redis goes away for a while: once
stopped (SIGSTOP, connections stay open and silent), once killed and started again.
"""

import asyncio
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import polars as pl

from loadtest.openloop import (
    HttpClient,
    Outcome,
    measure_saturation,
    quantiles_ms,
    run_open_loop,
)
from loadtest.rig import RedisProcess, running_service
from service.materialize import load_records
from service.settings import StoreSettings
from service.stores import open_store

BEFORE_S, AWAY_S, AFTER_S = 4.0, 6.0, 6.0
MAX_BODIES = 200


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--items", type=click.Path(path_type=Path), required=True)
@click.option("--records", type=click.Path(path_type=Path), required=True)
@click.option("--request", "request_file", type=click.Path(path_type=Path), required=True)
@click.option("--timeout-ms", default=100, show_default=True, help="The requests' deadline.")
def main(bundle: Path, items: Path, records: Path, request_file: Path, timeout_ms: int) -> None:
    """Prints one JSON object per fault."""
    bodies = make_bodies(request_file, records, timeout_ms=timeout_ms)
    with tempfile.TemporaryDirectory() as directory:
        server = RedisProcess(Path(directory))
        server.start()
        try:
            asyncio.run(_fill(server.url, records))
            with running_service(bundle=bundle, items=items, store_url=server.url) as url:
                for fault in ("stopped", "killed"):
                    report = asyncio.run(
                        _one_fault(url, bodies, server, fault=fault, timeout_ms=timeout_ms)
                    )
                    click.echo(json.dumps(report))
        finally:
            server.end()


def make_bodies(request_file: Path, records: Path, *, timeout_ms: int) -> list[bytes]:
    """The request once for each of many users that have a record."""
    request = json.loads(request_file.read_bytes())
    users = pl.read_parquet(records, columns=["user_id"])["user_id"].head(MAX_BODIES)
    request["timeout_ms"] = timeout_ms
    return [msgspec.json.encode({**request, "user_id": user}) for user in users]


async def _fill(url: str, records: Path) -> None:
    store = open_store(url, StoreSettings())
    try:
        await load_records(records, store, ttl_s=None)
    finally:
        await store.aclose()


async def _one_fault(
    url: str, bodies: list[bytes], server: RedisProcess, *, fault: str, timeout_ms: int
) -> dict[str, Any]:  # Any: JSON
    client = HttpClient(url)
    await measure_saturation(client, bodies, concurrency=8, seconds=2.0)  # warm-up
    saturation = await measure_saturation(client, bodies, concurrency=8, seconds=4.0)
    away, back = _fault(server, fault)
    marks: dict[str, float] = {}
    start = time.monotonic()

    async def inject() -> None:
        await asyncio.sleep(BEFORE_S)
        marks["away"] = time.monotonic() - start
        await asyncio.to_thread(away)
        await asyncio.sleep(AWAY_S)
        await asyncio.to_thread(back)
        marks["back"] = time.monotonic() - start

    total = BEFORE_S + AWAY_S + AFTER_S
    outcomes, _ = await asyncio.gather(
        run_open_loop(client, bodies, rate=saturation / 2.0, seconds=total, seed=1), inject()
    )
    await client.aclose()
    return _report(outcomes, marks, fault=fault, saturation=saturation, timeout_ms=timeout_ms)


def _fault(server: RedisProcess, fault: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """What takes the server away, and what brings it back."""
    if fault == "stopped":
        pid = server.pid
        return (lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT))
    return (lambda: server.end(signal.SIGKILL), server.start)


def _report(
    outcomes: list[Outcome],
    marks: dict[str, float],
    *,
    fault: str,
    saturation: float,
    timeout_ms: int,
) -> dict[str, Any]:
    degraded = [
        outcome.status == 200 and bool(json.loads(outcome.body)["degraded"]) for outcome in outcomes
    ]
    during = [o for o in outcomes if marks["away"] <= o.scheduled < marks["back"]]
    last_degraded = max(
        (o.scheduled for o, flag in zip(outcomes, degraded, strict=True) if flag), default=0.0
    )
    after_away = [
        flag
        for o, flag in zip(outcomes, degraded, strict=True)
        if marks["away"] + 0.1 <= o.scheduled < marks["back"]
    ]
    return {
        "fault": fault,
        "saturation_per_s": round(saturation),
        "offered_per_s": round(saturation / 2.0),
        "requests": len(outcomes),
        "statuses": dict(Counter(str(outcome.status) for outcome in outcomes)),
        "degraded": sum(degraded),
        "degraded_share_while_away": round(sum(after_away) / max(len(after_away), 1), 4),
        "latency_ms_before": quantiles_ms([o for o in outcomes if o.scheduled < marks["away"]]),
        "latency_ms_while_away": quantiles_ms(during),
        "deadline_ms": timeout_ms,
        "full_answers_after_return_s": round(max(last_degraded - marks["back"], 0.0), 3),
        "generator_late_ms_p99": round(
            1e3 * sorted(o.late for o in outcomes)[int(0.99 * len(outcomes))], 2
        ),
    }


if __name__ == "__main__":
    main()
