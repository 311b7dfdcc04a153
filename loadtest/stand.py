"""The test stand: a service under test, the requests for it, and one measured run after another.

Server and generator have a core each where two are there; Redis shares the generator's.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from loadtest.generator import Action, generate
from loadtest.openloop import Plan, Trace, http_request
from loadtest.procs import cores, cpu_seconds, proportional_bytes, resident_bytes
from loadtest.rig import RedisProcess, ServiceProcess
from loadtest.schedule import Arrivals, Times, arrival_times
from loadtest.summary import Summary, summarize

LATE_LIMIT_MS = 1.0
SATURATING_CALLERS = 16
WARM_UP_S = 2.0


@dataclass(frozen=True, kw_only=True)
class ServerUse:
    """What one run cost the server.

    Attributes:
        cpu_us: CPU time of the whole process tree per request answered with 200, microseconds.
        run_us: Of that time, wall time of the model runs by the service's own /metrics.
        outside_us: `cpu_us` without `run_us`.
        cpu_share: CPU time by wall time of the schedule; 1 is one core.
        rss_mib: Resident memory after the run, shared pages counted for each process.
        pss_mib: Likewise, shared pages counted once.
    """

    cpu_us: float
    run_us: float | None
    outside_us: float | None
    cpu_share: float
    rss_mib: float
    pss_mib: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: what the callers saw, and what it cost. `server` is None when it runs elsewhere."""

    summary: Summary
    server: ServerUse | None
    trace: Trace

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Plain data, without the trace."""
        server = None if self.server is None else asdict(self.server)
        return {**self.summary.as_json(), "server": server}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go: any HTTP server.

    Attributes:
        url: Of the server.
        requests: Different requests as bytes; see `openloop.http_request`.
        pid: Root of its processes, None if it runs elsewhere.
        has_metrics: Whether it is our service, with model run times on /metrics.
        generator_cpu: Core of the generator, None leaves it free.
        late_limit_ms: Of the generator; see `summarize`.
    """

    url: str
    requests: list[bytes]
    pid: int | None
    has_metrics: bool
    generator_cpu: int | None
    late_limit_ms: float = LATE_LIMIT_MS

    def open_loop(
        self,
        times: Times,
        *,
        seconds: float,
        seed: int = 1,
        actions: Sequence[Action] = (),
        keep_answers: bool = False,
        order: Sequence[int] | None = None,
    ) -> Measured:
        """Sends requests at these times, in random order unless one is given."""
        rng = np.random.default_rng([seed, 1])
        chosen = rng.integers(len(self.requests), size=len(times)) if order is None else order
        plan = self._plan(np.asarray(chosen, np.int64), times=times, keep_answers=keep_answers)
        return self._run(plan, seconds, actions)

    def at_rate(
        self, rate: float, seconds: float, *, seed: int = 1, arrivals: Arrivals = "poisson"
    ) -> Measured:
        """An open loop at one rate."""
        times = arrival_times(rate, seconds, rng=np.random.default_rng(seed), arrivals=arrivals)
        return self.open_loop(times, seconds=seconds, seed=seed)

    def saturate(
        self, seconds: float, *, callers: int = SATURATING_CALLERS, seed: int = 1
    ) -> Measured:
        """A closed loop: what is answered when callers never pause."""
        rng = np.random.default_rng([seed, 2])
        order = rng.permutation(len(self.requests)).astype(np.int64)
        return self._run(self._plan(order, callers=callers, seconds=seconds), seconds, ())

    def _plan(self, order: Any, **options: Any) -> Plan:  # Any: fields of Plan
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return Plan(
            host=parts.hostname,
            port=parts.port or 80,
            requests=self.requests,
            order=order,
            **options,
        )

    def _run(self, plan: Plan, seconds: float, actions: Sequence[Action]) -> Measured:
        before = self._used()
        trace = generate(plan, cpu=self.generator_cpu, actions=actions)
        after = self._used()
        summary = summarize(trace, seconds=seconds, late_limit_ms=self.late_limit_ms)
        answered = int((trace.status == 200).sum())
        return Measured(
            summary=summary, server=self._use(before, after, answered, seconds), trace=trace
        )

    def _used(self) -> tuple[float, float] | None:
        if self.pid is None:
            return None
        run_s = model_run_seconds(self.url) if self.has_metrics else 0.0
        return cpu_seconds(self.pid), run_s

    def _use(
        self,
        before: tuple[float, float] | None,
        after: tuple[float, float] | None,
        answered: int,
        seconds: float,
    ) -> ServerUse | None:
        if before is None or after is None or self.pid is None or not answered:
            return None
        cpu_s, run_s = after[0] - before[0], after[1] - before[1]
        known = self.has_metrics
        return ServerUse(
            cpu_us=round(cpu_s / answered * 1e6, 1),
            run_us=round(run_s / answered * 1e6, 1) if known else None,
            outside_us=round((cpu_s - run_s) / answered * 1e6, 1) if known else None,
            cpu_share=round(cpu_s / seconds, 3),
            rss_mib=round(resident_bytes(self.pid) / 2**20, 1),
            pss_mib=round(proportional_bytes(self.pid) / 2**20, 1),
        )


