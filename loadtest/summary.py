"""One run's figures from its trace: quantiles by HDR histogram, statuses, and whether it counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

from loadtest.openloop import BROKEN, REFUSED, UNANSWERED, Trace

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 60_000_000, 3
_NAMES = {REFUSED: "no connection", BROKEN: "cut off", UNANSWERED: "no answer"}

MAX_CPU_SHARE = 0.8
QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of one run.

    Attributes:
        offered_per_s: Scheduled requests by the schedule's length.
        achieved_per_s: Those answered with 200, by the same length.
        statuses: Number by HTTP status, or by what happened in place of an answer.
        degraded: Answers made with defaults.
        failed_share: Requests that were not answered with 200, refusals included.
        latency_ms: Of answers with 200, from the scheduled time: p50, p90, p99, p99.9, max.
        refusal_ms: The same of answers with another status.
        worst_second_p99_ms: The largest p99 of any second that answered 20 requests or more.
        late_ms: The generator's own lateness: p50, p99, max.
        generator_cpu_share: CPU time of the generator by wall time.
        void: Why the run does not count; None if it does.
        histogram: HDR histogram of `latency_ms` in microseconds: V2, compressed, base64.
    """

    seconds: float
    requests: int
    offered_per_s: float
    achieved_per_s: float
    statuses: dict[str, int]
    degraded: int
    failed_share: float
    latency_ms: dict[str, float]
    refusal_ms: dict[str, float]
    worst_second_p99_ms: float | None
    late_ms: dict[str, float]
    generator_cpu_share: float
    void: str | None
    histogram: str

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Plain data."""
        return asdict(self)


def summarize(trace: Trace, *, seconds: float, late_limit_ms: float) -> Summary:
    """Figures of a trace whose schedule is so long.

    Args:
        trace: An empty one is void.
        seconds: Length of the schedule.
        late_limit_ms: The run is void if 1 % of its requests left later than this.
    """
    answered = trace.status == 200
    other = (trace.status >= 100) & ~answered
    histogram = to_histogram(trace.latency[answered])
    late = quantiles_ms(to_histogram(trace.late), ("p50", "p99", "max"))
    return Summary(
        seconds=round(seconds, 3),
        requests=len(trace),
        offered_per_s=round(len(trace) / seconds, 1),
        achieved_per_s=round(int(answered.sum()) / seconds, 1),
        statuses=_count_statuses(trace.status),
        degraded=int(trace.degraded.sum()),
        failed_share=round(1.0 - float(answered.mean()), 6) if len(trace) else 0.0,
        latency_ms=quantiles_ms(histogram, tuple(QUANTILES)),
        refusal_ms=quantiles_ms(to_histogram(trace.latency[other]), ("p50", "p99", "max")),
        worst_second_p99_ms=_worst_second(trace),
        late_ms=late,
        generator_cpu_share=round(trace.cpu_share, 3),
        void=_why_void(late, trace.cpu_share, late_limit_ms),
        histogram=histogram.encode().decode("ascii"),
    )


def to_histogram(seconds: npt.NDArray[np.float64]) -> HdrHistogram:
    """HDR histogram in microseconds, three digits, up to a minute."""
    histogram = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    micros = np.clip(np.rint(seconds * 1e6), _LOWEST_US, _HIGHEST_US).astype(np.int64)
    values, counts = np.unique(micros, return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    return histogram


def quantiles_ms(histogram: HdrHistogram, names: Sequence[str]) -> dict[str, float]:
    """By name, milliseconds; empty for an empty histogram."""
    if not histogram.total_count:
        return {}
    return {
        name: round(histogram.get_value_at_percentile(QUANTILES[name]) / 1000.0, 3)
        for name in names
    }


def median_of(values: Sequence[float]) -> float:
    """The median of repeats, NaN of none."""
    return float(np.median(values)) if values else float("nan")


def _count_statuses(status: npt.NDArray[np.int64]) -> dict[str, int]:
    counts = Counter(status.tolist())
    return {_NAMES.get(code, str(code)): counts[code] for code in sorted(counts, reverse=True)}


def _worst_second(trace: Trace) -> float | None:
    answered = trace.status == 200
    second, latency = trace.scheduled[answered].astype(np.int64), trace.latency[answered]
    worst = [
        float(np.quantile(latency[second == value], 0.99))
        for value, count in zip(*np.unique(second, return_counts=True), strict=True)
        if count >= 20
    ]
    return round(max(worst) * 1e3, 3) if worst else None


def _why_void(late: dict[str, float], cpu_share: float, limit_ms: float) -> str | None:
    if not late:
        return "no request was scheduled"
    if late["p99"] > limit_ms:
        return f"the generator was late: p99 {late['p99']:.2f} ms, allowed {limit_ms:g} ms"
    if cpu_share > MAX_CPU_SHARE:
        return f"the generator was busy {cpu_share:.0%} of the time, allowed {MAX_CPU_SHARE:.0%}"
    return None
