"""Scenarios of faults and changes under load: Redis, bundle swap, SIGTERM, poisoned requests."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from loadtest.outcome import Base, Fact, Outcome, phases
from loadtest.procs import resident_bytes
from loadtest.schedule import arrival_times
from loadtest.stand import Measured, Stand, metric
from service.registry import point
from service.settings import load_settings

SWAPS = 50
SWAP_BOUND_MIB = 20.0
SWAP_TIMEOUT_S = 60.0
LEAST_AFTER_SWAP_S = 8.0  # a bundle and a large item table take seconds to load
POISON_EVERY = 20
RECOVERY_BOUND_S = 2.0
_SETTLED_S = 0.1  # after a fault, until every look-up under way has ended
_ITEM_SWAPS = 'scoring_swaps_total{part="items"}'
_NO_RELOAD = "the service does not reload on SIGHUP"


def redis_stall(stand: Stand, base: Base) -> Outcome:
    """Redis stops answering, its connections stay open."""
    pid = stand.redis.pid
    return _redis_away(
        stand,
        base,
        name="redis-stall",
        away=lambda: os.kill(pid, signal.SIGSTOP),
        back=lambda: os.kill(pid, signal.SIGCONT),
    )


def redis_gone(stand: Stand, base: Base) -> Outcome:
    """Redis is killed and, some time later, started again."""
    return _redis_away(
        stand,
        base,
        name="redis-gone",
        away=lambda: stand.redis.end(signal.SIGKILL),
        back=stand.redis.start,
    )


def sigterm(stand: Stand, base: Base) -> Outcome:
    """SIGTERM at half of saturation; callers go elsewhere before the drain delay is over."""
    target, at = stand.target(), base.seconds / 2.0
    last = at + 0.8 * load_settings().drain_delay_ms / 1e3
    times = arrival_times(base.saturation / 2.0, last, rng=np.random.default_rng(base.seed))
    signalled: list[float] = []

    def terminate() -> None:
        signalled.append(time.monotonic())
        stand.service.signal(signal.SIGTERM)

    try:
        # Without the probes of the server: it is gone when the run ends.
        measured = replace(target, pid=None).open_loop(
            times, seconds=last, seed=base.seed, actions=[(at, terminate)]
        )
        code = stand.service.wait()
        took = time.monotonic() - signalled[0]
    finally:
        stand.service.start()
    marks = {"before": (0.0, at), "draining": (at, last)}
    runs = phases(measured, marks, late_limit_ms=target.late_limit_ms)
    return Outcome(
        name="sigterm",
        runs=runs,
        facts={"exit_code": code, "signal_to_exit_s": round(took, 2)},
        claims={
            "every request is answered": measured.summary.failed_share == 0.0,
            "exit code 0": code == 0,
        },
    )


def bundle_swap(stand: Stand, base: Base) -> Outcome:
    """The bundle's link is pointed at another bundle under load, and SIGHUP sent."""
    other = stand.options.second_bundle
    if other is None:
        return Outcome(name="bundle-swap", skipped="give another bundle with --second-bundle")
    if not _swap(stand, other):
        return Outcome(name="bundle-swap", skipped=_NO_RELOAD)
    target, at = stand.target(), base.seconds / 2.0
    first = stand.options.bundle
    end = at + max(1.5 * base.seconds, LEAST_AFTER_SWAP_S)
    times = arrival_times(base.saturation / 2.0, end, rng=np.random.default_rng(base.seed))
    measured = target.open_loop(
        times,
        seconds=end,
        seed=base.seed,
        actions=[(at, lambda: _point_at(stand, first))],
        keep_answers=True,
    )
    _wait_for_bundle(stand, first)
    is_new = np.array([_bundle_of(answer) == first.name for answer in measured.trace.answers])
    new_at = measured.trace.scheduled[is_new & (measured.trace.status == 200)]
    marks = {"before": (0.0, at), "from the swap on": (at, end)}
    return Outcome(
        name="bundle-swap",
        runs=phases(measured, marks, late_limit_ms=target.late_limit_ms),
        facts={
            "answers_of_the_first": int((~is_new).sum()),
            "answers_of_the_second": int(is_new.sum()),
            "first_answer_of_the_new_after_s": (
                round(float(new_at.min()) - at, 2) if len(new_at) else None
            ),
        },
        claims={
            "every request is answered": measured.summary.failed_share == 0.0,
            "the new bundle answers": bool(len(new_at)),
        },
    )


