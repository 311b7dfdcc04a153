"""MicroBatcher against a real executor; a gate in the run function holds runners busy."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from service.batch_plan import BatchPlan, DropReason, Tiling
from service.batcher import MicroBatcher
from service.errors import DeadlineExceeded, InferenceFailed, Overloaded, ShuttingDown
from service.run_cost import RunCost

pytestmark = pytest.mark.anyio

PLAN = BatchPlan(cost=RunCost(fixed_s=0, row_s=0, max_rows=10), max_queue_rows=10)
FAR_S = 60.0
LIMIT_S = 20.0


class Observed:
    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.splits: list[int] = []
        self.waits: list[float] = []
        self.drops: list[DropReason] = []
        self.queue_rows: list[int] = []

    def batch_finished(self, *, rows: int, requests: int, run_seconds: float) -> None:
        assert run_seconds >= 0
        self.batches.append((rows, requests))

    def batch_split(self, *, requests: int) -> None:
        self.splits.append(requests)

    def request_waited(self, *, seconds: float) -> None:
        self.waits.append(seconds)

    def request_dropped(self, *, reason: DropReason) -> None:
        self.drops.append(reason)

    def queue_changed(self, *, rows: int) -> None:
        self.queue_rows.append(rows)


class GatedModel:
    """Answers an item (rows, name) with its name in capitals; while the gate is shut it waits."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.runs: list[list[str]] = []
        self.poison: dict[str, BaseException] = {}

    def __call__(self, items: list[tuple[int, str]]) -> list[str]:
        self.runs.append([name for _, name in items])
        self.started.release()
        assert self.gate.wait(LIMIT_S)
        for _, name in items:
            if name in self.poison:
                raise self.poison[name]
        return [name.upper() for _, name in items]


class Rig:
    def __init__(self, batcher: MicroBatcher[tuple[int, str], str], model: GatedModel) -> None:
        self.batcher = batcher
        self.model = model
        self.observed = Observed()

    def send(self, name: str, *, rows: int = 1, timeout_s: float = FAR_S) -> "asyncio.Task[str]":
        deadline = asyncio.get_running_loop().time() + timeout_s
        return asyncio.create_task(self.batcher.submit((rows, name), deadline))

    async def hold_runner(self, name: str = "holder") -> "asyncio.Task[str]":
        """Shuts the gate and returns once a runner stands in front of it."""
        self.model.gate.clear()
        task = self.send(name)
        assert await asyncio.to_thread(self.model.started.acquire, timeout=LIMIT_S)
        return task


@asynccontextmanager
async def rig(
    *,
    max_batch_rows: int = 10,
    max_queue_rows: int = 100,
    num_runners: int = 1,
    row_s: float = 0.0,
    inline_s: float = 0.0,
    tiling: Tiling[tuple[int, str], str] | None = None,
) -> AsyncIterator[Rig]:
    model = GatedModel()
    with ThreadPoolExecutor(num_runners) as executor:
        batcher = MicroBatcher(
            model,
            size=lambda item: item[0],
            threads=executor,
            observer=(observed := Observed()),
            plan=BatchPlan(
                cost=RunCost(fixed_s=0, row_s=row_s, max_rows=max_batch_rows),
                max_queue_rows=max_queue_rows,
                num_runners=num_runners,
                inline_s=inline_s,
            ),
            tiling=tiling,
        )
        made = Rig(batcher, model)
        made.observed = observed
        try:
            yield made
        finally:
            model.gate.set()
            await batcher.close(LIMIT_S)


