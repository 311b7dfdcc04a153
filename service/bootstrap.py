"""`ctr bootstrap`: bundle, items and user records of the demo, where a service waits for them.

Everything is made beside the place that the service reads, and put there whole: the link to the
bundle last, since the service begins with it.
"""

import json
import shutil
from pathlib import Path

import click

from model.contract.bundle import MANIFEST
from service.identity import file_identity
from service.quickstart import DEFAULT_KEEP_TRIPS, Stages, Trip, choose_trip
from service.registry import CURRENT, point

BUNDLES = "bundles"
ITEMS, RECORDS, REQUEST = "items.parquet", "records.parquet", "request.json"

_PATH = click.Path(path_type=Path)


@click.command()
@click.option(
    "--models",
    type=_PATH,
    default=Path("models"),
    show_default=True,
    help="What a service reads: the link `current` to a bundle, items.parquet.",
)
@click.option(
    "--work",
    type=_PATH,
    default=Path("training"),
    show_default=True,
    help="For logs, runs and what else is on the way; a run that was stopped goes on there.",
)
@click.option(
    "--keep-trips",
    type=click.FloatRange(min=0.0, min_open=True, max=1.0),
    default=DEFAULT_KEEP_TRIPS,
    show_default=True,
    help="Share of the data set's shopping trips.",
)
@click.option("--again", is_flag=True, help="Train once more, though there is a bundle.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--set", "overrides", multiple=True, help="As of `ctr train`.")
def bootstrap(
    models: Path,
    work: Path,
    keep_trips: float,
    again: bool,
    seed: int,
    overrides: tuple[str, ...],
) -> None:
    """Make the demo's bundle, item snapshot and user records, unless they are there.

    A service with CTR_BUNDLE=MODELS/current, CTR_ITEM_SNAPSHOT=MODELS/items.parquet and
    CTR_WAIT_FOR_BUNDLE becomes ready by it. User records go to CTR_STORE__URL and never expire.
    """
    current = models / CURRENT
    needed = (current / MANIFEST, models / ITEMS)
    if not again and all(file_identity(path) is not None for path in needed):
        click.echo(f"{models}: bundle {current.resolve().name} is there, nothing to do")
        return
    stages = Stages(work.resolve())
    data, snapshot, run = stages.out / "data", stages.out / "snapshot", f"seed {seed}"
    # The last file that the verb writes.
    if file_identity(data / "train.toml") is None:
        stages.ctr("Data", "data", "complete-journey", str(data), "--keep-trips", str(keep_trips))
    values = ("optimizer.max_epochs=1", f"optimizer.seed={seed}", *overrides)
    settings = [word for value in values for word in ("--set", value)]
    run_dir = stages.run_dir(run)
    stages.answer("Training", "train", str(data / "train.toml"), "--run", run_dir, *settings)
    stages.answer("Test rows", "evaluate", run_dir)
    bundles = str(models.resolve() / BUNDLES)
    bundle = stages.answer("Bundle", "export", run_dir, "--out", bundles)["bundle"]
    trip = choose_trip(data)
    stages.ctr(
        "User records and item snapshot as of a trip",
        *("materialize", run_dir, "--as-of", trip.time, "--out", str(snapshot)),
    )
    records = str(snapshot / RECORDS)
    stages.ctr("Records to the online store", "load-records", records, "--ttl-s", "0")
    publish(models, bundle=Path(bundle), snapshot=snapshot, trip=trip)
    click.echo(f"{models}: bundle {Path(bundle).name} is there now")


def publish(models: Path, *, bundle: Path, snapshot: Path, trip: Trip) -> None:
    """Puts everything where a service reads, each file whole or not at all.

    Args:
        models: The place.
        bundle: Directory in `models`/bundles.
        snapshot: Directory with item snapshot and user records.
        trip: Its request goes with them, to try the service with.

    Raises:
        OSError: There is no room, or no right to write.
    """
    for name in (RECORDS, ITEMS):
        part = models / f".{name}"
        shutil.copyfile(snapshot / name, part)
        part.replace(models / name)
    part = models / f".{REQUEST}"
    part.write_text(json.dumps(trip.request, indent=1))
    part.replace(models / REQUEST)
    # Relative, so that it holds wherever the directory is mounted.
    point(models / CURRENT, Path(BUNDLES) / bundle.name)
