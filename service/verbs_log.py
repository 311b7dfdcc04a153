"""`ctr replay` and `ctr forget`: what can be done with logged requests."""

import asyncio
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from model.contract.ids import canonical_id
from service.cli import EXIT_GATE
from service.distance import Bounds, Distance
from service.settings import Settings, load_settings
from service.verbs import progress_bar, require_bundle, store_settings

if TYPE_CHECKING:
    from service.replay import Replayed

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@click.argument("log", type=_PATH)
@click.option("--bundle", type=_PATH, help="Bundle directory (CTR_BUNDLE).")
@click.option("--items", type=_PATH, help="Item snapshot, Parquet (CTR_ITEM_SNAPSHOT).")
@click.option("--max-psi", type=float, default=Bounds.max_psi, show_default=True)
@click.option("--max-mean-ratio", type=float, default=Bounds.max_mean_ratio, show_default=True)
@click.option(
    "--min-rank-correlation", type=float, default=Bounds.min_rank_correlation, show_default=True
)
@_JSON
def replay(
    log: Path, bundle: Path | None, items: Path | None, as_json: bool, **bounds: float
) -> None:
    """Score the requests of a log (a file, or its directory) again, and show differences.

    With the bundle and the items that were served, every difference is 0. A bundle that lies
    further from what was answered than the bounds allow is a no-go, and the exit code is 4.
    """
    from service.replay import count_requests
    from service.replay import replay as run_replay
    from service.state import load_serving_state

    settings = load_settings(bundle=bundle, item_snapshot=items)
    bundle = require_bundle(settings)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    num_requests = count_requests(log)
    state = load_serving_state(
        bundle,
        settings.item_snapshot,
        batch=settings.batch,
        with_item_sums=settings.item_sums,
    )
    try:
        with progress_bar() as progress:
            task = progress.add_task("requests", total=num_requests)
            found = run_replay(
                log, state, on_progress=lambda done: progress.update(task, completed=done)
            )
    finally:
        state.runtime.close()
    reasons = found.reasons_against(Bounds(**bounds))
    if as_json:
        content = {**dataclasses.asdict(found), "is_go": not reasons, "reasons": reasons}
        click.echo(json.dumps(content))
    else:
        _show(found, reasons)
    if reasons:
        sys.exit(EXIT_GATE)


def _show(found: "Replayed", reasons: list[str]) -> None:
    names = [field.name for field in dataclasses.fields(Distance)]
    table = Table("", *found.distances)
    for name in names:
        values = (getattr(distance, name) for distance in found.distances.values())
        cells = ("" if value is None else f"{value:.3g}" for value in values)
        table.add_row(name.replace("_", " "), *cells)
    Console().print(table)
    click.echo(f"{found.num_requests:,} requests, {found.num_candidates:,} candidates")
    if found.num_refused:
        click.echo(f"the first that does not fit: {found.first_refusal}")
    click.echo("no-go: " + "; ".join(reasons) if reasons else "go")


@click.command()
@click.argument("user")
@_JSON
def forget(user: str, as_json: bool) -> None:
    """Delete what is held of a user: the record in the store, and logged requests.

    Store, log directory and its key are those of the service (CTR_STORE__URL,
    CTR_REQUEST_LOG__DIR, CTR_REQUEST_LOG__USER_KEY). What a running service has not yet written
    is not found: ask again after CTR_REQUEST_LOG__FLUSH_S.
    """
    from service.request_log import forget_user, user_hash, user_key

    settings = load_settings()
    canonical = canonical_id(user)
    if canonical is None:
        raise click.UsageError("the user id is empty")
    with store_settings(settings) as complete:
        was_stored = asyncio.run(_delete_record(complete, canonical))
    num_logged = 0
    if settings.request_log.dir is not None:
        assert settings.request_log.user_key is not None  # The settings see to it.
        key = user_key(settings.request_log.user_key.get_secret_value())
        num_logged = forget_user(settings.request_log.dir, user_hash(canonical, key))
    if as_json:
        click.echo(json.dumps({"records": int(was_stored), "logged_requests": num_logged}))
        return
    record = "1 record" if was_stored else "no record"
    where = "" if settings.request_log.dir is not None else " (CTR_REQUEST_LOG__DIR is not set)"
    click.echo(f"deleted: {record}, {num_logged} logged requests{where}")


async def _delete_record(settings: Settings, user_id: str) -> bool:
    from service.stores import open_store

    assert settings.store.url is not None  # `store_settings` has set it.
    store = open_store(settings.store.url.get_secret_value(), settings.store)
    try:
        await store.ping()
        return await store.delete(user_id)
    finally:
        await store.aclose()
