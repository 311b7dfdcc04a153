"""How cost grows: one stand after another with one thing changed."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from loadtest.capacity import OnRun
from loadtest.outcome import Base
from loadtest.stand import Measured, StandOptions, open_stand
from loadtest.workload import CandidateCount, Population, Workload, make_bodies, read_population
from model.contract.bundle import read_bundle

Dimension = Literal["workers", "candidates", "items"]
UNLOADED_PER_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Figures with one value of what is varied.

    Attributes:
        value: Of the dimension.
        saturation: A closed loop.
        unloaded: 20 requests per second.
        half: Half of this variant's saturation.
        ready_s: From the start of the service to readiness, item table included.
    """

    value: int
    saturation: Measured
    unloaded: Measured
    half: Measured
    ready_s: float

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Plain data."""
        return {
            "value": self.value,
            "ready_s": round(self.ready_s, 2),
            "saturation": self.saturation.as_json(),
            "unloaded": self.unloaded.as_json(),
            "half": self.half.as_json(),
        }


def parse_variation(text: str) -> tuple[Dimension, list[int]]:
    """Reads `candidates=1,10,100`.

    Raises:
        ValueError: Unknown dimension, or no whole numbers.
    """
    name, _, values = text.partition("=")
    if name not in ("workers", "candidates", "items"):
        raise ValueError(f"got {text!r}, expected workers=, candidates= or items= and numbers")
    return name, [int(value) for value in values.split(",")]  # type: ignore[return-value]  # checked


def vary(
    dimension: Dimension,
    values: Sequence[int],
    *,
    options: StandOptions,
    workload: Workload,
    base: Base,
    on_run: OnRun,
) -> list[Variant]:
    """Measures each value on a stand of its own."""
    population = read_population(options.bundle, options.items, options.records)
    return [
        _measure(dimension, value, options, workload, population, base, on_run) for value in values
    ]


def grow_items(items: Path, out: Path, *, rows: int, id_column: str) -> None:
    """Writes a snapshot with so many items: the first ones, or all again and again under new ids.

    Args:
        items: Item snapshot with at least one row.
        out: Where to.
        rows: Number of items wanted.
        id_column: Whose values are made new: numbers above all others, or texts with a suffix.
    """
    frame = pl.read_parquet(items)
    ids, parts = frame[id_column], [frame]
    step = int(ids.max()) + 1 if ids.dtype.is_integer() else 0  # type: ignore[arg-type]  # a number
    for copy in range(1, -(-rows // len(frame))):
        new = ids + copy * step if step else ids.cast(pl.String) + f"-{copy}"
        parts.append(frame.with_columns(new.alias(id_column)))
    pl.concat(parts).head(rows).write_parquet(out)


def _measure(
    dimension: Dimension,
    value: int,
    options: StandOptions,
    workload: Workload,
    population: Population,
    base: Base,
    on_run: OnRun,
) -> Variant:
    with tempfile.TemporaryDirectory() as directory:
        if dimension == "workers":
            options = replace(options, workers=value)
        elif dimension == "candidates":
            workload = replace(workload, candidates=CandidateCount(median=value))
        else:
            items = Path(directory) / "items.parquet"
            item_id = read_bundle(options.bundle).fitted.schema_.log.item_id
            grow_items(options.items, items, rows=value, id_column=item_id)
            options = replace(options, items=items)
            population = read_population(options.bundle, items, options.records)
        with open_stand(options, make_bodies(population, workload)) as stand:
            target = stand.target()
            saturation = target.saturate(base.seconds, seed=base.seed)
            rate = saturation.summary.achieved_per_s
            unloaded = target.at_rate(UNLOADED_PER_S, base.seconds, seed=base.seed)
            half = target.at_rate(max(rate / 2.0, 1.0), base.seconds, seed=base.seed)
            ready_s = stand.service.ready_s
    for name, measured in (("saturation", saturation), ("unloaded", unloaded), ("half", half)):
        on_run(f"{dimension} {value}: {name}", measured)
    return Variant(
        value=value, saturation=saturation, unloaded=unloaded, half=half, ready_s=ready_s
    )
