"""`ctr quickstart`: from real logs to scored candidates, by the same verbs a user would run.

Every step is a process of its own and hands files to the next: the trainer and the service never
meet in one process, here as in production.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import polars as pl
from rich.console import Console
from rich.table import Table

from service.readiness import wait_until_ready
from service.settings import SettingsError

STOP_TIMEOUT_S = 30.0
SERVED = "shared bottom"
DEFAULT_KEEP_TRIPS = 0.25
SHOWN_CANDIDATES = 12

Answer = dict[str, Any]  # Any: JSON values


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One real shopping trip of the test weeks: its request and what became of each candidate."""

    request: dict[str, Any]  # Any: JSON values
    time: str
    outcome: list[str]
    products: list[str]


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Everything is written below this directory.",
)
@click.option("--once", is_flag=True, help="End after the answer instead of serving on.")
@click.option("--full", is_flag=True, help="All trips, the full protocol: 4 GB and 15 minutes.")
@click.option("--port", default=8000, show_default=True, help="0, or one in use: a free one.")
def quickstart(out: Path, once: bool, full: bool, port: int) -> None:
    """Train on a year of real grocery shopping, serve the model, score a real household's trip."""
    started = time.monotonic()
    stages = Stages(out.resolve())
    data, snapshot = stages.out / "data", stages.out / "snapshot"
    share = 1.0 if full else DEFAULT_KEEP_TRIPS
    stages.ctr("Data", "data", "complete-journey", str(data), "--keep-trips", str(share))
    evaluations = {
        name: _train(stages, name=name, config=data / config, is_quick=not full)
        for name, config in ((SERVED, "train.toml"), ("TAFE-style", "tafe.toml"))
    }
    _show_metrics(evaluations)
    bundle = stages.answer(
        "Bundle", "export", stages.run_dir(SERVED), "--out", str(stages.out / "bundles")
    )["bundle"]
    trip = choose_trip(data)
    stages.ctr(
        "User records and item snapshot as of the trip",
        *("materialize", stages.run_dir(SERVED), "--as-of", trip.time),
        *("--out", str(snapshot)),
    )
    stages.ctr("Redis", "load-records", str(snapshot / "records.parquet"))
    serve = ["serve", "--bundle", bundle, "--items", str(snapshot / "items.parquet")]
    with stages.serving([*serve, "--port", str(_free_port(port))]) as url:
        response = httpx.post(f"{url}/score", json=trip.request, timeout=10.0)
        response.raise_for_status()
        _show_answer(response.json(), trip, evaluations[SERVED])
        request_file = stages.out / "request.json"
        request_file.write_text(json.dumps(trip.request, indent=1))
        minutes = (time.monotonic() - started) / 60.0
        click.echo(f"\nFrom logs to this answer: {minutes:.1f} minutes.")
        if not once:
            _show_next_steps(url, request_file, bundle, snapshot)
            stages.wait()


def choose_trip(data: Path) -> Trip:
    """The test trip on which most promoted products were bought, the earliest of equals."""
    items = data / "items.parquet"
    log = pl.scan_parquet(data / "impressions.parquet").filter(pl.col("split") == "test")
    best = (
        log.group_by("request_id")
        .agg(pl.col("conversion").sum(), pl.col("time").first())
        .sort(["conversion", "time", "request_id"], descending=[True, False, False])
        .head(1)
        .collect()
    )
    rows = log.filter(pl.col("request_id") == best["request_id"][0]).collect()
    when = rows["time"][0].isoformat().replace("+00:00", "Z")
    request = {
        "user_id": rows["user_id"][0],
        "time": when,
        "context": {"store_id": rows["store_id"][0]},
        "candidates": {
            name: rows[name].to_list()
            for name in ("item_id", "display_location", "mailer_location")
        },
        "timeout_ms": 2000,
    }
    outcome = [
        "bought" if conversion else "bought its type" if click_ else ""
        for click_, conversion in rows.select("click", "conversion").iter_rows()
    ]
    return Trip(request=request, time=when, outcome=outcome, products=_product_names(rows, items))