def item_swap(stand: Stand, base: Base) -> Outcome:
    """The item snapshot is replaced by a copy of itself under load; the service finds it itself."""
    poll_s = load_settings().reload_poll_s
    if not poll_s:
        return Outcome(name="item-swap", skipped="CTR_RELOAD_POLL_S is 0: no file is looked at")
    target, at = stand.target(), base.seconds / 2.0
    end = at + poll_s + max(1.5 * base.seconds, LEAST_AFTER_SWAP_S)
    times = arrival_times(base.saturation / 2.0, end, rng=np.random.default_rng(base.seed))
    copy = stand.items_link.with_name("copy.parquet")
    before = metric(target.url, _ITEM_SWAPS)

    def replace_items() -> None:
        shutil.copy(stand.options.items, copy)
        copy.replace(stand.items_link)

    measured = target.open_loop(times, seconds=end, seed=base.seed, actions=[(at, replace_items)])
    num_swaps = metric(target.url, _ITEM_SWAPS) - before
    marks = {"before": (0.0, at), "from the swap on": (at, end)}
    return Outcome(
        name="item-swap",
        runs=phases(measured, marks, late_limit_ms=target.late_limit_ms),
        claims={
            "every request is answered": measured.summary.failed_share == 0.0,
            "the new items are in service": num_swaps > 0,
        },
    )


def swaps(stand: Stand, base: Base) -> Outcome:
    """Resident memory over many bundle swaps, a little load between them."""
    other = stand.options.second_bundle
    if other is None:
        return Outcome(name="swaps", skipped="give another bundle with --second-bundle")
    points: list[float] = []
    for number in range(SWAPS):
        if not _swap(stand, (other, stand.options.bundle)[number % 2]):
            return Outcome(name="swaps", skipped=_NO_RELOAD)
        stand.target().saturate(0.3, seed=base.seed + number)
        points.append(round(resident_bytes(stand.service.pid) / 2**20, 1))
    # The same bundle is served at both: every swap before the first fills what is kept.
    growth = points[-1] - points[9]
    return Outcome(
        name="swaps",
        facts={"rss_mib_after_each": points, "growth_from_10_to_50_mib": round(growth, 1)},
        claims={f"grows by at most {SWAP_BOUND_MIB:g} MiB": growth <= SWAP_BOUND_MIB},
    )


