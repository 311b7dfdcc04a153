"""How much a service can take: a sweep of rates with its knee, and the highest rate that holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.stand import Measured, Target
from loadtest.summary import QUANTILES, median_of

SWEEP_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
KNEE_TAIL = 5.0  # the knee is the last rate whose p99 is within so many p50 of the lowest rate
MAX_FAILED_SHARE = 0.001
LATE_PART = 0.1  # of the bound: a generator later than this decides the result itself
_SEARCH_STEPS = 6

OnRun = Callable[[str, Measured], None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One offered rate of a sweep: medians of its repeats that count.

    Attributes:
        rate: Requests per second asked for.
        latency_ms: p50, p90, p99, p99.9 and max of answers with 200.
        lowest_ms, highest_ms: The same, the least and the greatest of the repeats.
        cpu_us: Server CPU per request; None when it runs elsewhere.
        void: Number of repeats that do not count.
    """

    rate: float
    offered_per_s: float
    achieved_per_s: float
    failed_share: float
    latency_ms: dict[str, float]
    lowest_ms: dict[str, float]
    highest_ms: dict[str, float]
    cpu_us: float | None
    outside_us: float | None
    late_p99_ms: float
    repeats: int
    void: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points in ascending order of rate.

    Attributes:
        saturation: What a closed loop gets answered per second; the rates are shares of it.
        knee: See `KNEE_TAIL`; None if even the second rate is beyond it.
    """

    saturation: float
    points: Sequence[Point]
    knee: float | None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Outcome of a search.

    Attributes:
        rate: Highest rate that held, requests per second; None if none did.
        tried: Rate, p99, failed share, void, and whether it held, in the order tried.
        void: Whether the generator, not the service, ended the search: `rate` is a lower bound.
    """

    rate: float | None
    p99_bound_ms: float
    max_failed_share: float
    tried: Sequence[dict[str, Any]]  # Any: JSON
    void: bool


def sweep(
    target: Target, *, saturation: float, seconds: float, repeats: int, seed: int, on_run: OnRun
) -> Sweep:
    """Runs every rate once, then every rate again: drift of the machine meets all alike."""
    runs: dict[float, list[Measured]] = {}
    for repeat in range(repeats):
        for share in SWEEP_SHARES:
            rate = share * saturation
            measured = target.at_rate(rate, seconds, seed=seed + repeat)
            runs.setdefault(rate, []).append(measured)
            on_run(f"{rate:.0f}/s", measured)
    points = [_point(rate, measured) for rate, measured in runs.items()]
    return Sweep(saturation=saturation, points=points, knee=find_knee(points))


def find_knee(points: Sequence[Point]) -> float | None:
    """The highest rate up to which every p99 is within `KNEE_TAIL` p50 of the lowest rate."""
    bound = KNEE_TAIL * points[0].latency_ms.get("p50", 0.0)
    knee = None
    for point in points[1:]:
        p99 = point.latency_ms.get("p99")
        if p99 is None or p99 > bound or point.failed_share > MAX_FAILED_SHARE:
            break
        knee = point.rate
    return knee


def find_capacity(
    target: Target, *, saturation: float, p99_ms: float, seconds: float, seed: int, on_run: OnRun
) -> Capacity:
    """The highest rate with p99 within the bound and at most 0.1 % errors and refusals.

    Halves the interval between what holds and what does not, in the ratio of rates; a void run
    is repeated once, and if void again does not hold. To about 2 % after its six steps.
    """
    tried: list[dict[str, Any]] = []

    def holds(rate: float) -> bool:
        measured = target.at_rate(rate, seconds, seed=seed + len(tried))
        on_run(f"{rate:.0f}/s", measured)
        if measured.summary.void is not None:
            measured = target.at_rate(rate, seconds, seed=seed + len(tried))
            on_run(f"{rate:.0f}/s again", measured)
        figures = measured.summary
        p99 = figures.latency_ms.get("p99")
        fits = p99 is not None and p99 <= p99_ms and figures.failed_share <= MAX_FAILED_SHARE
        only_late = fits and figures.void is not None
        fits = fits and figures.void is None
        tried.append(
            {
                "rate": round(rate, 1),
                "p99_ms": p99,
                "failed_share": figures.failed_share,
                "void": figures.void,
                "holds": fits,
                "void_alone": only_late,
            }
        )
        return fits

    low, high = 0.0, 1.2 * saturation
    for rate in (0.4 * saturation, 0.2 * saturation, 0.1 * saturation, 0.05 * saturation):
        if holds(rate):
            low = rate
            break
        high = rate
    for _ in range(_SEARCH_STEPS if low else 0):
        middle = (low * high) ** 0.5
        if holds(middle):
            low = middle
        else:
            high = middle
    return Capacity(
        rate=round(low, 1) if low else None,
        p99_bound_ms=p99_ms,
        max_failed_share=MAX_FAILED_SHARE,
        tried=tried,
        void=any(entry["void_alone"] for entry in tried),
    )


def _point(rate: float, runs: Sequence[Measured]) -> Point:
    good = [run for run in runs if run.summary.void is None]
    # With no repeat that counts the figures are shown all the same, and marked.
    used = good or list(runs)
    answered = [run.summary.latency_ms for run in used if run.summary.latency_ms]
    values = {
        name: [latency[name] for latency in answered] for name in (QUANTILES if answered else ())
    }
    servers = [run.server for run in used if run.server is not None]
    outside = [server.outside_us for server in servers if server.outside_us is not None]
    return Point(
        rate=round(rate, 1),
        offered_per_s=median_of([run.summary.offered_per_s for run in used]),
        achieved_per_s=median_of([run.summary.achieved_per_s for run in used]),
        failed_share=median_of([run.summary.failed_share for run in used]),
        latency_ms={name: round(median_of(each), 3) for name, each in values.items()},
        lowest_ms={name: min(each) for name, each in values.items()},
        highest_ms={name: max(each) for name, each in values.items()},
        cpu_us=round(median_of([server.cpu_us for server in servers]), 1) if servers else None,
        outside_us=round(median_of(outside), 1) if outside else None,
        late_p99_ms=median_of([run.summary.late_ms.get("p99", 0.0) for run in used]),
        repeats=len(runs),
        void=len(runs) - len(good),
    )