@pytest.fixture(autouse=True)
def quiet_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The loop reports lost exceptions to its log only: none may be there."""
    yield
    gc.collect()
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [r.getMessage() for r in records if r.name == "asyncio"] == []


def letters(item: tuple[int, str], num_parts: int) -> list[tuple[int, str]]:
    """Cuts an item whose name has a letter per row."""
    rows, name = item
    edges = [rows * part // num_parts for part in range(num_parts + 1)]
    return [(end - start, name[start:end]) for start, end in pairwise(edges)]


LETTERS: Tiling[tuple[int, str], str] = Tiling(cut=letters, join="".join)


async def settle(*tasks: "asyncio.Task[str]") -> list[object]:
    async with asyncio.timeout(LIMIT_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not is_true():  # noqa: ASYNC110 - the batcher gives no event
            await asyncio.sleep(0.001)


async def test_one_item_gets_its_result() -> None:
    async with rig() as r:
        assert await settle(r.send("a")) == ["A"]
        assert r.observed.batches == [(1, 1)]
        assert r.observed.drops == []


async def test_items_of_the_same_loop_turn_share_a_batch() -> None:
    async with rig() as r:
        assert await settle(r.send("a"), r.send("b"), r.send("c")) == ["A", "B", "C"]
        assert r.model.runs == [["a", "b", "c"]]


async def test_free_runner_takes_all_that_waits_in_order() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        tasks = [r.send(name) for name in "abc"]
        await until(lambda: r.batcher.queued_rows == 3)
        r.model.gate.set()
        assert await settle(holder, *tasks) == ["HOLDER", "A", "B", "C"]
        assert r.model.runs == [["holder"], ["a", "b", "c"]]
        assert len(r.observed.waits) == 4


async def test_batch_is_capped_in_rows_and_stays_first_in_first_out() -> None:
    async with rig(max_batch_rows=10) as r:
        holder = await r.hold_runner()
        tasks = [r.send("a", rows=6), r.send("b", rows=5), r.send("c", rows=1), r.send("d", rows=9)]
        await until(lambda: r.batcher.queued_rows == 21)
        r.model.gate.set()
        await settle(holder, *tasks)
        assert r.model.runs == [["holder"], ["a"], ["b", "c"], ["d"]]
        assert r.observed.batches == [(1, 1), (6, 1), (6, 2), (9, 1)]


async def test_item_larger_than_a_batch_runs_whole_without_a_tiling() -> None:
    async with rig(max_batch_rows=10) as r:
        holder = await r.hold_runner()
        tasks = [r.send("a"), r.send("big", rows=50), r.send("b")]
        await until(lambda: r.batcher.queued_rows == 52)
        r.model.gate.set()
        assert await settle(holder, *tasks) == ["HOLDER", "A", "BIG", "B"]
        assert r.model.runs == [["holder"], ["a"], ["big"], ["b"]]


async def test_two_runners_run_at_the_same_time() -> None:
    async with rig(num_runners=2) as r:
        first = await r.hold_runner("a")
        second = await r.hold_runner("b")
        assert r.model.runs == [["a"], ["b"]]
        r.model.gate.set()
        assert await settle(first, second) == ["A", "B"]


async def test_full_queue_refuses_at_once_and_has_room_again_later() -> None:
    async with rig(max_queue_rows=5) as r:
        holder = await r.hold_runner()
        waiting = r.send("a", rows=4)
        await until(lambda: r.batcher.queued_rows == 4)
        with pytest.raises(Overloaded, match="4 of 5 rows") as caught:
            await r.batcher.submit((2, "b"), asyncio.get_running_loop().time() + FAR_S)
        assert caught.value.retry_after_s >= 0
        fits = r.send("c", rows=1)
        r.model.gate.set()
        assert await settle(holder, waiting, fits) == ["HOLDER", "A", "C"]
        assert await settle(r.send("d", rows=5)) == ["D"]
        assert r.observed.drops == ["queue_full"]


async def test_item_larger_than_a_batch_runs_in_parts_and_is_joined_in_order() -> None:
    async with rig(max_batch_rows=4, tiling=LETTERS) as r:
        assert await settle(r.send("abcdefghij", rows=10)) == ["ABCDEFGHIJ"]
        assert r.model.runs == [["abc"], ["def"], ["ghij"]]
        assert r.observed.batches == [(3, 1), (3, 1), (4, 1)]


async def test_part_of_a_large_item_shares_its_batch() -> None:
    async with rig(max_batch_rows=4, tiling=LETTERS) as r:
        large, mate = r.send("abcdefg", rows=7), r.send("x")
        assert await settle(large, mate) == ["ABCDEFG", "X"]
        assert r.model.runs == [["abc"], ["defg"], ["x"]]
        assert await settle(r.send("abcdefg", rows=7), r.send("y", rows=1)) == ["ABCDEFG", "Y"]


async def test_idle_runners_share_an_item_that_is_worth_it() -> None:
    # 400 ms of rows, and a part is worth its hand-over from 16 rows on.
    async with rig(max_batch_rows=100, num_runners=2, row_s=0.01, tiling=LETTERS) as r:
        r.model.gate.clear()
        task = r.send("x" * 20 + "y" * 20, rows=40)
        for _ in range(2):
            assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        r.model.gate.set()
        assert await settle(task) == ["X" * 20 + "Y" * 20]
        assert sorted(r.model.runs) == [["x" * 20], ["y" * 20]]


async def test_idle_runners_do_not_share_a_small_item() -> None:
    async with rig(max_batch_rows=100, num_runners=2, row_s=0.01, tiling=LETTERS) as r:
        assert await settle(r.send("x" * 31, rows=31)) == ["X" * 31]
        assert r.model.runs == [["x" * 31]]


async def test_idle_runners_share_what_waits() -> None:
    async with rig(max_batch_rows=100, num_runners=2, row_s=0.01) as r:
        r.model.gate.clear()
        tasks = [r.send(name, rows=20) for name in "abcd"]
        for _ in range(2):
            assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        r.model.gate.set()
        assert await settle(*tasks) == ["A", "B", "C", "D"]
        assert sorted(r.model.runs) == [["a", "b"], ["c", "d"]]


async def test_one_failed_part_fails_the_item_alone() -> None:
    async with rig(max_batch_rows=4, tiling=LETTERS) as r:
        r.model.poison["efgh"] = ValueError("bad id")
        results = await settle(r.send("abcdefgh", rows=8), r.send("x"))
        assert isinstance(results[0], InferenceFailed)
        assert results[1] == "X"


async def test_cancelled_item_takes_all_its_parts_out_of_the_queue() -> None:
    async with rig(max_batch_rows=4, tiling=LETTERS) as r:
        holder = await r.hold_runner()
        gone, mate = r.send("abcdefgh", rows=8), r.send("x")
        await until(lambda: r.batcher.queued_rows == 9)
        gone.cancel()
        await until(lambda: r.batcher.queued_rows == 1)
        r.model.gate.set()
        assert await settle(holder, mate) == ["HOLDER", "X"]
        assert r.observed.drops == ["cancelled"]


async def test_expired_item_takes_all_its_parts_out_of_the_queue() -> None:
    async with rig(max_batch_rows=4, tiling=LETTERS) as r:
        holder = await r.hold_runner()
        late = r.send("abcdefgh", rows=8, timeout_s=0.02)
        assert isinstance((await settle(late))[0], DeadlineExceeded)
        assert r.batcher.queued_rows == 0
        r.model.gate.set()
        assert await settle(holder) == ["HOLDER"]
        assert r.observed.drops == ["expired"]


async def test_short_run_is_made_on_the_loop_s_own_thread() -> None:
    where: list[str] = []

    def run(items: list[int]) -> list[int]:
        where.append(threading.current_thread().name)
        return items

    with ThreadPoolExecutor(1) as executor:
        batcher: MicroBatcher[int, int] = MicroBatcher(
            run,
            size=lambda item: item,
            threads=executor,
            observer=Observed(),
            plan=BatchPlan(
                cost=RunCost(fixed_s=0, row_s=0.1, max_rows=10), max_queue_rows=10, inline_s=0.25
            ),
        )
        deadline = asyncio.get_running_loop().time() + FAR_S
        assert await batcher.submit(2, deadline) == 2
        assert await batcher.submit(3, deadline) == 3
        await batcher.close(LIMIT_S)
    assert where[0] == threading.current_thread().name
    assert where[1] != where[0]


async def test_short_run_goes_to_a_thread_while_another_is_under_way() -> None:
    async with rig(num_runners=2, row_s=0.01, inline_s=0.05) as r:
        r.model.gate.clear()
        long = r.send("long", rows=10)
        assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        # On the loop's own thread the gate could never be opened.
        short = r.send("short")
        assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        r.model.gate.set()
        assert await settle(long, short) == ["LONG", "SHORT"]


async def test_poison_on_the_loop_s_thread_fails_only_itself() -> None:
    async with rig(inline_s=1.0) as r:
        r.model.poison["guilty"] = ValueError("bad id")
        results = await settle(r.send("a"), r.send("guilty"), r.send("b"))
        assert results[0] == "A"
        assert isinstance(results[1], InferenceFailed)
        assert results[2] == "B"
        assert r.model.runs == [["a", "guilty", "b"], ["a"], ["guilty"], ["b"]]


async def test_request_that_the_queue_would_make_late_is_refused_at_once() -> None:
    async with rig(row_s=0.1) as r:
        holder = await r.hold_runner()
        waiting = r.send("a", rows=5)
        await until(lambda: r.batcher.queued_rows == 5)
        # The holder takes 100 ms and a 500.
        deadline = asyncio.get_running_loop().time() + 0.3
        with pytest.raises(Overloaded, match="5 rows take about") as caught:
            await r.batcher.submit((1, "late"), deadline)
        assert caught.value.retry_after_s == pytest.approx(0.6, abs=0.1)
        in_time = r.send("b", timeout_s=10.0)
        await until(lambda: r.batcher.queued_rows == 6)
        r.model.gate.set()
        assert await settle(holder, waiting, in_time) == ["HOLDER", "A", "B"]
        assert r.observed.drops == ["queue_time"]


async def test_requests_of_one_turn_are_refused_as_well() -> None:
    async with rig(row_s=0.1, inline_s=FAR_S) as r:
        tasks = [r.send(name, rows=2, timeout_s=0.5) for name in "abc"]
        results = await settle(*tasks)
        # Each takes 200 ms, and nothing has begun to run when the third comes.
        assert results[:2] == ["A", "B"]
        assert isinstance(results[2], Overloaded)


async def test_idle_runner_takes_a_request_however_long_it_is_said_to_take() -> None:
    async with rig(row_s=1000.0) as r:
        assert await settle(r.send("a", timeout_s=10.0)) == ["A"]


async def test_item_is_let_go_before_its_deadline() -> None:
    class Item:
        pass

    with ThreadPoolExecutor(1) as executor:
        batcher: MicroBatcher[Item, int] = MicroBatcher(
            lambda items: [1] * len(items),
            size=lambda item: 1,
            threads=executor,
            observer=Observed(),
            plan=PLAN,
        )
        item = Item()
        gone = weakref.ref(item)
        assert await batcher.submit(item, asyncio.get_running_loop().time() + FAR_S) == 1
        del item
        await until(lambda: gone() is None)
        await batcher.close(LIMIT_S)


async def test_deadlines_in_any_order_are_each_kept() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        ended: list[str] = []
        tasks = []
        for name, timeout_s in (("c", 0.09), ("a", 0.03), ("b", 0.06)):
            task = r.send(name, timeout_s=timeout_s)
            task.add_done_callback(lambda _, name=name: ended.append(name))  # type: ignore[misc]  # mypy knows no default in a lambda
            tasks.append(task)
        results = await settle(*tasks)
        assert [type(result) for result in results] == [DeadlineExceeded] * 3
        assert ended == ["a", "b", "c"]
        r.model.gate.set()
        assert await settle(holder) == ["HOLDER"]


async def test_deadline_in_the_past_is_refused_without_running() -> None:
    async with rig() as r:
        with pytest.raises(DeadlineExceeded):
            await r.batcher.submit((1, "late"), asyncio.get_running_loop().time())
        assert r.model.runs == []
        assert r.observed.drops == ["expired"]


async def test_queued_item_that_expires_is_dropped_and_never_runs() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        late, in_time = r.send("late", timeout_s=0.02), r.send("b")
        assert isinstance((await settle(late))[0], DeadlineExceeded)
        assert r.batcher.queued_rows == 1
        r.model.gate.set()
        assert await settle(holder, in_time) == ["HOLDER", "B"]
        assert r.model.runs == [["holder"], ["b"]]
        assert r.observed.drops == ["expired"]


async def test_running_item_gets_its_deadline_while_the_runner_is_still_busy() -> None:
    async with rig() as r:
        r.model.gate.clear()
        late, mate = r.send("late", timeout_s=0.02), r.send("mate")
        assert isinstance((await settle(late))[0], DeadlineExceeded)
        assert not r.model.gate.is_set()
        r.model.gate.set()
        assert await settle(mate) == ["MATE"]
        assert r.observed.drops == []


async def test_cancelled_queued_item_is_dropped_and_its_mates_are_not() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        gone, mate = r.send("gone"), r.send("mate")
        await until(lambda: r.batcher.queued_rows == 2)
        gone.cancel()
        await until(lambda: r.batcher.queued_rows == 1)
        r.model.gate.set()
        assert await settle(holder, mate) == ["HOLDER", "MATE"]
        assert r.model.runs == [["holder"], ["mate"]]
        assert r.observed.drops == ["cancelled"]


async def test_item_cancelled_in_the_turn_it_would_run_does_not_run() -> None:
    async with rig() as r:
        gone, mate = r.send("gone"), r.send("mate")
        await asyncio.sleep(0)  # Both are queued, and the dispatch is due in the next turn.
        gone.cancel()
        assert await settle(mate) == ["MATE"]
        assert r.model.runs == [["mate"]]
        assert r.observed.drops == ["cancelled"]


async def test_cancelled_caller_does_not_hang_batch() -> None:
    async with rig() as r:
        r.model.gate.clear()
        gone, mate = r.send("gone"), r.send("mate")
        assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        gone.cancel()
        r.model.gate.set()
        results = await settle(gone, mate)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1] == "MATE"
        assert r.model.runs == [["gone", "mate"]]


async def test_all_callers_cancelled_leaves_a_batcher_that_works() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        tasks = [r.send(name) for name in "abc"]
        await until(lambda: r.batcher.queued_rows == 3)
        for task in (holder, *tasks):
            task.cancel()
        await settle(holder, *tasks)
        r.model.gate.set()
        assert await settle(r.send("next")) == ["NEXT"]
        assert r.observed.queue_rows[-1] == 0


@pytest.mark.parametrize("error", [ValueError("bad id"), StopIteration(), MemoryError()])
async def test_only_the_guilty_item_of_a_batch_fails(error: BaseException) -> None:
    async with rig() as r:
        r.model.poison["guilty"] = error
        results = await settle(r.send("a"), r.send("guilty"), r.send("b"))
        assert results[0] == "A"
        assert isinstance(results[1], InferenceFailed)
        assert results[1].__cause__ is error
        assert results[2] == "B"
        assert r.model.runs == [["a", "guilty", "b"], ["a"], ["guilty"], ["b"]]
        assert r.observed.splits == [3]


async def test_single_failed_item_is_not_run_again() -> None:
    async with rig() as r:
        r.model.poison["guilty"] = ValueError("bad id")
        assert isinstance((await settle(r.send("guilty")))[0], InferenceFailed)
        assert r.model.runs == [["guilty"]]
        assert r.observed.splits == []


async def test_caller_that_left_is_not_run_again_when_its_batch_is_split() -> None:
    async with rig() as r:
        r.model.poison["guilty"] = ValueError("bad id")
        r.model.gate.clear()
        gone, guilty, mate = r.send("gone"), r.send("guilty"), r.send("mate")
        assert await asyncio.to_thread(r.model.started.acquire, timeout=LIMIT_S)
        gone.cancel()
        await asyncio.wait({gone}, timeout=LIMIT_S)
        r.model.gate.set()
        results = await settle(guilty, mate)
        assert isinstance(results[0], InferenceFailed)
        assert results[1] == "MATE"
        assert r.model.runs == [["gone", "guilty", "mate"], ["guilty"], ["mate"]]


async def test_cancel_in_the_turn_of_the_deadline_leaves_no_unread_error() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 0.02
        task = asyncio.create_task(r.batcher.submit((1, "a"), deadline))
        await until(lambda: r.batcher.queued_rows == 1)
        loop.call_at(deadline + 1e-6, task.cancel)  # Late enough to come second in that turn.
        results = await settle(task)
        # The error first, if the turns were two after all.
        assert isinstance(results[0], asyncio.CancelledError | DeadlineExceeded)
        r.model.gate.set()
        await settle(holder)
    # quiet_loop looks for the loop's complaint.


async def test_wrong_number_of_results_fails_instead_of_mixing_answers() -> None:
    with ThreadPoolExecutor(1) as executor:
        batcher: MicroBatcher[int, int] = MicroBatcher(
            lambda items: items[1:],
            size=lambda item: 1,
            threads=executor,
            observer=Observed(),
            plan=PLAN,
        )
        deadline = asyncio.get_running_loop().time() + FAR_S
        tasks = [asyncio.create_task(batcher.submit(i, deadline)) for i in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [InferenceFailed] * 3
        await batcher.close(LIMIT_S)


async def test_executor_that_is_gone_fails_callers_instead_of_hanging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    batcher: MicroBatcher[int, int] = MicroBatcher(
        lambda items: items,
        size=lambda item: 1,
        threads=executor,
        observer=Observed(),
        plan=PLAN,
    )
    with pytest.raises(InferenceFailed):
        await batcher.submit(1, asyncio.get_running_loop().time() + FAR_S)
    assert "could not be run" in caplog.text
    await batcher.close(LIMIT_S)


async def test_size_below_one_is_a_misuse() -> None:
    async with rig() as r:
        with pytest.raises(ValueError, match="got 0 rows"):
            await r.batcher.submit((0, "empty"), asyncio.get_running_loop().time() + FAR_S)


async def test_close_finishes_what_waits_and_refuses_what_comes() -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        waiting = r.send("a")
        await until(lambda: r.batcher.queued_rows == 1)
        closing = asyncio.create_task(r.batcher.close(LIMIT_S))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await r.batcher.submit((1, "b"), asyncio.get_running_loop().time() + FAR_S)
        r.model.gate.set()
        assert await settle(holder, waiting) == ["HOLDER", "A"]
        await closing
        assert r.observed.drops == ["shutting_down"]


@pytest.mark.parametrize("drain_timeout_s", [0.0, 0.02])
async def test_close_fails_the_rest_at_its_limit(drain_timeout_s: float) -> None:
    async with rig() as r:
        holder = await r.hold_runner()
        waiting = r.send("a")
        await until(lambda: r.batcher.queued_rows == 1)
        await r.batcher.close(drain_timeout_s)
        results = await settle(holder, waiting)
        assert [type(result) for result in results] == [ShuttingDown, ShuttingDown]
        assert r.batcher.queued_rows == 0
        assert r.model.runs == [["holder"]]


async def test_close_before_the_first_dispatch_still_runs_what_was_submitted() -> None:
    async with rig() as r:
        task = r.send("a")
        await asyncio.sleep(0)
        await r.batcher.close(LIMIT_S)
        assert await settle(task) == ["A"]


async def test_close_of_an_unused_batcher_and_twice() -> None:
    async with rig() as r:
        await r.batcher.close(LIMIT_S)
        await r.batcher.close(0)


async def test_many_rounds_lose_no_wake_up() -> None:
    async with rig(max_batch_rows=3, num_runners=2) as r:
        for start in range(0, 400, 8):
            names = [f"n{i}" for i in range(start, start + 8)]
            assert await settle(*(r.send(name) for name in names)) == [n.upper() for n in names]
        assert sum(requests for _, requests in r.observed.batches) == 400
