"""What is made of a trace: quantiles, void runs, the knee, capacity."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from rich.console import Console

from loadtest.capacity import Point, Sweep, find_capacity, find_knee
from loadtest.faults import make_poison
from loadtest.loads import _refusal_cpu_us
from loadtest.openloop import BROKEN, UNANSWERED, Trace
from loadtest.report import draw_sweep, show_sweep
from loadtest.stand import Measured, ServerUse, Target
from loadtest.summary import Summary, summarize


def _trace(
    latency_ms: list[float],
    *,
    status: list[int] | None = None,
    late_ms: float = 0.0,
    cpu_share: float = 0.1,
) -> Trace:
    count = len(latency_ms)
    return Trace(
        scheduled=np.arange(count, dtype=np.float64) / 100.0,
        late=np.full(count, late_ms / 1e3),
        latency=np.array(latency_ms) / 1e3,
        status=np.array(status or [200] * count, np.int64),
        degraded=np.zeros(count, np.bool_),
        started_at=0.0,
        cpu_share=cpu_share,
    )


def _summary(trace: Trace) -> Summary:
    return summarize(trace, seconds=len(trace) / 100.0, late_limit_ms=1.0)


def test_quantiles_are_of_answers_only_and_to_three_digits() -> None:
    latency = [float(ms) for ms in range(1, 101)]
    summary = _summary(_trace([*latency, 5000.0, 5000.0], status=[200] * 100 + [503, UNANSWERED]))
    assert summary.latency_ms["p50"] == pytest.approx(50.0, rel=1e-3)
    assert summary.latency_ms["p99"] == pytest.approx(99.0, rel=1e-3)
    assert summary.latency_ms["max"] == pytest.approx(100.0, rel=1e-3)
    assert summary.refusal_ms["max"] == pytest.approx(5000.0, rel=1e-3)
    assert summary.statuses == {"503": 1, "200": 100, "no answer": 1}
    assert summary.failed_share == pytest.approx(2 / 102, abs=1e-6)


def test_histogram_can_be_merged_with_another() -> None:
    one, two = _summary(_trace([1.0] * 99)), _summary(_trace([100.0]))
    merged = HdrHistogram.decode(one.histogram)
    merged.decode_and_add(two.histogram)
    assert merged.get_total_count() == 100
    assert merged.get_value_at_percentile(100.0) == pytest.approx(100_000, rel=1e-3)


def test_worst_second_sees_a_stall_that_p99_hides() -> None:
    latency = [1.0] * 1000
    latency[400:405] = [500.0] * 5
    summary = _summary(_trace(latency))
    assert summary.latency_ms["p99"] == pytest.approx(1.0, rel=1e-3)
    assert summary.worst_second_p99_ms == pytest.approx(500.0, rel=1e-3)


@pytest.mark.parametrize(
    ("late_ms", "cpu_share", "reason"),
    [(0.5, 0.5, None), (2.0, 0.1, "late"), (0.0, 0.95, "busy")],
)
def test_run_is_void_when_the_generator_was_late_or_busy(
    late_ms: float, cpu_share: float, reason: str | None
) -> None:
    void = _summary(_trace([1.0] * 50, late_ms=late_ms, cpu_share=cpu_share)).void
    assert (void is None) if reason is None else (void is not None and reason in void)


def test_a_run_without_any_answer_has_no_latency() -> None:
    summary = _summary(_trace([1.0, 1.0], status=[BROKEN, BROKEN]))
    assert summary.latency_ms == {}
    assert summary.statuses == {"cut off": 2}


def test_a_run_without_any_request_is_void() -> None:
    summary = summarize(_trace([]), seconds=1.0, late_limit_ms=1.0)
    assert summary.void == "no request was scheduled"
    assert (summary.requests, summary.failed_share) == (0, 0.0)


def test_sweep_is_shown_and_drawn(tmp_path: Path) -> None:
    points = [_point(10, 2), _point(100, 3), _point(200, 40, failed=0.5)]
    found = Sweep(saturation=180.0, points=points, knee=find_knee(points))
    console = Console(file=io.StringIO(), width=170)
    show_sweep(console, found)
    draw_sweep(tmp_path / "deep" / "load.png", found, caption="three rates")
    assert "knee 100" in cast(io.StringIO, console.file).getvalue()
    assert (tmp_path / "deep" / "load.png").read_bytes().startswith(b"\x89PNG")


def _point(rate: float, p99: float, *, failed: float = 0.0) -> Point:
    latency = {"p50": 1.0, "p99": p99}
    return Point(
        rate=rate,
        offered_per_s=rate,
        achieved_per_s=rate,
        failed_share=failed,
        latency_ms=latency,
        lowest_ms=latency,
        highest_ms=latency,
        cpu_us=None,
        outside_us=None,
        late_p99_ms=0.0,
        repeats=1,
        void=0,
    )


def test_knee_is_the_last_rate_before_the_tail_grows() -> None:
    points = [_point(10, 2), _point(100, 3), _point(200, 4.9), _point(300, 5.1), _point(400, 2)]
    assert find_knee(points) == 200


def test_knee_ends_where_requests_fail() -> None:
    assert find_knee([_point(10, 2), _point(100, 2), _point(200, 2, failed=0.01)]) == 100


def test_there_is_no_knee_when_the_second_rate_is_beyond_it() -> None:
    assert find_knee([_point(10, 2), _point(100, 50)]) is None


@dataclass
class QueueingServer:
    """Stands for a target: p99 of a queue with a known capacity; refuses beyond it."""

    capacity: float
    void_beyond: float = float("inf")
    rates: list[float] = field(default_factory=list)

    def at_rate(self, rate: float, seconds: float, *, seed: int) -> Measured:
        del seconds, seed
        self.rates.append(rate)
        p99 = 1.0 / (1.0 - rate / self.capacity) if rate < self.capacity else 1e4
        late_ms = 0.0 if rate < self.void_beyond else 5.0
        trace = _trace([p99] * 100, late_ms=late_ms)
        return Measured(summary=_summary(trace), server=None, trace=trace)


def _capacity(server: QueueingServer) -> tuple[float | None, bool]:
    found = find_capacity(
        cast(Target, server),
        saturation=1000.0,
        p99_ms=10.0,
        seconds=1.0,
        seed=1,
        on_run=lambda _name, _measured: None,
    )
    return found.rate, found.void


def test_capacity_is_the_rate_at_which_p99_meets_its_bound() -> None:
    rate, void = _capacity(QueueingServer(capacity=1000.0))
    # 1 / (1 - r / 1000) = 10 at 900.
    assert rate == pytest.approx(900.0, rel=0.02)
    assert rate is not None
    assert rate <= 900.0
    assert not void


def test_capacity_far_below_saturation_is_found() -> None:
    rate, _ = _capacity(QueueingServer(capacity=100.0))
    assert rate == pytest.approx(90.0, rel=0.05)


def test_no_capacity_when_nothing_holds() -> None:
    assert _capacity(QueueingServer(capacity=1.0))[0] is None


def test_search_that_a_late_generator_ended_says_so() -> None:
    rate, void = _capacity(QueueingServer(capacity=1000.0, void_beyond=500.0))
    assert rate is not None
    assert rate <= 500.0
    assert void


def test_cost_of_a_refusal_is_told_apart_from_that_of_an_answer() -> None:
    runs = []
    for answered, refused in ((900, 300), (800, 800), (700, 1900)):
        trace = _trace([1.0] * (answered + refused), status=[200] * answered + [503] * refused)
        used_us = answered * 500.0 + refused * 90.0
        use = ServerUse(
            cpu_us=used_us / answered,
            run_us=None,
            outside_us=None,
            cpu_share=1.0,
            rss_mib=1.0,
            pss_mib=1.0,
        )
        runs.append(Measured(summary=_summary(trace), server=use, trace=trace))
    assert _refusal_cpu_us(runs) == pytest.approx(90.0)


def test_poison_is_of_many_kinds() -> None:
    body = b'{"user_id":1,"context":{"store_id":"3"},"candidates":[1,2,3]}'
    poisons = make_poison(body)
    assert len(set(poisons)) == len(poisons) >= 15
    assert body not in poisons
    assert any(b"NaN" in poison for poison in poisons)
