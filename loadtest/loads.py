"""Scenarios of load alone: steady, step, burst, overload, and memory under many requests."""

from collections.abc import Sequence

import numpy as np

from loadtest.outcome import Base, Fact, Outcome, phases
from loadtest.procs import resident_bytes
from loadtest.schedule import steps
from loadtest.stand import Measured, Stand, Target
from loadtest.summary import Summary, median_of

UNLOADED_SHARE = 0.02
MIN_UNLOADED_PER_S = 20.0
TAIL_BOUND = 5.0  # p99 at half of saturation, in unloaded p50
OVERLOADS = (1.5, 2.0, 3.0)  # offered by saturation
GOODPUT_SHARE = 0.9
LATE_ANSWERS = 0.001
REFUSAL_BOUND_US = 120.0
MEMORY_FIRST, MEMORY_LATE, MEMORY_LAST = 20_000, 150_000, 200_000
MEMORY_BOUND_MIB = 20.0


def steady(stand: Stand, base: Base) -> Outcome:
    """Half of saturation beside nearly none, in turn."""
    target = stand.target()
    unloaded_rate = max(base.saturation * UNLOADED_SHARE, MIN_UNLOADED_PER_S)
    runs: dict[str, Summary] = {}
    p50, p99 = [], []
    for repeat in range(base.repeats):
        seed = base.seed + repeat
        quiet = target.at_rate(unloaded_rate, base.seconds, seed=seed).summary
        half = target.at_rate(base.saturation / 2.0, base.seconds, seed=seed).summary
        runs |= {f"unloaded {repeat + 1}": quiet, f"half {repeat + 1}": half}
        p50.append(quiet.latency_ms["p50"])
        p99.append(half.latency_ms["p99"])
    ratios = [high / low for low, high in zip(p50, p99, strict=True)]
    return Outcome(
        name="steady",
        runs=runs,
        facts={
            "unloaded_p50_ms": round(median_of(p50), 3),
            "half_p99_ms": round(median_of(p99), 3),
            "p99_by_unloaded_p50": round(median_of(ratios), 2),
            "each_repeat": [round(ratio, 2) for ratio in ratios],
        },
        claims={
            f"p99 at half at most {TAIL_BOUND:g} unloaded p50": median_of(ratios) <= TAIL_BOUND
        },
    )


def step(stand: Stand, base: Base) -> Outcome:
    """A quarter of saturation, three quarters, and a quarter again."""
    rates = [base.saturation * share for share in (0.25, 0.75, 0.25)]
    target = stand.target()
    times = steps(rates, base.seconds, rng=np.random.default_rng(base.seed))
    measured = target.open_loop(times, seconds=3 * base.seconds, seed=base.seed)
    names = ("quarter", "three quarters", "quarter again")
    marks = {
        name: (position * base.seconds, (position + 1) * base.seconds)
        for position, name in enumerate(names)
    }
    runs = phases(measured, marks, late_limit_ms=target.late_limit_ms)
    return Outcome(
        name="step",
        runs=runs,
        claims={"all answered": all(run.failed_share == 0.0 for run in runs.values())},
    )


def burst(stand: Stand, base: Base) -> Outcome:
    """Half of saturation as independent callers and as clumps of them."""
    target, rate = stand.target(), base.saturation / 2.0
    even = target.at_rate(rate, base.seconds, seed=base.seed).summary
    clumps = target.at_rate(rate, base.seconds, seed=base.seed, arrivals="gamma").summary
    return Outcome(
        name="burst",
        runs={"poisson": even, "bursts": clumps},
        facts={"p99_by_poisson": round(clumps.latency_ms["p99"] / even.latency_ms["p99"], 2)},
    )


def overload(stand: Stand, base: Base) -> Outcome:
    """Twice saturation: what is answered keeps its deadline, what is refused is cheap."""
    target = stand.target()
    runs = {"closed loop": target.saturate(base.seconds, seed=base.seed)}
    for times in OVERLOADS:
        rate = times * base.saturation
        runs[f"{times:g} x saturation"] = target.at_rate(rate, base.seconds, seed=base.seed)
    refusal_us = _refusal_cpu_us(list(runs.values())[1:])
    twice, peak = runs["2 x saturation"], runs["closed loop"].summary.achieved_per_s
    trace, goodput = twice.trace, twice.summary.achieved_per_s
    answered = trace.status == 200
    refused_per_s = int((~answered).sum()) / base.seconds
    share = min(refused_per_s * max(refusal_us, 0.0) * 1e-6, 1.0)
    expected = peak * (1.0 - share)
    late = float((trace.latency[answered] > base.timeout_ms / 1e3).mean()) if answered.any() else 0
    facts: dict[str, Fact] = {
        "peak_per_s": peak,
        "goodput_per_s": goodput,
        "refused_per_s": round(refused_per_s, 1),
        "refusal_cpu_us": round(refusal_us, 1),
        "cpu_share_of_refusals": round(share, 4),
        "goodput_by_what_refusals_leave": round(goodput / expected, 3) if expected else None,
        "answers_after_their_deadline_share": round(late, 5),
    }
    claims = {
        "answers keep their deadline (99.9 %)": late <= LATE_ANSWERS,
        f"goodput at least {GOODPUT_SHARE:.0%} of what refusals leave of the peak": (
            goodput >= GOODPUT_SHARE * expected
        ),
        f"a refusal costs at most {REFUSAL_BOUND_US:g} us": refusal_us <= REFUSAL_BOUND_US,
    }
    figures = {name: run.summary for name, run in runs.items()}
    return Outcome(name="overload", runs=figures, facts=facts, claims=claims)


def memory(stand: Stand, base: Base) -> Outcome:
    """Resident memory over many requests; the last must not need more than the first."""
    del base
    target = stand.target()
    assert target.pid is not None
    points: dict[str, float] = {}
    done = 0
    for goal in (MEMORY_FIRST, 50_000, 100_000, MEMORY_LATE, MEMORY_LAST):
        while done < goal:
            done += _closed_loop_requests(target, goal - done, seed=done)
        points[str(goal)] = round(resident_bytes(target.pid) / 2**20, 1)
    growth = points[str(MEMORY_LAST)] - points[str(MEMORY_FIRST)]
    late_growth = points[str(MEMORY_LAST)] - points[str(MEMORY_LATE)]
    return Outcome(
        name="memory",
        facts={
            "rss_mib_after_requests": points,
            "growth_mib": round(growth, 1),
            "growth_of_last_50000_mib": round(late_growth, 1),
        },
        claims={f"grows by at most {MEMORY_BOUND_MIB:g} MiB": growth <= MEMORY_BOUND_MIB},
    )


def _closed_loop_requests(target: Target, wanted: int, *, seed: int) -> int:
    # About a second at the rate of a warm service, so that the goal is not overshot by much.
    seconds = min(max(wanted / 1500.0, 0.5), 20.0)
    return target.saturate(seconds, seed=seed).summary.requests


def _refusal_cpu_us(runs: Sequence[Measured]) -> float:
    """CPU of a request that is not answered with 200, microseconds.

    From runs beyond saturation, in which answers and refusals are mixed in different parts: CPU
    time = answers x a + refusals x r, solved for a and r by least squares.
    """
    counts, used = [], []
    for run in runs:
        assert run.server is not None
        answered = int((run.trace.status == 200).sum())
        counts.append([answered, len(run.trace) - answered])
        used.append(run.server.cpu_us * answered)
    solution = np.linalg.lstsq(np.array(counts, np.float64), np.array(used), rcond=None)[0]
    return float(solution[1])
