"""The verb `ctr load`: parses, opens a stand or takes a URL, runs what was asked, reports."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import click
import httpx
from rich.console import Console

from loadtest import report
from loadtest.capacity import find_capacity, sweep
from loadtest.ceiling import measure_ceiling
from loadtest.generator import GeneratorError
from loadtest.outcome import Base, Outcome
from loadtest.rig import leave_on_sigterm
from loadtest.scenarios import LONG, SCENARIOS
from loadtest.schedule import Arrivals
from loadtest.stand import (
    WARM_UP_S,
    Measured,
    Stand,
    StandOptions,
    Target,
    core_pair,
    open_stand,
    score_requests,
)
from loadtest.vary import parse_variation, vary
from loadtest.workload import (
    Form,
    Layout,
    Workload,
    make_bodies,
    parse_candidates,
    read_bodies,
    read_population,
)
from service.cli import EXIT_GATE
from service.settings import load_settings

_PATH = click.Path(path_type=Path)
_DEFAULT_RATE = 100.0
_FILE_WIDTH = 170


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the command line said; names are those of the options."""

    url: str | None
    pid: int | None
    bundle: Path | None
    items: Path | None
    records: Path | None
    second_bundle: Path | None
    bodies: Path | None
    candidates: str
    form: Form
    layout: Layout
    zipf: float
    unknown_users: float
    unknown_items: float
    timeout_ms: int | None
    distinct: int
    workers: int
    pin: bool
    rate: float | None
    arrivals: Arrivals
    seconds: float
    repeats: int
    seed: int
    is_sweep: bool
    is_search: bool
    p99_ms: float
    saturation: float | None
    scenario: tuple[str, ...]
    vary: tuple[str, ...]
    is_ceiling: bool
    late_ms: float
    as_json: bool
    out: Path | None


@click.command()
@click.option("--url", help="A service that runs already, such as http://127.0.0.1:8000.")
@click.option("--pid", type=int, help="Its process id, to report CPU time and memory.")
@click.option("--bundle", type=_PATH, help="Start a service of its own with this bundle.")
@click.option("--items", type=_PATH, help="Item snapshot: for that service, and to draw ids from.")
@click.option("--records", type=_PATH, help="User records: likewise.")
@click.option("--second-bundle", type=_PATH, help="To swap to, for bundle-swap and swaps.")
@click.option("--bodies", type=_PATH, help="Send the bodies of this JSON-lines file instead.")
@click.option("--candidates", default="100", show_default=True, help="N, lognormal[:MEDIAN:SIGMA]")
@click.option("--form", type=click.Choice(get_args(Form)), default="ids", show_default=True)
@click.option("--layout", type=click.Choice(get_args(Layout)), default="rows", show_default=True)
@click.option("--zipf", default=1.0, show_default=True, help="Exponent of users and items.")
@click.option("--unknown-users", default=0.02, show_default=True, help="Share without a record.")
@click.option("--unknown-items", default=0.02, show_default=True, help="Share not in the table.")
@click.option("--timeout-ms", type=int, help="Deadline in each body.")
@click.option("--distinct", default=2000, show_default=True, help="Different bodies.")
@click.option("--workers", default=1, show_default=True, help="Worker processes of its service.")
@click.option("--pin/--no-pin", default=True, show_default=True, help="One core each.")
@click.option("--rate", type=float, help="Requests per second of a single run.")
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), default="poisson")
@click.option("--seconds", default=10.0, show_default=True, help="Length of each run.")
@click.option("--repeats", default=1, show_default=True, help="Of each run; medians are shown.")
@click.option("--seed", default=1, show_default=True)
@click.option("--sweep", "is_sweep", is_flag=True, help="Rates up to saturation, with picture.")
@click.option("--find-capacity", "is_search", is_flag=True, help="Highest rate that holds.")
@click.option("--p99-ms", default=20.0, show_default=True, help="Bound for --find-capacity.")
@click.option("--saturation", type=float, help="Requests/s taken as saturation, not measured.")
@click.option("--scenario", multiple=True, type=click.Choice([*SCENARIOS, "all"]))
@click.option("--vary", multiple=True, help="workers=1,2,4 or candidates=1,100 or items=10000")
@click.option("--ceiling", "is_ceiling", is_flag=True, help="What the generator itself can send.")
@click.option("--late-ms", default=1.0, show_default=True, help="Void if later than this, p99.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--out", type=_PATH, help="Directory for load.json and the pictures.")
def load(**given: Any) -> None:  # Any: checked by click
    """Put load on a service and report what its callers see, counted from the scheduled time.

    Against --url, or with --bundle, --items and --records on a service and a Redis of its own, each
    pinned to a core apart from the generator. Exit code 4 when a run is void or a claim fails.
    """
    options = LoadOptions(**given)
    leave_on_sigterm()
    try:
        result = run_load(options, progress=Console(stderr=True))
    except GeneratorError as exc:
        raise click.ClickException(str(exc)) from exc
    if options.out is not None:
        report.write_json(options.out / "load.json", result)
    if options.as_json:
        click.echo(json.dumps(result))
    for problem in result["problems"]:
        click.echo(f"ctr load: {problem}", err=True)
    if result["problems"]:
        raise SystemExit(EXIT_GATE)