@dataclass(frozen=True, kw_only=True)
class StandOptions:
    """How a stand of our own is set up.

    Attributes:
        bundle: Directory.
        items: Item snapshot.
        records: User records, written to the stand's Redis.
        workers: Worker processes of the service.
        settings: Environment variables of the service.
        pin: Whether processes are pinned to cores; only done where there are two or more.
        second_bundle: To swap to; None skips what needs it.
        late_limit_ms: Of the generator; see `summarize`.
    """

    bundle: Path
    items: Path
    records: Path
    workers: int = 1
    settings: Mapping[str, str] | None = None
    pin: bool = True
    second_bundle: Path | None = None
    late_limit_ms: float = LATE_LIMIT_MS


@dataclass(frozen=True, kw_only=True)
class Stand:
    """A service and a Redis of our own, and the bodies sent to them.

    Attributes:
        bundle_link: Symbolic link that the service was started with; may be pointed elsewhere.
        items_link: Likewise, to the item snapshot.
    """

    options: StandOptions
    redis: RedisProcess
    service: ServiceProcess
    bodies: list[bytes]
    bundle_link: Path
    items_link: Path
    generator_cpu: int | None

    def target(self, bodies: list[bytes] | None = None) -> Target:
        """Its service as a target, with its own bodies or others."""
        return Target(
            url=self.service.url,
            requests=score_requests(self.service.url, self.bodies if bodies is None else bodies),
            pid=self.service.pid,
            has_metrics=True,
            generator_cpu=self.generator_cpu,
            late_limit_ms=self.options.late_limit_ms,
        )


@contextmanager
def open_stand(options: StandOptions, bodies: list[bytes]) -> Iterator[Stand]:
    """Starts Redis and service, fills Redis, warms up; ends both with the block."""
    server_cpu, generator_cpu = core_pair(pin=options.pin)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        link = directory / "bundle"
        link.symlink_to(options.bundle.resolve())
        items_link = directory / "items.parquet"
        items_link.symlink_to(options.items.resolve())
        redis = RedisProcess(directory, cpu=generator_cpu)
        redis.start()
        try:
            redis.fill(options.records)
            service = ServiceProcess(
                bundle=link,
                items=items_link,
                store_url=redis.url,
                cpu=server_cpu if options.workers == 1 else None,
                workers=options.workers,
                settings=options.settings,
            )
            with service:
                stand = Stand(
                    options=options,
                    redis=redis,
                    service=service,
                    bodies=bodies,
                    bundle_link=link,
                    items_link=items_link,
                    generator_cpu=generator_cpu,
                )
                stand.target().saturate(WARM_UP_S)
                yield stand
        finally:
            redis.end()


def score_requests(url: str, bodies: Sequence[bytes]) -> list[bytes]:
    """The bodies as HTTP requests to POST /score."""
    host = urlsplit(url).netloc
    return [http_request(host, "/score", body) for body in bodies]


def core_pair(*, pin: bool) -> tuple[int | None, int | None]:
    """Cores of server and generator; None, None without two cores or without pinning."""
    available = cores()
    if not pin or len(available) < 2:
        return None, None
    return available[0], available[-1]


def model_run_seconds(url: str) -> float:
    """Seconds that the service has spent in model runs, by its /metrics."""
    return metric(url, 'scoring_stage_seconds_sum{stage="run"}')


def metric(url: str, name: str) -> float:
    """Sum of all samples of /metrics whose name, labels included, begins with `name`."""
    text = httpx.get(f"{url}/metrics", timeout=10.0).text
    samples = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
    return sum(float(value) for value in samples)