def poisoned(stand: Stand, base: Base) -> Outcome:
    """The same requests twice clean and once with poison between: their answers, byte by byte."""
    times = arrival_times(base.saturation / 2.0, base.seconds, rng=np.random.default_rng(base.seed))
    clean = _with_request_ids(stand.bodies, len(times))
    order = list(range(len(times)))
    sick = list(clean)
    places = list(range(POISON_EVERY // 2, len(times), POISON_EVERY))
    poisons = make_poison(clean[0])
    for number, place in enumerate(places):
        sick[place] = poisons[number % len(poisons)]
    runs: dict[str, Measured] = {}
    for name, bodies in (("clean", clean), ("clean again", clean), ("poisoned", sick)):
        runs[name] = stand.target(bodies).open_loop(
            times, seconds=base.seconds, seed=base.seed, keep_answers=True, order=order
        )
    normal = np.ones(len(times), np.bool_)
    normal[places] = False
    compared, differ = _compare(runs["clean"], runs["poisoned"], normal)
    _, control = _compare(runs["clean"], runs["clean again"], normal)
    facts: dict[str, Fact] = {
        "poisoned_requests": len(places),
        "others_compared": compared,
        "others_that_differ": differ,
        "differ_between_clean_runs": control,
        "poisoned_statuses": {
            str(status): int(count)
            for status, count in zip(
                *np.unique(runs["poisoned"].trace.status[places], return_counts=True), strict=True
            )
        },
    }
    return Outcome(
        name="poisoned",
        runs={name: measured.summary for name, measured in runs.items()},
        facts=facts,
        claims={
            "other answers are the same, bit for bit": compared > 0 and differ == 0,
            "no poison is answered with 500": not (runs["poisoned"].trace.status == 500).any(),
        },
    )


def make_poison(body: bytes) -> list[bytes]:
    """Bodies made from a good one that are wrong, absurd, or no JSON."""
    good = msgspec.json.decode(body)
    ids = [2**63 - 1, -(2**63), 2**64, 10**30, -1, 0, 1.5e308, "", "\u0000", "x" * 10_000]
    bodies = [
        msgspec.json.encode({**good, "candidates": [value, 1, 2]})
        for value in ids
        if not isinstance(value, int) or value.bit_length() <= 64
    ]
    bodies += [
        msgspec.json.encode({**good, "candidates": []}),
        msgspec.json.encode({**good, "candidates": {"item_id": [1, 2], "display_location": [1]}}),
        msgspec.json.encode({**good, "user_id": "\U0001f4a9" * 50}),
        msgspec.json.encode({**good, "context": dict.fromkeys(good["context"], 1e308)}),
        msgspec.json.encode({**good, "user_features": {"trips": -1e308, "nonsense": [[]]}}),
        msgspec.json.encode({**good, "time": "9999-12-31T23:59:59Z"}),
    ]
    text = body.decode()
    return [
        *bodies,
        text.replace('"candidates":[', '"candidates":[NaN,', 1).encode(),
        text.replace('"candidates":[', f'"candidates":[{10**30},', 1).encode(),
        body[: len(body) // 2],
        b"\xff\xfe\x00garbage",
        b"[" * 5000,
    ]


def _redis_away(
    stand: Stand, base: Base, *, name: str, away: Callable[[], None], back: Callable[[], None]
) -> Outcome:
    target, begin = stand.target(), base.seconds
    end, total = 2.0 * base.seconds, 3.0 * base.seconds
    times = arrival_times(base.saturation / 2.0, total, rng=np.random.default_rng(base.seed))
    returned: list[float] = []

    def bring_back() -> None:
        back()
        returned.append(time.monotonic())

    measured = target.open_loop(
        times, seconds=total, seed=base.seed, actions=[(begin, away), (end, bring_back)]
    )
    trace = measured.trace
    back_at = returned[0] - trace.started_at
    while_away = trace.between(begin + _SETTLED_S, end)
    degraded_at = trace.scheduled[trace.degraded]
    recovery_s = max(float(degraded_at.max()) - back_at, 0.0) if len(degraded_at) else 0.0
    marks = {"before": (0.0, begin), "away": (begin, end), "back": (back_at, total)}
    return Outcome(
        name=name,
        runs=phases(measured, marks, late_limit_ms=target.late_limit_ms),
        facts={
            "degraded_share_while_away": round(float(while_away.degraded.mean()), 4),
            "full_answers_after_return_s": round(recovery_s, 3),
            "answers_after_their_deadline": int(
                (trace.latency[trace.status == 200] > base.timeout_ms / 1e3).sum()
            ),
        },
        claims={
            "every request is answered": measured.summary.failed_share == 0.0,
            f"full answers within {RECOVERY_BOUND_S:g} s": recovery_s <= RECOVERY_BOUND_S,
        },
    )


def _swap(stand: Stand, bundle: Path) -> bool:
    """Points the link at the bundle and waits until it is served; False if the service ends."""
    _point_at(stand, bundle)
    if _wait_for_bundle(stand, bundle):
        return True
    stand.service.end()
    _link(stand, stand.options.bundle)
    stand.service.start()
    return False


def _point_at(stand: Stand, bundle: Path) -> None:
    _link(stand, bundle)
    stand.service.signal(signal.SIGHUP)


def _link(stand: Stand, bundle: Path) -> None:
    point(stand.bundle_link, bundle.resolve())


def _wait_for_bundle(stand: Stand, bundle: Path) -> bool:
    deadline = time.monotonic() + SWAP_TIMEOUT_S
    while time.monotonic() < deadline and stand.service.is_running:
        try:
            answer = httpx.get(f"{stand.service.url}/readyz", timeout=2.0)
        except httpx.TransportError:
            continue
        if answer.status_code == 200 and answer.json()["bundle"] == bundle.resolve().name:
            return True
        time.sleep(0.05)
    return False


def _with_request_ids(bodies: list[bytes], count: int) -> list[bytes]:
    """Bodies in turn, each with an id of its own: the answer then has nothing random in it."""
    made = []
    for number in range(count):
        body = msgspec.json.decode(bodies[number % len(bodies)])
        made.append(msgspec.json.encode({**body, "request_id": f"r{number}"}))
    return made


def _compare(one: Measured, other: Measured, chosen: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """How many requests both runs answered in full, and how many of those answers differ."""
    both = chosen & (one.trace.status == 200) & (other.trace.status == 200)
    both &= ~(one.trace.degraded | other.trace.degraded)
    places = np.flatnonzero(both).tolist()
    differ = sum(one.trace.answers[place] != other.trace.answers[place] for place in places)
    return len(places), differ


def _bundle_of(answer: bytes) -> str:
    return answer.partition(b'"bundle":"')[2].partition(b'"')[0].decode()
