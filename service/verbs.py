"""The service's verbs of `ctr`: serve, score, load-records. Each parses, calls, prints."""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from model.contract.errors import LogError
from model.contract.ids import canonical_id
from service.settings import MAX_INLINE_US, Settings, load_settings

_log = logging.getLogger(__name__)

_PARQUET_MAGIC = b"PAR1"
_SCORE_TIMEOUT_S = 60.0
_DEFAULT_TTL_S = 30 * 24 * 3600

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--bundle", type=_PATH, help="Bundle directory (CTR_BUNDLE).")
@click.option("--items", type=_PATH, help="Item snapshot, Parquet (CTR_ITEM_SNAPSHOT).")
@click.option("--host", help="Address to listen on (CTR_HOST).")
@click.option("--port", type=int, help="Port to listen on, 0 for a free one (CTR_PORT).")
@click.option("--workers", type=int, help="Processes, 0 for one per CPU core (CTR_WORKERS).")
def serve(
    bundle: Path | None,
    items: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
) -> None:
    """Answer POST /score from a bundle until SIGTERM or Ctrl-C.

    Without CTR_STORE__URL a Redis server of its own keeps user records in CTR_STORE__DATA_DIR.
    """
    from service.log_lines import configure_logging

    settings = load_settings(
        bundle=bundle, item_snapshot=items, host=host, port=port, workers=workers
    )
    require_bundle(settings)
    configure_logging(settings.log_level)
    settings = _fit_to_cpu(settings)

    # Whoever waits for a bundle is asked by others whether there is one: /readyz tells them.
    state = "listening" if settings.wait_for_bundle else "ready"

    def announce(url: str) -> None:
        click.echo(f"ctr serve: {state}, POST {url}/score, documentation at {url}/docs", err=True)

    with store_settings(settings) as complete:
        code = _serve(complete, announce)
    sys.exit(code)


def _serve(settings: Settings, announce: Callable[[str], None]) -> int:
    from service.run_directory import run_directory

    with run_directory() as directory:
        if settings.workers > 1:
            from service.supervisor import Supervisor

            return Supervisor(settings, directory=directory, announce=announce).run()
        from service.app import create_app
        from service.item_files import ItemFiles
        from service.server import run_server

        open_items = ItemFiles(directory, log_level=settings.log_level)
        app = create_app(settings, open_items=open_items)
        return run_server(app, settings, announce=announce)


def _fit_to_cpu(settings: Settings) -> Settings:
    """With a number of workers, and model runs on the loop where a worker has one core only.

    Says so if more is to run at once than there are cores.
    """
    from service.cpu_limits import read_cpu_limits

    limits = read_cpu_limits()
    workers = settings.workers or limits.whole_cores
    threads = workers * settings.batch.num_runners * settings.batch.intra_op_threads
    if threads > limits.cores:
        _log.warning(
            "%d workers x %d runners x %d threads are more than the %.3g CPU cores available "
            "(affinity %d, container quota %s)",
            workers,
            settings.batch.num_runners,
            settings.batch.intra_op_threads,
            limits.cores,
            limits.affinity,
            "none" if limits.quota is None else f"{limits.quota:.3g}",
        )
    batch = settings.batch
    if batch.inline_us is None and limits.whole_cores < 2 * workers:
        batch = batch.model_copy(update={"inline_us": MAX_INLINE_US})
    return settings.model_copy(update={"workers": workers, "batch": batch})


@click.command()
@click.argument("request_file", type=click.File("rb"), default="-", metavar="[REQUEST]")
@click.option("--bundle", type=_PATH, help="Bundle directory (CTR_BUNDLE).")
@click.option("--items", type=_PATH, help="Item snapshot, Parquet (CTR_ITEM_SNAPSHOT).")
@click.option(
    "--record",
    type=_PATH,
    help="The user's record: its packed bytes, or a records file (Parquet) to look it up in.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as POST /score gives it.")
def score(
    request_file: Any,  # Any: click's binary file
    bundle: Path | None,
    items: Path | None,
    record: Path | None,
    as_json: bool,
) -> None:
    """Score one request, as for POST /score, from a file or stdin, without a server."""
    settings = load_settings(bundle=bundle, item_snapshot=items)
    bundle = require_bundle(settings)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    answer = asyncio.run(_score(settings, bundle, request_file.read(), record, as_json=as_json))
    if as_json:
        click.echo(answer)
    else:
        _print_answer(json.loads(answer))