class Stages:
    """Runs verbs as processes, all below one directory and with one Redis."""

    def __init__(self, out: Path) -> None:
        self.out = out
        # Handed on to the verbs as it is; read there, by the settings.
        self._environment = {"CTR_STORE__DATA_DIR": str(out / "redis"), **os.environ}
        self._server: subprocess.Popen[bytes] | None = None
        self._console = Console(stderr=True)

    def run_dir(self, name: str) -> str:
        """Where the run of a model lies."""
        return str(self.out / "runs" / name.replace(" ", "-").lower())

    def ctr(self, title: str, *arguments: str) -> None:
        """Runs one verb, its output on our stdout and stderr."""
        self._announce(title, arguments)
        self._run(arguments, capture=False)

    def answer(self, title: str, *arguments: str) -> Answer:
        """Runs one verb that reads encoded impressions, and returns the JSON it printed."""
        self._announce(title, arguments)
        cache = ("--cache", str(self.out / "cache"))
        answer: Answer = json.loads(self._run((*arguments, *cache, "--json"), capture=True))
        return answer

    @contextmanager
    def serving(self, arguments: list[str]) -> Iterator[str]:
        """Runs the service until the block ends; yields its URL once it is ready."""
        self._announce("Service", tuple(arguments))
        url = f"http://127.0.0.1:{arguments[-1]}"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments], env=self._environment
        )
        try:
            self._wait_until_ready(url)
            yield url
        finally:
            self._server.terminate()
            try:
                self._server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def wait(self) -> None:
        """Waits for Ctrl-C, or for the service to end by itself."""
        assert self._server is not None
        try:
            code = self._server.wait()
        except KeyboardInterrupt:
            return
        sys.exit(code)

    def _wait_until_ready(self, url: str) -> None:
        assert self._server is not None
        code = wait_until_ready(url, self._server)
        if code is not None:
            sys.exit(code)

    def _announce(self, title: str, arguments: tuple[str, ...]) -> None:
        shown = " ".join(_shorten(argument, self.out) for argument in arguments)
        self._console.print(f"\n[bold]{title}[/bold]  [dim]ctr {shown}[/dim]", highlight=False)

    def _run(self, arguments: tuple[str, ...], *, capture: bool) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "service", *arguments],
            env=self._environment,
            stdout=subprocess.PIPE if capture else None,
            check=False,
        )
        if done.returncode:
            sys.exit(done.returncode)
        return done.stdout or b""


def _train(stages: Stages, *, name: str, config: Path, is_quick: bool) -> Answer:
    run = stages.run_dir(name)
    # A second pass over the rows gives a little more, and takes as long again.
    shorter = ("--set", "optimizer.max_epochs=1") if is_quick else ()
    stages.answer(f"Training: {name}", "train", str(config), "--run", run, *shorter)
    return stages.answer(f"Test rows: {name}", "evaluate", run)


def _show_metrics(evaluations: dict[str, Answer]) -> None:
    base = next(iter(evaluations.values()))["test_base_rate"]
    table = Table("on test rows", "base rate", *evaluations, title="Test weeks, never used to fit")
    for metric in (
        *("auc_ctr", "auc_cvr_clicked", "auc_ctcvr", "log_loss_ctr", "log_loss_ctcvr"),
        *("ne_ctr", "ne_ctcvr", "pcoc_ctr", "pcoc_ctcvr"),
    ):
        cells = [base, *(evaluation["test"] for evaluation in evaluations.values())]
        table.add_row(metric, *(_number(cell[metric]) for cell in cells))
    Console().print(table)


def _show_answer(answer: Answer, trip: Trip, evaluation: Answer) -> None:
    items = answer["items"]
    order = sorted(range(len(items)), key=lambda i: -items[i]["pctcvr"])
    table = Table(
        *("rank", "item_id", "product", "pctr", "pcvr", "pctcvr", "the household"),
        title=f"Household {trip.request['user_id']} at {trip.time}: {len(items)} candidates",
        caption="Promoted products of the shop, best first; what is not shown was not bought.",
    )
    for rank, i in enumerate(order, start=1):
        if rank > SHOWN_CANDIDATES and trip.outcome[i] != "bought":
            continue
        item = items[i]
        table.add_row(
            *(str(rank), str(item["item_id"]), trip.products[i]),
            *(f"{item[name]:.5f}" for name in ("pctr", "pcvr", "pctcvr")),
            trip.outcome[i],
        )
    Console().print(table)
    base_rate = evaluation["test_base_rate"]["rate_ctr"]
    mean = sum(item["pctr"] for item in items) / len(items)
    bought = [rank for rank, i in enumerate(order, start=1) if trip.outcome[i] == "bought"]
    above = sum(rank <= len(items) / 2 for rank in bought)
    click.echo(
        f"mean pctr {mean:.4f} beside a base rate of {base_rate:.4f} ({mean / base_rate:.2f} x); "
        f"{above} of {len(bought)} bought products stand above the median"
    )


def _show_next_steps(url: str, request_file: Path, bundle: str, snapshot: Path) -> None:
    click.echo(
        f"""
The service goes on. Try:
  curl -s {url}/score -H 'content-type: application/json' -d @{request_file}
  curl -s {url}/metrics | grep scoring_request
  open {url}/docs
  ctr inspect {bundle}
  ctr score {request_file} --bundle {bundle} --items {snapshot / "items.parquet"} \\
      --record {snapshot / "records.parquet"}
Your own logs: ctr schema LOG.parquet --out schema.toml, then see the README.
Ctrl-C ends the service and its Redis."""
    )


def _product_names(rows: pl.DataFrame, items: Path) -> list[str]:
    """What each candidate is, short enough for a table."""
    types = pl.read_parquet(items, columns=["item_id", "product_type"])
    joined = rows.select("item_id").join(types, on="item_id", how="left", maintain_order="left")
    return [(name or "").rpartition(": ")[2][:24] for name in joined["product_type"]]


def _free_port(wanted: int) -> int:
    """The port, or a free one if something listens there."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise SettingsError(f"no free port, and {wanted} is taken")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.1 else f"{value:.6f}"


def _shorten(argument: str, out: Path) -> str:
    return argument.replace(str(out.parent) + os.sep, "")
