"""Parity trainer = service on real impressions, materialised as of each trip and posted.

    python -m loadtest.parity --run runs/tafe-style --bundle bundles/ID

For each of 50 test requests: the household's record and the item snapshot as of the request's time
are made and stored, the request is posted with its time, and each answer is compared with what the
trainer's network and calibrators say of the same rows of the log.
"""

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import numpy.typing as npt
import polars as pl

from loadtest.rig import running_service
from model.calibrate import calibrated_probabilities
from model.contract.bundle import parity_excess
from model.contract.ids import canonical_id
from model.contract.log_spec import num_unserved
from model.contract.record import pack_record
from model.contract.spec import TimePart, raw_columns
from model.contract.times import format_time
from model.dataset import EncodedSplit, load_data
from model.history import AsOf
from model.logs import read_log, unix_seconds
from model.run import Run, read_run
from model.snapshot import ITEMS, MAX_KEYS
from model.tables import Tables
from model.train import predict
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.embedded import EmbeddedRedis

NUM_REQUESTS, PER_REQUEST = 50, 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request of the test split: rows of the split and of the log's frame."""

    rows: npt.NDArray[np.int64]
    frame: pl.DataFrame
    time: float


@click.command()
@click.option("--run", "run_dir", type=click.Path(path_type=Path), required=True)
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".ctr-cache"))
def main(run_dir: Path, bundle: Path, cache: Path) -> None:
    """Prints the largest differences; exit code 1 when one is outside parity."""
    run = read_run(run_dir)
    data = load_data(run.config, cache=cache, progress=lambda text: click.echo(text, err=True))
    cases = choose_cases(run)
    expected = trainer_predictions(run, data.splits["test"], cases)
    tables = Tables.read(
        events=run.config.data.events,
        items=run.config.data.items,
        users=run.config.data.users,
        schema=run.fitted.schema_,
    )
    view = AsOf(tables, schema=run.fitted.schema_)
    actual = service_answers(view, cases, bundle=bundle)
    report: dict[str, Any] = {
        "requests": len(cases),
        "impressions": sum(len(c.rows) for c in cases),
    }
    all_fit = True
    for name, values in expected.items():
        largest, relative, fits = parity_excess(values, actual[name])
        report[name] = {
            "max_absolute": largest,
            "max_relative": relative,
            "median": float(np.median(values)),
        }
        all_fit &= fits
    click.echo(json.dumps({**report, "within_parity": all_fit}))
    raise SystemExit(0 if all_fit else 1)


def choose_cases(run: Run) -> list[Case]:
    """Requests spread over the test split, each with its first impressions."""
    schema = run.fitted.schema_
    log = read_log(run.config.data, schema=schema, split=run.config.split)
    frame = log.frame.filter(pl.Series(log.split == "test")).with_row_index("_row")
    request = str(schema.log.request_id)
    sizes = frame.group_by(request, maintain_order=True).len().filter(pl.col("len") >= PER_REQUEST)
    rng = np.random.default_rng(7)
    chosen = sizes[np.sort(rng.choice(len(sizes), NUM_REQUESTS, replace=False))][request]
    cases = []
    for value in chosen:
        part = frame.filter(pl.col(request) == value).head(PER_REQUEST)
        time = float(unix_seconds(part[schema.log.time])[0])
        cases.append(Case(rows=part["_row"].to_numpy().astype(np.int64), frame=part, time=time))
    return cases


def trainer_predictions(
    run: Run, test: EncodedSplit, cases: list[Case]
) -> dict[str, npt.NDArray[np.float32]]:
    """By output name, in the order of the cases' rows."""
    logits = predict(run.net, test)[np.concatenate([case.rows for case in cases])]
    conditional = calibrated_probabilities(logits, run.calibrators)
    cumulative = np.cumprod(conditional.astype(np.float64), axis=1).astype(np.float32)
    schema = run.fitted.schema_
    columns = [*cumulative.T[num_unserved(schema.steps) :], conditional[:, -1]]
    return dict(zip(schema.output_names, columns, strict=True))


def service_answers(
    view: AsOf, cases: list[Case], *, bundle: Path
) -> dict[str, npt.NDArray[np.float32]]:
    """By output name; one service per item snapshot, which holds for a whole period."""
    schema = view.schema
    seconds = schema.period_days * 86400.0
    by_period: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        shifted = case.time - schema.availability_lag_s - schema.period_start
        by_period.setdefault(int(shifted // seconds), []).append(index)
    answers: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory, EmbeddedRedis(Path(directory)) as redis:
        for indices in by_period.values():
            items = Path(directory) / ITEMS
            view.item_snapshot(cases[indices[0]].time).write_parquet(items)
            with running_service(bundle=bundle, items=items, store_url=redis.url) as url:
                for index in indices:
                    asyncio.run(_store_record(view, cases[index], redis.url))
                    answers[index] = _post(url, make_request(view, cases[index]))
    rows = [item for index in range(len(cases)) for item in answers[index]]
    return {name: np.array([row[name] for row in rows], np.float32) for name in schema.output_names}


def make_request(view: AsOf, case: Case) -> dict[str, Any]:
    """The request that the page would have made: what is known then, and its time."""
    schema, first = view.schema, case.frame.row(0, named=True)
    context = {
        f.name: first[f.name]
        for f in schema.features
        if f.is_request_side and f.source == "request" and not isinstance(f, TimePart)
    }
    inline = [
        name
        for f in schema.features
        if not f.is_request_side and f.source == "request"
        for name in raw_columns(f)
    ]
    candidates = {name: case.frame[name].to_list() for name in inline}
    return {
        "user_id": first[schema.log.user_id],
        "time": format_time(case.time),
        "context": context,
        "candidates": {"item_id": case.frame[schema.log.item_id].to_list(), **candidates},
        "timeout_ms": 2000,
    }


async def _store_record(view: AsOf, case: Case, url: str) -> None:
    users = case.frame[view.schema.log.user_id].head(1)
    store = open_store(url, StoreSettings())
    try:
        packed = [
            (str(canonical_id(user)), pack_record(record))
            for user, record in view.user_records(case.time, max_keys=MAX_KEYS, only=users)
        ]
        await store.set_many(packed, ttl_s=None)
    finally:
        await store.aclose()


def _post(url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(f"{url}/score", json=request, timeout=10.0)
    response.raise_for_status()
    answer = response.json()
    if answer["degraded"]:
        raise RuntimeError(f"a degraded answer: {answer['degraded']}")
    items: list[dict[str, Any]] = answer["items"]
    return items


if __name__ == "__main__":
    main()