def run_load(options: LoadOptions, *, progress: Console) -> dict[str, Any]:  # Any: JSON
    """Runs everything that was asked for, in order; prints tables unless JSON is wanted."""
    run = _Run(options, progress)
    if options.is_ceiling:
        run.ceiling()
    needs_stand = bool(options.scenario or options.is_sweep or options.is_search)
    if options.rate is not None or needs_stand or not (options.is_ceiling or options.vary):
        with run.opened() as (target, stand):
            run.on_target(target, stand)
    for text in options.vary:
        run.variation(text)
    return run.result


class _Run:
    """Collects the result of one call of the verb."""

    def __init__(self, options: LoadOptions, progress: Console) -> None:
        self._options = options
        self._progress = progress
        self._console = Console(quiet=options.as_json, width=_width())
        shown = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
        self.result: dict[str, Any] = {  # Any: JSON
            "machine": report.machine(),
            "options": shown,
            "problems": [],
        }

    @contextmanager
    def opened(self) -> Iterator[tuple[Target, Stand | None]]:
        """The target, and the stand if it is one of ours."""
        options = self._options
        if options.url is None:
            with open_stand(self._stand_options(), self._bodies()) as stand:
                yield stand.target(), stand
            return
        if urlsplit(options.url).port is None:
            raise click.UsageError("--url: name the port, as in http://127.0.0.1:8000")
        _, generator_cpu = core_pair(pin=options.pin)
        target = Target(
            url=options.url,
            requests=score_requests(options.url, self._bodies()),
            pid=options.pid,
            has_metrics=options.pid is not None and _has_metrics(options.url),
            generator_cpu=generator_cpu,
            late_limit_ms=options.late_ms,
        )
        target.saturate(WARM_UP_S)
        yield target, None

    def on_target(self, target: Target, stand: Stand | None) -> None:
        """Single rate, sweep, search, scenarios."""
        options = self._options
        if not (options.is_sweep or options.is_search or options.scenario):
            self._single(target)
            return
        saturation = options.saturation
        if saturation is None:
            measured = target.saturate(max(options.seconds, WARM_UP_S), seed=options.seed)
            self._on_run("closed loop", measured)
            saturation = measured.summary.achieved_per_s
        self.result["saturation_per_s"] = saturation
        if options.is_sweep:
            self._sweep(target, saturation)
        if options.is_search:
            self._search(target, saturation)
        if options.scenario:
            self._scenarios(stand, saturation)

    def ceiling(self) -> None:
        """The generator alone."""
        options = self._options
        found = measure_ceiling(
            seconds=options.seconds,
            pin=options.pin,
            seed=options.seed,
            late_limit_ms=options.late_ms,
        )
        self.result["ceiling"] = asdict(found)
        if found.rate is None:
            self._check_void("ceiling", "the generator was late at every rate")
            return
        self._console.print(
            f"the generator alone: {found.rate:.0f} requests/s of 1 kB on one core; a server "
            f"that does nothing is seen to take {found.p50_ms} ms",
            highlight=False,
        )

    def variation(self, text: str) -> None:
        """One dimension."""
        try:
            dimension, values = parse_variation(text)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--vary") from exc
        variants = vary(
            dimension,
            values,
            options=self._stand_options(),
            workload=self._workload(),
            base=self._base(0.0),
            on_run=self._on_run,
        )
        self.result.setdefault("vary", {})[dimension] = [v.as_json() for v in variants]
        report.show_variants(self._console, dimension, variants)
        for variant in variants:
            for name in ("unloaded", "half"):
                measured: Measured = getattr(variant, name)
                self._check_void(f"{dimension} {variant.value}, {name}", measured.summary.void)
        if self._options.out is not None:
            report.draw_variants(self._options.out / f"{dimension}.png", dimension, variants)

    def _single(self, target: Target) -> None:
        options = self._options
        rate = options.rate or _DEFAULT_RATE
        runs = {}
        for repeat in range(options.repeats):
            name = f"{rate:g}/s, {repeat + 1}"
            seed = options.seed + repeat
            runs[name] = target.at_rate(rate, options.seconds, seed=seed, arrivals=options.arrivals)
            self._on_run(name, runs[name])
            self._check_void(name, runs[name].summary.void)
        report.show_runs(self._console, "Latency from the scheduled send time, ms", runs)
        self.result["runs"] = {name: measured.as_json() for name, measured in runs.items()}

    def _sweep(self, target: Target, saturation: float) -> None:
        options = self._options
        found = sweep(
            target,
            saturation=saturation,
            seconds=options.seconds,
            repeats=options.repeats,
            seed=options.seed,
            on_run=self._on_run,
        )
        report.show_sweep(self._console, found)
        self.result["sweep"] = report.sweep_json(found)
        if options.out is not None:
            caption = (
                f"{options.candidates} candidates, {options.form}, {options.seconds:g} s a run"
            )
            report.draw_sweep(options.out / "load.png", found, caption=caption)
        for point in found.points:
            if point.void == point.repeats:
                self._check_void(f"{point.rate:.0f}/s", "every repeat")

    def _search(self, target: Target, saturation: float) -> None:
        options = self._options
        found = find_capacity(
            target,
            saturation=saturation,
            p99_ms=options.p99_ms,
            seconds=options.seconds,
            seed=options.seed,
            on_run=self._on_run,
        )
        report.show_capacity(self._console, found)
        self.result["capacity"] = asdict(found)
        if found.void:
            self._check_void("search", "the generator ended it")

    def _scenarios(self, stand: Stand | None, saturation: float) -> None:
        if stand is None:
            raise click.UsageError("--scenario needs a service of its own: --bundle, not --url")
        chosen = self._options.scenario
        names = [n for n in SCENARIOS if n in chosen or ("all" in chosen and n not in LONG)]
        outcomes: list[Outcome] = []
        for name in names:
            self._progress.print(f"scenario {name}", highlight=False)
            outcome = SCENARIOS[name](stand, self._base(saturation))
            outcomes.append(outcome)
            report.show_outcome(self._console, outcome)
            self._check_void(name, outcome.void)
            failed = [claim for claim, holds in outcome.claims.items() if not holds]
            self.result["problems"] += [f"{name}: not so: {claim}" for claim in failed]
        self.result["scenarios"] = [outcome.as_json() for outcome in outcomes]

    def _base(self, saturation: float) -> Base:
        options = self._options
        return Base(
            saturation=saturation,
            seconds=options.seconds,
            repeats=options.repeats,
            seed=options.seed,
            timeout_ms=options.timeout_ms or load_settings().limits.timeout_ms,
        )

    def _stand_options(self) -> StandOptions:
        options = self._options
        if options.bundle is None or options.items is None or options.records is None:
            raise click.UsageError("give --url, or --bundle, --items and --records")
        return StandOptions(
            bundle=options.bundle,
            items=options.items,
            records=options.records,
            workers=options.workers,
            pin=options.pin,
            second_bundle=options.second_bundle,
            late_limit_ms=options.late_ms,
        )

    def _workload(self) -> Workload:
        options = self._options
        try:
            candidates = parse_candidates(options.candidates)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--candidates") from exc
        return Workload(
            candidates=candidates,
            form=options.form,
            layout=options.layout,
            zipf=options.zipf,
            unknown_users=options.unknown_users,
            unknown_items=options.unknown_items,
            timeout_ms=options.timeout_ms,
            distinct=options.distinct,
            seed=options.seed,
        )

    def _bodies(self) -> list[bytes]:
        options = self._options
        if options.bodies is not None:
            return read_bodies(options.bodies, timeout_ms=options.timeout_ms)
        if options.bundle is None or options.items is None or options.records is None:
            raise click.UsageError("what to send: --bodies, or --bundle, --items and --records")
        population = read_population(options.bundle, options.items, options.records)
        return make_bodies(population, self._workload())

    def _on_run(self, name: str, measured: Measured) -> None:
        figures = measured.summary
        note = "" if figures.void is None else "  void"
        p99 = figures.latency_ms.get("p99")
        self._progress.print(
            f"  {name}: {figures.achieved_per_s:.0f}/s answered, p99 {p99} ms{note}",
            highlight=False,
        )

    def _check_void(self, name: str, reason: str | None) -> None:
        if reason is not None:
            self.result["problems"].append(f"{name}: void, {reason}")


def _width() -> int | None:
    # Into a file or a pipe, rich would squeeze the table into 80 columns.
    return None if Console().is_terminal else _FILE_WIDTH


def _has_metrics(url: str) -> bool:
    try:
        return httpx.get(f"{url}/metrics", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False