@click.command()
@click.argument("records", type=_PATH)
@click.option(
    "--ttl-s",
    type=click.IntRange(min=0),
    default=_DEFAULT_TTL_S,
    show_default=True,
    help="Seconds until the records expire; 0 keeps them.",
)
def load_records(records: Path, ttl_s: int) -> None:
    """Write the user records of a file (Parquet: user_id, record) to the online store.

    Without CTR_STORE__URL they go to the Redis server that `ctr serve` would start.
    """
    from service.materialize import count_records

    settings = load_settings()
    num_records = count_records(records)
    with store_settings(settings) as complete, progress_bar() as progress:
        task = progress.add_task("user records", total=num_records)
        num_written = asyncio.run(
            _load_records(
                complete,
                records,
                ttl_s or None,
                on_progress=lambda done: progress.update(task, completed=done),
            )
        )
    click.echo(f"{num_written} user records written")


def require_bundle(settings: Settings) -> Path:
    """The bundle's directory.

    Raises:
        UsageError: Neither the option nor the variable names one.
    """
    if settings.bundle is None:
        raise click.UsageError("no bundle: give --bundle DIR or set CTR_BUNDLE")
    return settings.bundle


@contextlib.contextmanager
def store_settings(settings: Settings) -> Iterator[Settings]:
    """Settings with the URL of a store: of a Redis server of our own if none is set.

    Raises:
        StoreUnavailable: The server cannot be started.
    """
    if settings.store.url is not None:
        yield settings
        return
    from service.stores.embedded import EmbeddedRedis

    with EmbeddedRedis(settings.store.data_dir) as server:
        store = settings.store.model_copy(update={"url": SecretStr(server.url)})
        yield settings.model_copy(update={"store": store})


async def _load_records(
    settings: Settings, path: Path, ttl_s: int | None, *, on_progress: Callable[[int], None]
) -> int:
    from service.materialize import load_records as load
    from service.stores import open_store

    assert settings.store.url is not None  # `store_settings` has set it.
    store = open_store(settings.store.url.get_secret_value(), settings.store)
    try:
        await store.ping()
        return await load(path, store, ttl_s=ttl_s, on_progress=on_progress)
    finally:
        await store.aclose()


async def _score(
    settings: Settings, bundle: Path, data: bytes, record_path: Path | None, *, as_json: bool
) -> bytes:
    from service.observe import Metrics
    from service.scorer import Scorer
    from service.state import load_serving_state
    from service.stores.memory import MemoryStore
    from service.wire import encode_answer, parse_body

    body = parse_body(data, limits=settings.limits)
    state = load_serving_state(
        bundle,
        settings.item_snapshot,
        batch=settings.batch,
        with_item_sums=settings.item_sums,
    )
    metrics, store = Metrics(), MemoryStore()
    batcher = state.make_batcher(batch=settings.batch, observer=metrics)
    try:
        record = None if record_path is None else _read_record(record_path, body.request.user_id)
        if record is not None:
            await store.set_many([record], ttl_s=None)
        scorer = Scorer(
            state, store=store, batcher=batcher, metrics=metrics, settings=settings.store
        )
        deadline = asyncio.get_running_loop().time() + _SCORE_TIMEOUT_S
        result = await scorer.score(body.request, deadline=deadline)
    finally:
        await batcher.close(0)
        state.runtime.close()
        await store.aclose()
    layout = body.layout if as_json else "rows"  # a table has rows
    return encode_answer(result, request_id=body.request_id or "ctr-score", layout=layout)


def _read_record(path: Path, user_id: object) -> tuple[str, bytes] | None:
    from service.materialize import find_record

    try:
        canonical = canonical_id(user_id)
    except TypeError:
        return None  # The scorer names the field.
    if canonical is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise LogError(f"record {path}: {exc.strerror}", path=path) from exc
    if data.startswith(_PARQUET_MAGIC):
        found = find_record(path, canonical)
        return None if found is None else (canonical, found)
    return canonical, data


def _print_answer(answer: dict[str, Any]) -> None:  # Any: JSON values
    console = Console()
    notes = [f"bundle {answer['bundle']}", f"user {answer['user_status']}"]
    notes += [f"degraded: {name}" for name in answer["degraded"]]
    if answer["ignored_features"]:
        notes.append("ignored: " + ", ".join(answer["ignored_features"]))
    table = Table(caption=", ".join(notes), caption_justify="left")
    names = list(answer["items"][0])
    for name in names:
        table.add_column(name, justify="left" if name in ("item_id", "status") else "right")
    for item in answer["items"]:
        table.add_row(*(_cell(name, item[name]) for name in names))
    console.print(table)


def _cell(name: str, value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) and name != "item_id" else str(value)


def progress_bar() -> Progress:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
