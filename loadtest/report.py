"""What a load test prints, writes and draws."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.capacity import KNEE_TAIL, Capacity, Sweep
from loadtest.outcome import Outcome
from loadtest.stand import Measured
from loadtest.summary import QUANTILES, Summary
from loadtest.vary import Variant

_LOG_SPAN = 50  # greatest by least value from which on both axes are logarithmic
_LATENCY_COLUMNS = ("p50", "p90", "p99", "p99.9", "max")


def machine() -> dict[str, Any]:  # Any: JSON
    """Where and with what the figures were taken."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("onnxruntime", "uvicorn", "ctr-scoring")},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:  # Any: JSON
    """Writes it, making the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def show_runs(console: Console, title: str, runs: Mapping[str, Summary | Measured]) -> None:
    """One line per run."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("run")
    for name in ("offered/s", "200/s", *_LATENCY_COLUMNS, "worst second", "late p99", "not 200"):
        table.add_column(name, justify="right")
    for name in ("degraded", "CPU us", "outside us"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, run in runs.items():
        summary = run.summary if isinstance(run, Measured) else run
        server = run.server if isinstance(run, Measured) else None
        table.add_row(
            name,
            f"{summary.offered_per_s:.0f}",
            f"{summary.achieved_per_s:.0f}",
            *(_number(summary.latency_ms.get(column)) for column in _LATENCY_COLUMNS),
            _number(summary.worst_second_p99_ms),
            _number(summary.late_ms.get("p99")),
            _statuses(summary),
            str(summary.degraded or ""),
            "" if server is None else f"{server.cpu_us:.0f}",
            "" if server is None or server.outside_us is None else f"{server.outside_us:.0f}",
            "" if summary.void is None else f"void: {summary.void}",
        )
    console.print(table)


def show_outcome(console: Console, outcome: Outcome) -> None:
    """A scenario: its runs, its facts, its claims."""
    if outcome.skipped is not None:
        console.print(f"{outcome.name}: skipped, {outcome.skipped}", highlight=False)
        return
    if outcome.runs:
        show_runs(console, outcome.name, outcome.runs)
    for name, fact in outcome.facts.items():
        console.print(f"  {outcome.name}: {name} {fact}", highlight=False)
    for claim, holds in outcome.claims.items():
        verdict = "holds" if holds else "DOES NOT HOLD"
        console.print(f"  {outcome.name}: {claim}: {verdict}", highlight=False)


def show_sweep(console: Console, sweep: Sweep) -> None:
    """One line per rate, medians of the repeats."""
    table = Table(title="Latency against offered rate, ms", title_justify="left")
    for name in ("offered/s", "200/s", *_LATENCY_COLUMNS, "not 200", "CPU us", "outside us"):
        table.add_column(name, justify="right")
    table.add_column("")
    for point in sweep.points:
        table.add_row(
            f"{point.offered_per_s:.0f}",
            f"{point.achieved_per_s:.0f}",
            *(_number(point.latency_ms.get(column)) for column in _LATENCY_COLUMNS),
            f"{point.failed_share:.2%}" if point.failed_share else "",
            "" if point.cpu_us is None else f"{point.cpu_us:.0f}",
            "" if point.outside_us is None else f"{point.outside_us:.0f}",
            f"{point.void} of {point.repeats} void" if point.void else "",
        )
    console.print(table)
    knee = "below the second rate" if sweep.knee is None else f"{sweep.knee:.0f} requests/s"
    console.print(
        f"saturation (closed loop) {sweep.saturation:.0f} requests/s; knee {knee}: the last rate "
        f"whose p99 is within {KNEE_TAIL:g} times the p50 of the lowest",
        highlight=False,
    )


def show_capacity(console: Console, capacity: Capacity) -> None:
    """The answer, and what was tried for it."""
    table = Table("rate", "p99 ms", "not 200", "", title="Search", title_justify="left")
    for entry in capacity.tried:
        state = "holds" if entry["holds"] else entry["void"] or "does not hold"
        table.add_row(
            f"{entry['rate']:.0f}",
            _number(entry["p99_ms"]),
            f"{entry['failed_share']:.2%}",
            state,
        )
    console.print(table)
    rate = "no rate tried holds" if capacity.rate is None else f"{capacity.rate:.0f} requests/s"
    note = "; the generator ended the search, so at least that" if capacity.void else ""
    console.print(
        f"capacity: {rate} with p99 at most {capacity.p99_bound_ms:g} ms and errors plus refusals "
        f"at most {capacity.max_failed_share:.1%}{note}",
        highlight=False,
    )


def show_variants(console: Console, dimension: str, variants: Sequence[Variant]) -> None:
    """One line per value."""
    table = Table(title=f"Against {dimension}", title_justify="left")
    columns = ("requests/s", "unloaded p50", "half p50", "half p99", "CPU us", "outside us")
    for name in (dimension, *columns, "RSS MiB", "PSS MiB", "ready s"):
        table.add_column(name, justify="right")
    for variant in variants:
        saturation, half = variant.saturation, variant.half
        server = saturation.server
        table.add_row(
            f"{variant.value:,}",
            f"{saturation.summary.achieved_per_s:.0f}",
            _number(variant.unloaded.summary.latency_ms.get("p50")),
            _number(half.summary.latency_ms.get("p50")),
            _number(half.summary.latency_ms.get("p99")),
            "" if server is None else f"{server.cpu_us:.0f}",
            "" if server is None or server.outside_us is None else f"{server.outside_us:.0f}",
            "" if server is None else f"{server.rss_mib:.0f}",
            "" if server is None else f"{server.pss_mib:.0f}",
            f"{variant.ready_s:.1f}",
        )
    console.print(table)


def draw_sweep(path: Path, sweep: Sweep, *, caption: str) -> None:
    """Latency quantiles against offered rate, the knee marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rates = [point.offered_per_s for point in sweep.points]
    for name in QUANTILES:
        if name == "max":
            continue
        values = [point.latency_ms.get(name, float("nan")) for point in sweep.points]
        (line,) = axes.plot(rates, values, marker="o", markersize=3, label=name)
        low = [point.lowest_ms.get(name, float("nan")) for point in sweep.points]
        high = [point.highest_ms.get(name, float("nan")) for point in sweep.points]
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.15)
    if sweep.knee is not None:
        axes.axvline(sweep.knee, color="black", linestyle="--", linewidth=1)
        axes.text(sweep.knee, axes.get_ylim()[1], f" knee {sweep.knee:.0f}/s", va="top")
    axes.axvline(sweep.saturation, color="grey", linestyle=":", linewidth=1, label="saturation")
    axes.set(yscale="log", xlabel="offered rate, requests/s", ylabel="latency, ms")
    axes.set_title(caption, fontsize=9)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_variants(path: Path, dimension: str, variants: Sequence[Variant]) -> None:
    """Latency and throughput against one thing that was varied."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    values = [variant.value for variant in variants]
    for label, pick in (("unloaded p50", "p50"), ("unloaded p99", "p99")):
        heights = [v.unloaded.summary.latency_ms.get(pick, float("nan")) for v in variants]
        left.plot(values, heights, marker="o", label=label)
    heights = [v.half.summary.latency_ms.get("p99", float("nan")) for v in variants]
    left.plot(values, heights, marker="o", label="p99 at half of saturation")
    left.set(xlabel=dimension, ylabel="latency, ms")
    right.plot(values, [v.saturation.summary.achieved_per_s for v in variants], marker="o")
    right.set(xlabel=dimension, ylabel="requests/s at saturation")
    for axes in (left, right):
        if max(values) > _LOG_SPAN * max(min(values), 1):
            axes.set(xscale="log", yscale="log")
        else:
            axes.set(ylim=(0, None))
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sweep_json(sweep: Sweep) -> dict[str, Any]:  # Any: JSON
    """Plain data."""
    return {**asdict(sweep), "points": [asdict(point) for point in sweep.points]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _statuses(summary: Summary) -> str:
    other = {code: count for code, count in summary.statuses.items() if code != "200"}
    return ", ".join(f"{count} x {code}" for code, count in other.items())
