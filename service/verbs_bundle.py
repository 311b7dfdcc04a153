"""`ctr bundle`: publish, list, roll back, and see whether the service has followed."""

import json
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from service.cli import EXIT_GATE
from service.registry import CURRENT, Move, Registry, RegistryError

_PATH = click.Path(path_type=Path)
_REGISTRY = click.option(
    "--registry", type=_PATH, required=True, help="Folder of published bundles."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

_POLL_S = 0.2
_ASK_TIMEOUT_S = 5.0


class Served(NamedTuple):
    """What a service says of itself.

    Attributes:
        workers: How many serve, by bundle id.
        ready: How many take requests.
        refused: How many bundles were refused since it began, summed over the workers.
    """

    workers: Counter[str]
    ready: int
    refused: int


@click.group()
def bundle() -> None:
    """Change the bundle in service, without a restart and without a lost request.

    A service follows a registry if CTR_BUNDLE is REGISTRY/current.
    """


@bundle.command()
@click.argument("path", type=_PATH, metavar="BUNDLE")
@_REGISTRY
@_JSON
def publish(path: Path, registry: Path, as_json: bool) -> None:
    """Copy a bundle into the registry, verified, and point to it."""
    registry.mkdir(parents=True, exist_ok=True)
    _tell(Registry(registry), Registry(registry).publish(path), as_json)


@bundle.command()
@_REGISTRY
@click.option(
    "--to", metavar="ID", help="A bundle, or the beginning of its id; else the one before."
)
@_JSON
def rollback(registry: Path, to: str | None, as_json: bool) -> None:
    """Point to a bundle that was published before."""
    _tell(Registry(registry), Registry(registry).roll_back(to), as_json)


@bundle.command(name="list")
@_REGISTRY
@_JSON
def list_(registry: Path, as_json: bool) -> None:
    """Show every bundle in the registry, and which one is pointed to."""
    found = Registry(registry)
    current = found.current
    last_moves = {move.bundle: move.at for move in found.history()}
    if as_json:
        rows = [
            {
                "bundle": manifest.bundle_id,
                "is_current": manifest.bundle_id == current,
                "made": manifest.created_at,
                "last_move": last_moves.get(manifest.bundle_id),
                "schema": manifest.schema_sha256,
                "steps": list(manifest.steps),
            }
            for manifest in found.versions()
        ]
        click.echo(json.dumps({"bundles": rows}))
        return
    bundle_column = Column("bundle", no_wrap=True)
    table = Table("", bundle_column, "made", "last pointed to", "schema", "steps")
    for manifest in found.versions():
        table.add_row(
            "*" if manifest.bundle_id == current else "",
            manifest.bundle_id,
            manifest.created_at,
            last_moves.get(manifest.bundle_id, ""),
            manifest.schema_sha256[:8],
            " -> ".join(manifest.steps),
        )
    Console().print(table)


@bundle.command()
@_REGISTRY
@click.option("--url", help="Of a service: also shows which bundle each of its workers serves.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="With --url: how long all workers may take to follow; exit code 4 if one has not.",
)
@_JSON
def status(registry: Path, url: str | None, wait_s: float, as_json: bool) -> None:
    """Show where the pointer is, and whether all workers of a service have followed."""
    found = Registry(registry)
    current = found.current
    if current is None:
        raise RegistryError(f"{registry}: nothing has been published", where=CURRENT)
    served = None if url is None else _wait_for(url, current, wait_s)
    moves = found.history()
    if as_json:
        content = {
            "current": current,
            "last_move": msgspec.to_builtins(moves[-1]) if moves else None,
            "workers": None if served is None else dict(served.workers),
            "ready": None if served is None else served.ready,
            "refused": None if served is None else served.refused,
        }
        click.echo(json.dumps(content))
    else:
        click.echo(f"{found.path / CURRENT}: {current}" + (_since(moves[-1]) if moves else ""))
    if served is None:
        return
    if not as_json:
        for bundle_id, workers in served.workers.items():
            click.echo(f"{url}: {_workers(workers)} {bundle_id}")
    if set(served.workers) != {current}:
        behind = sum(n for bundle_id, n in served.workers.items() if bundle_id != current)
        click.echo(
            f"ctr: {behind} of {served.workers.total()} workers do not serve {current}; bundles "
            f"refused by this service: {served.refused}, see its log",
            err=True,
        )
        sys.exit(EXIT_GATE)


def ask(url: str) -> Served:
    """What the service at the URL says of itself.

    Raises:
        RegistryError: It does not answer.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=_ASK_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as exc:
        raise RegistryError(f"{url}/metrics: {exc}", where=url) from exc
    workers: Counter[str] = Counter()
    ready = refused = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "scoring_bundle_info":
                workers[sample.labels["bundle"]] += int(sample.value)
            elif sample.name == "scoring_ready":
                ready += sample.value
            elif sample.name == "scoring_swaps_refused_total" and sample.labels["part"] == "bundle":
                refused += sample.value
    return Served(workers, int(ready), int(refused))


def _wait_for(url: str, bundle_id: str, wait_s: float) -> Served:
    give_up_at = time.monotonic() + wait_s
    while True:
        served = ask(url)
        if set(served.workers) == {bundle_id} or time.monotonic() >= give_up_at:
            return served
        time.sleep(_POLL_S)


def _tell(registry: Registry, move: Move | None, as_json: bool) -> None:
    if as_json:
        content = {
            "current": registry.current,
            "move": None if move is None else msgspec.to_builtins(move),
        }
        click.echo(json.dumps(content))
    elif move is None:
        click.echo(f"{registry.path / CURRENT} pointed to {registry.current} already")
    else:
        before = "nothing" if move.before is None else move.before
        click.echo(f"{registry.path / CURRENT}: {move.bundle} (was {before})")


def _since(move: Move) -> str:
    verb = "published" if move.action == "publish" else "rolled back to"
    return f", {verb} at {move.at}"


def _workers(count: int) -> str:
    return "1 worker serves" if count == 1 else f"{count} workers serve"
