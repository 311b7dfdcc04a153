"""MicroBatcher under random arrivals, cancels, failures and deadlines, in virtual time.

The loop's clock jumps to the next timer, so a scenario takes no real time, is the same every
time, and a caller that would wait for ever is an error at once: no timer is left to jump to.
"""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batch_plan import BatchPlan, DropReason, Tiling
from service.batcher import MicroBatcher
from service.errors import DeadlineExceeded, InferenceFailed, Overloaded, ShuttingDown
from service.run_cost import RunCost

MS = 1e-3
TICK_S = 1e-6  # Rounding of sums of milliseconds.


@dataclass(frozen=True)
class Request:
    number: int
    arrive_ms: int
    rows: int
    timeout_ms: int
    cancel_after_ms: int | None
    is_poison: bool
    part: int = 0


def cut(request: Request, num_parts: int) -> list[Request]:
    edges = [request.rows * part // num_parts for part in range(num_parts + 1)]
    return [
        replace(request, rows=end - start, part=part)
        for part, (start, end) in enumerate(pairwise(edges))
    ]


def join(parts: list[tuple[int, int]]) -> tuple[int, int]:
    assert [part for _, part in parts] == list(range(len(parts)))
    (number,) = {number for number, _ in parts}
    return number, 0


@dataclass(frozen=True)
class Scenario:
    requests: list[Request]
    run_ms: list[int]
    max_batch_rows: int
    max_queue_rows: int
    num_runners: int
    close_at_ms: int | None
    drain_ms: int
    cuts: bool
    is_inline: bool


@dataclass
class Ending:
    result: int | BaseException
    submitted_at: float
    ended_at: float


@dataclass
class Recorded:
    """Observer and model in one: everything that happened."""

    submitted: list[int] = field(default_factory=list)
    runs: list[list[Request]] = field(default_factory=list)
    drops: list[DropReason] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    queue_rows: int = 0
    most_queue_rows: int = 0

    def size(self, item: Request) -> int:
        self.submitted.append(item.number)
        return item.rows

    def run(self, items: list[Request]) -> list[tuple[int, int]]:
        self.runs.append(items)
        if any(item.is_poison for item in items):
            raise ValueError("poison")
        return [(item.number, item.part) for item in items]

    def batch_finished(self, *, rows: int, requests: int, run_seconds: float) -> None:
        assert rows >= requests >= 1

    def batch_split(self, *, requests: int) -> None:
        assert requests >= 2

    def request_waited(self, *, seconds: float) -> None:
        self.waits.append(seconds)

    def request_dropped(self, *, reason: DropReason) -> None:
        self.drops.append(reason)

    def queue_changed(self, *, rows: int) -> None:
        self.queue_rows = rows
        self.most_queue_rows = max(self.most_queue_rows, rows)


class JumpingSelector(selectors.DefaultSelector):
    """Does not wait: tells the loop that the time has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("somebody waits, and nothing will ever happen")
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class VirtualExecutor(Executor):
    """Calls the function on the loop's thread once its virtual duration is over."""

    def __init__(self, recorded: Recorded, run_ms: list[int]) -> None:
        self._recorded = recorded
        self._run_ms = run_ms
        self._num_runs = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self._recorded.num_running += 1
        self._recorded.most_running = max(self._recorded.most_running, self._recorded.num_running)
        duration_s = self._run_ms[self._num_runs % len(self._run_ms)] * MS
        self._num_runs += 1

        def complete() -> None:
            self._recorded.num_running -= 1
            if future.set_running_or_notify_cancel():
                future.set_result(fn(*args, **kwargs))

        asyncio.get_running_loop().call_later(duration_s, complete)
        return future


async def play(scenario: Scenario, recorded: Recorded) -> dict[int, Ending]:
    loop = asyncio.get_running_loop()
    batcher: MicroBatcher[Request, tuple[int, int]] = MicroBatcher(
        recorded.run,
        size=recorded.size,
        threads=VirtualExecutor(recorded, scenario.run_ms),
        observer=recorded,
        plan=BatchPlan(
            cost=RunCost(fixed_s=0, row_s=0, max_rows=scenario.max_batch_rows),
            max_queue_rows=scenario.max_queue_rows,
            num_runners=scenario.num_runners,
            inline_s=1.0 if scenario.is_inline else 0.0,
        ),
        tiling=Tiling(cut=cut, join=join) if scenario.cuts else None,
        clock=loop.time,
    )
    endings: dict[int, Ending] = {}

    async def call(request: Request) -> None:
        await asyncio.sleep(request.arrive_ms * MS)
        submitted_at = loop.time()
        try:
            result: int | BaseException = (
                await batcher.submit(request, submitted_at + request.timeout_ms * MS)
            )[0]
        except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - check_ending judges it
            result = exc
        endings[request.number] = Ending(result, submitted_at, loop.time())

    async def close() -> None:
        if scenario.close_at_ms is not None:
            await asyncio.sleep(scenario.close_at_ms * MS)
            await batcher.close(scenario.drain_ms * MS)

    tasks = []
    for request in scenario.requests:
        task = asyncio.create_task(call(request))
        tasks.append(task)
        if request.cancel_after_ms is not None:
            loop.call_later((request.arrive_ms + request.cancel_after_ms) * MS, task.cancel)
    await asyncio.gather(*tasks, close(), return_exceptions=True)
    # Whatever happened before, it serves the next caller, or says that it is closed.
    closes = scenario.close_at_ms is not None
    last = Request(-1, 0, 1, 10_000, None, False)
    if closes:
        with pytest.raises(ShuttingDown):
            await batcher.submit(last, loop.time() + 10)
    else:
        assert await batcher.submit(last, loop.time() + 10) == (-1, 0)
    assert batcher.queued_rows == recorded.queue_rows == 0
    await batcher.close(10)
    return endings


def check_ending(request: Request, ending: Ending, scenario: Scenario) -> None:
    took_s = ending.ended_at - ending.submitted_at
    match ending.result:
        case int(number):
            assert number == request.number
            assert not request.is_poison
        case DeadlineExceeded():
            assert took_s == pytest.approx(max(request.timeout_ms, 0) * MS, abs=TICK_S)
        case Overloaded():
            assert took_s == 0
        case InferenceFailed():
            assert request.is_poison
        case ShuttingDown():
            assert scenario.close_at_ms is not None
        case asyncio.CancelledError():
            assert request.cancel_after_ms is not None
        case other:
            raise AssertionError(f"undocumented: {other!r}")
    assert took_s <= max(request.timeout_ms, 0) * MS + TICK_S


def check_runs(scenario: Scenario, recorded: Recorded) -> None:
    assert recorded.most_running <= scenario.num_runners
    assert recorded.most_queue_rows <= scenario.max_queue_rows
    for items in recorded.runs:
        assert len(items) == 1 or sum(i.rows for i in items) <= scenario.max_batch_rows
    parts = [(item.number, item.part) for items in recorded.runs for item in items]
    assert all(parts.count(part) <= 2 for part in parts)
    if scenario.cuts:
        assert all(i.rows <= scenario.max_batch_rows for items in recorded.runs for i in items)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_requests = draw(st.integers(1, 12))
    return Scenario(
        requests=[
            Request(
                number=number,
                arrive_ms=draw(st.integers(0, 12)),
                rows=draw(st.integers(1, 8)),
                timeout_ms=draw(st.integers(-1, 40)),
                cancel_after_ms=draw(st.none() | st.integers(0, 20)),
                is_poison=draw(st.integers(0, 4)) == 0,
            )
            for number in range(num_requests)
        ],
        run_ms=draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        max_batch_rows=draw(st.integers(1, 20)),
        max_queue_rows=draw(st.integers(1, 40)),
        num_runners=draw(st.integers(1, 3)),
        close_at_ms=draw(st.none() | st.integers(0, 30)),
        drain_ms=draw(st.integers(0, 20)),
        cuts=draw(st.booleans()),
        is_inline=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(scenarios())
def test_every_caller_gets_its_own_answer_or_a_documented_error(scenario: Scenario) -> None:
    recorded = Recorded()
    unread: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: unread.append(context))
        endings = runner.run(play(scenario, recorded))
    assert unread == []
    started = {request.number: request for request in scenario.requests}
    for number, ending in endings.items():
        check_ending(started[number], ending, scenario)
    # A caller cancelled before it called is the only one without an ending.
    for request in scenario.requests:
        assert request.number in endings or request.cancel_after_ms == 0
    check_runs(scenario, recorded)


@st.composite
def calm_scenarios(draw: st.DrawFn) -> Scenario:
    """Enough time and room for everybody, and nobody leaves; some are poison."""
    scenario = draw(scenarios())
    return Scenario(
        requests=[
            Request(r.number, r.arrive_ms, r.rows, 100_000, None, r.is_poison)
            for r in scenario.requests
        ],
        run_ms=scenario.run_ms,
        max_batch_rows=scenario.max_batch_rows,
        max_queue_rows=1000,
        num_runners=1,
        close_at_ms=None,
        drain_ms=0,
        cuts=scenario.cuts,
        is_inline=scenario.is_inline,
    )


@settings(max_examples=200, deadline=None)
@given(calm_scenarios())
def test_with_time_and_room_only_the_poisonous_fail_and_order_is_kept(scenario: Scenario) -> None:
    recorded = Recorded()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        endings = runner.run(play(scenario, recorded))
    for request in scenario.requests:
        result = endings[request.number].result
        assert (
            isinstance(result, InferenceFailed) if request.is_poison else result == request.number
        )
    assert recorded.drops == []
    first_runs = list(dict.fromkeys(i.number for items in recorded.runs for i in items))
    assert first_runs == list(dict.fromkeys(recorded.submitted))


def test_prediction_follows_the_machine() -> None:
    async def predict(run_ms: int) -> float:
        recorded = Recorded()
        batcher: MicroBatcher[Request, tuple[int, int]] = MicroBatcher(
            recorded.run,
            size=recorded.size,
            threads=VirtualExecutor(recorded, [run_ms]),
            observer=recorded,
            plan=BatchPlan(cost=RunCost(fixed_s=0, row_s=1e-3, max_rows=10), max_queue_rows=100),
            clock=asyncio.get_running_loop().time,
        )
        request = Request(1, 0, 10, 0, None, False)
        for _ in range(100):
            await batcher.submit(request, asyncio.get_running_loop().time() + 10)
        waiting = [
            asyncio.create_task(batcher.submit(request, asyncio.get_running_loop().time() + 10))
            for _ in range(4)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        predicted_s = batcher.predicted_wait_s
        await asyncio.gather(*waiting)
        await batcher.close(10)
        return predicted_s

    predicted = {}
    for run_ms in (5, 10, 30):
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            predicted[run_ms] = runner.run(predict(run_ms))

    # Four runs, each of the duration that runs had of late, not the 10 ms of the sweep.
    for run_ms, predicted_s in predicted.items():
        assert predicted_s == pytest.approx(4 * run_ms * MS, rel=0.15)
