"""The verb `ctr data`: impression logs from public data sets and the simulator."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from model.console import spinner

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def data() -> None:
    """Make impression logs: from a public data set, or with known probabilities."""


@data.command("complete-journey")
@click.argument("out", type=PATH)
@click.option(
    "--keep-trips",
    type=click.FloatRange(min=0.0, min_open=True, max=1.0),
    default=1.0,
    show_default=True,
    help="Share of shopping trips kept, in every split.",
)
@JSON
def complete_journey(out: Path, keep_trips: float, as_json: bool) -> None:
    """A year of grocery shopping (The Complete Journey), with schema and training files."""
    from model.datasets.complete_journey import write_complete_journey
    from model.datasets.journey_files import write_files

    with spinner() as say:
        summary = write_complete_journey(out, keep_trips=keep_trips, progress=say)
    write_files(out)
    splits = {name: vars(count) for name, count in summary.splits.items()}
    if as_json:
        click.echo(json.dumps({"out": str(out), "splits": splits}))
        return
    table = Table("split", "trips", "impressions", "clicks", "conversions", title=str(out))
    for name, count in splits.items():
        cells = [count[key] for key in ("trips", "rows", "clicks", "conversions")]
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    Console().print(table)


@data.command("simulate")
@click.argument("out", type=PATH)
@click.option("--rows", type=click.IntRange(min=1000), default=1_000_000, show_default=True)
@click.option("--users", type=click.IntRange(min=2), default=20_000, show_default=True)
@click.option("--items", type=click.IntRange(min=2), default=2_000, show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(min=2, max=16),
    default=2,
    show_default=True,
    help="Length of the chain: click, conversion, step_3, ...",
)
@click.option(
    "--correlation",
    type=click.FloatRange(min=-1.0, max=1.0),
    default=1.0,
    show_default=True,
    help="Of the click's logit with x1, which the conversion rises with.",
)
@click.option(
    "--features",
    type=click.Choice(["rich", "restricted"]),
    default="rich",
    show_default=True,
    help="Whether the log has x1_squared, without which a linear conversion head is misspecified.",
)
@click.option(
    "--delay-days",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="Mean of the exponential delay of each step after the click.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@JSON
def simulate(out: Path, as_json: bool, **options: Any) -> None:  # Any: what click parsed
    """Impressions whose click and conversion probabilities are known, with configuration files."""
    from model.datasets.simulate import Simulation, write_simulation

    with spinner() as say:
        summary = write_simulation(out, Simulation(**options), progress=say)
    if as_json:
        click.echo(json.dumps({"out": str(out), **vars(summary)}))
        return
    table = Table("step", "rows", "true mean of P(step | step before)", title=str(out))
    table.add_row("impression", f"{summary.rows:,}", "")
    for name, count in summary.labels.items():
        table.add_row(name, f"{count:,}", f"{summary.true_means[name]:.5f}")
    Console().print(table)
