"""The verb `ctr data`: impression logs from public data sets and the simulator."""

import json
import shutil
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from model.console import spinner

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def data() -> None:
    """Make impression logs from a public data set."""


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

    with spinner() as say:
        summary = write_complete_journey(out, keep_trips=keep_trips, progress=say)
    here = Path(__file__).parent / "datasets"
    for name in ("schema", "train", "baseline", "compare"):
        shutil.copyfile(here / f"complete_journey_{name}.toml", out / f"{name}.toml")
    splits = {name: vars(count) for name, count in summary.splits.items()}
    if as_json:
        click.echo(json.dumps({"out": str(out), "splits": splits}))
        return
    table = Table("split", "trips", "impressions", "clicks", "conversions", title=str(out))
    for name, count in splits.items():
        cells = [count[key] for key in ("trips", "rows", "clicks", "conversions")]
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    Console().print(table)
