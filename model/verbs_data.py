"""The verb `ctr data`: impression logs from public data sets and the simulator."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from model.console import reading_progress, spinner

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
F = TypeVar("F", bound=Callable[..., None])
SOURCE = click.Path(path_type=Path, exists=True, file_okay=False)


def keep(of: str) -> Callable[[F], F]:
    """The option --keep, which a log too large for this machine's memory needs."""
    return click.option(
        "--keep",
        type=click.FloatRange(min=0.0, min_open=True, max=1.0),
        default=1.0,
        show_default=True,
        help=f"Share of {of} kept; training holds the log in memory.",
    )


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


@data.command("ali-ccp")
@click.argument("source", type=SOURCE)
@click.argument("out", type=PATH)
@click.option(
    "--slots",
    type=click.IntRange(min=1, max=1000),
    default=50,
    show_default=True,
    help="Places of each of the user's weighted histories.",
)
@keep("users")
@JSON
def ali_ccp(source: Path, out: Path, slots: int, keep: float, as_json: bool) -> None:
    """Ali-CCP from SOURCE, the directory of its files, packed or not."""
    from model.datasets.ali_ccp import write_ali_ccp
    from model.datasets.public_files import write_ali_ccp_files

    with reading_progress() as progress:
        summary = write_ali_ccp(source, out, slots=slots, keep=keep, progress=progress)
    positions = vars(summary).pop("positions")
    position = max(positions, key=lambda p: (positions[p], -p)) if positions else None
    write_ali_ccp_files(out, slots=slots, position=position)
    _show(out, vars(summary), as_json=as_json)


@data.command("aliexpress")
@click.argument("source", type=SOURCE)
@click.argument("out", type=PATH)
@click.option("--country", help="NL, ES, FR, US or RU; needed if files of several are there.")
@keep("pages")
@JSON
def aliexpress(source: Path, out: Path, country: str | None, keep: float, as_json: bool) -> None:
    """One country's AliExpress searching log from SOURCE, the directory of its files."""
    from model.datasets.aliexpress import write_aliexpress
    from model.datasets.public_files import write_aliexpress_files

    with reading_progress() as progress:
        summary = write_aliexpress(source, out, country=country, keep=keep, progress=progress)
    write_aliexpress_files(out)
    _show(out, vars(summary), as_json=as_json)


@data.command("criteo-attribution")
@click.argument("source", type=SOURCE)
@click.argument("out", type=PATH)
@click.option(
    "--label",
    type=click.Choice(["attributed", "any"]),
    default="attributed",
    show_default=True,
    help="Conversions attributed to Criteo, or any within 30 days; each counts once.",
)
@keep("users")
@JSON
def criteo_attribution(source: Path, out: Path, label: Any, keep: float, as_json: bool) -> None:
    """Criteo attribution modelling for bidding from SOURCE, the directory of its file."""
    from model.datasets.criteo_attribution import write_criteo_attribution
    from model.datasets.public_files import write_criteo_attribution_files

    with reading_progress() as progress:
        summary = write_criteo_attribution(source, out, label=label, keep=keep, progress=progress)
    write_criteo_attribution_files(out)
    _show(out, vars(summary), as_json=as_json)


def _show(out: Path, facts: dict[str, Any], *, as_json: bool) -> None:  # Any: counts, by split
    """Counts by split as a table, the others as lines; the command that trains on them."""
    if as_json:
        click.echo(json.dumps({"out": str(out), **facts}))
        return
    by_split = {name: value for name, value in facts.items() if isinstance(value, dict)}
    if by_split:
        table = Table("split", *by_split, title=str(out))
        for split in by_split["rows"]:
            table.add_row(split, *(f"{counts.get(split, 0):,}" for counts in by_split.values()))
        Console().print(table)
    for name, value in facts.items():
        if isinstance(value, int):
            click.echo(f"{name.replace('_', ' ')}: {value:,}")
    click.echo(f"next: ctr train {out / 'train.toml'} --run RUN")
