"""Puts waiting requests together into one model run; knows neither the model nor HTTP.

Work-conserving: there is no timer. Whenever a runner is free it takes what is waiting, so a
request waits for others only while all runners are busy.
"""

import asyncio
import heapq
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.admission import LearntRatio
from service.batch_plan import BatchObserver, BatchPlan, DropReason, Threads, Tiling
from service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    ServiceError,
    ShuttingDown,
)
from service.run_cost import RunCost

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# A part of a request is worth a runner of its own if its rows take this many hand-overs.
_TILE_HAND_OVERS = 2.0
# Fewer rows can take another path through the matrix product, and come out with other last bits.
_MIN_TILE_ROWS = 16


@dataclass(slots=True, eq=False)
class _Entry(Generic[Result]):
    item: Any  # an Item; None once it needs no run any more, for the timer's list keeps the entry
    rows: int
    deadline: float
    enqueued_at: float
    is_counted: bool  # once per request, whatever its parts
    future: "asyncio.Future[Result]"


@dataclass(slots=True, eq=False)
class _Run(Generic[Item, Result]):
    batch: list[_Entry[Result]]
    rows: int
    started_at: float
    predicted_s: float
    results: list[Result] = field(default_factory=list)
    error: BaseException | None = None
    seconds: float = 0.0


class MicroBatcher(Generic[Item, Result]):
    """Queue in front of `num_runners` blocking runs; first in, first out.

    Every `submit` ends: with its own result, with `DeadlineExceeded` at its deadline, or with
    another documented error. What happens to one caller (late, cancelled, poisonous) changes
    no answer of its batch mates. For one event loop; not thread-safe.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result]],
        *,
        size: Callable[[Item], int],
        threads: Threads,
        observer: BatchObserver,
        plan: BatchPlan,
        tiling: Tiling[Item, Result] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts nothing; the first `submit` does.

        Args:
            run: Blocking; from the items of one batch to as many results in the same order.
                Called on `threads`, by up to `plan.num_runners` of them at once.
            size: Rows of an item, at least 1. Called on the event loop.
            threads: With a free one per runner. The owner closes it, after `close`.
            observer: Told about every batch, wait and drop.
            plan: Sizes and times.
            tiling: Cuts items larger than a batch; None runs each alone and whole.
            clock: In step with the event loop's; uvloop tells its own in whole milliseconds, and
                as of the beginning of the loop's turn.
        """
        self._run = run
        self._size = size
        self._threads = threads
        self._observer = observer
        self._plan = plan
        self._cost = plan.cost
        self._num_runners = plan.num_runners
        self._tiling = tiling
        self._clock = clock
        # An ordered set: entries leave from the front, and from the middle when their caller does.
        self._queue: OrderedDict[_Entry[Result], None] = OrderedDict()
        self._queued_rows = 0
        # Of batches that failed: before the queue, and each by itself.
        self._alone: deque[_Entry[Result]] = deque()
        self._running: set[_Run[Item, Result]] = set()
        # One timer for all: one each would cost more than the rest of the queue.
        self._deadlines: list[tuple[float, int, _Entry[Result]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_dispatch_due = False
        self._is_closing = False
        self._idle: asyncio.Event | None = None
        # Of a run's duration, from the queue and back to it.
        self._pace = LearntRatio(observed_s=1e-3, predicted=1e-3)
        self._min_tile_rows = _min_tile_rows(plan.cost)

    @property
    def queued_rows(self) -> int:
        """Rows waiting for a runner, without those being run."""
        return self._queued_rows

    @property
    def predicted_wait_s(self) -> float:
        """Predicted seconds until what runs and waits now will have been run."""
        if not self._running and not self._queued_rows:
            return 0.0
        now, pace = self._clock(), self._pace.value
        left_s = pace * self._cost.seconds(self._queued_rows)
        for run in self._running:
            left_s += max(0.0, run.started_at + pace * run.predicted_s - now)
        return left_s / self._num_runners

    async def submit(self, item: Item, deadline: float) -> Result:
        """Waits for the item's result.

        Args:
            item: Its batch may hold other callers' items.
            deadline: Absolute, in the event loop's time.

        Returns:
            The element of `run`'s results that belongs to this item.

        Raises:
            Overloaded: The queue has no room for the item's rows, or what is before it will take
                until after its deadline; raised at once.
            ShuttingDown: `close` was called before, or its limit passed while this one waited.
            DeadlineExceeded: The deadline passed. Raised at the deadline, even if a run with
                this item is under way then; its result is dropped.
            InferenceFailed: `run` raised for this item alone.
            ValueError: `size` says less than 1.
        """
        rows = self._size(item)
        if rows < 1:
            raise ValueError(f"size of an item: got {rows} rows, expected at least 1")
        self._refuse(rows, deadline)
        num_tiles = self._num_tiles(rows)
        if num_tiles > 1:
            assert self._tiling is not None
            return await self._submit_tiles(self._tiling.cut(item, num_tiles), deadline)
        entry = self._enqueue(item, rows, deadline, is_counted=True)
        try:
            return await entry.future
        except asyncio.CancelledError:
            self._drop(entry, "cancelled")
            raise

    async def close(self, drain_timeout_s: float) -> None:
        """Refuses new items, finishes those that wait or run, and fails the rest at the limit.

        A run that is under way at the limit cannot be stopped: its thread ends it, its callers
        do not wait for it. Calling it again is harmless.

        Args:
            drain_timeout_s: Most seconds to wait, 0 to wait for nothing.
        """
        self._is_closing = True
        if drain_timeout_s > 0 and self._has_work():
            self._dispatch()
            self._idle = self._idle or asyncio.Event()
            if self._has_work():
                try:
                    async with asyncio.timeout(drain_timeout_s):
                        await self._idle.wait()
                except TimeoutError:
                    pass
        for entry in list(self._queue):
            self._drop(entry, "shutting_down")
            _fail(entry, ShuttingDown("the service stopped before this request was run"))
        for entry in (*self._alone, *(entry for run in self._running for entry in run.batch)):
            _fail(entry, ShuttingDown("the service stopped while this request was run"))
        self._alone.clear()
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _has_work(self) -> bool:
        return bool(self._queue or self._alone or self._running)

    def _refuse(self, rows: int, deadline: float) -> None:
        now = self._clock()
        if self._is_closing:
            self._observer.request_dropped(reason="shutting_down")
            raise ShuttingDown("the service is shutting down")
        if deadline <= now:
            self._observer.request_dropped(reason="expired")
            raise DeadlineExceeded("the deadline had passed before the request was queued")
        if self._queued_rows + rows > self._plan.max_queue_rows:
            self._observer.request_dropped(reason="queue_full")
            raise Overloaded(
                f"queue: {self._queued_rows} of {self._plan.max_queue_rows} rows are waiting, "
                f"no room for {rows} more",
                retry_after_s=self.predicted_wait_s,
            )
        if not self._queued_rows and len(self._running) < self._num_runners:
            return
        wait_s = self.predicted_wait_s
        if now + wait_s + self._pace.value * self._cost.seconds(rows) > deadline:
            self._observer.request_dropped(reason="queue_time")
            raise Overloaded(
                f"queue: {self._queued_rows} rows take about {1000 * wait_s:.0f} ms more, "
                f"the time left is {1000 * (deadline - now):.0f} ms",
                retry_after_s=wait_s,
            )

    def _num_tiles(self, rows: int) -> int:
        if self._tiling is None:
            return 1
        num_tiles = -(-rows // self._cost.max_rows)
        num_idle = self._num_runners - len(self._running)
        if num_idle > 1 and not self._queue:
            num_tiles = max(num_tiles, min(num_idle, rows // self._min_tile_rows))
        return num_tiles

    async def _submit_tiles(self, items: list[Item], deadline: float) -> Result:
        assert self._tiling is not None
        entries = [
            self._enqueue(item, self._size(item), deadline, is_counted=number == 0)
            for number, item in enumerate(items)
        ]
        try:
            return self._tiling.join([await entry.future for entry in entries])
        finally:
            for entry in entries:
                self._drop(entry, "cancelled")
                # Nobody asks for the others' errors when one has failed.
                if not entry.future.cancel() and not entry.future.cancelled():
                    entry.future.exception()

    def _enqueue(
        self, item: Item, rows: int, deadline: float, *, is_counted: bool
    ) -> _Entry[Result]:
        loop = asyncio.get_running_loop()
        entry: _Entry[Result] = _Entry(
            item, rows, deadline, time.perf_counter(), is_counted, loop.create_future()
        )
        self._queue[entry] = None
        self._set_queued_rows(self._queued_rows + rows)
        # Not at once: requests that arrive in the same turn of the loop share a batch.
        if len(self._running) < self._num_runners:
            self._dispatch_soon()
        heapq.heappush(self._deadlines, (deadline, next(self._order), entry))
        if self._timer is None or deadline < self._timer_at:
            self._set_timer(deadline)
        return entry

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._expire_due)

    def _expire_due(self) -> None:
        # A timer can come a millisecond early.
        now = max(self._timer_at, self._clock())
        self._timer = None
        while self._deadlines:
            deadline, _, entry = self._deadlines[0]
            if not entry.future.done():
                if deadline > now:
                    self._set_timer(deadline)
                    return
                self._expire(entry)
            heapq.heappop(self._deadlines)

    def _expire(self, entry: _Entry[Result]) -> None:
        was_queued = self._drop(entry, "expired")
        _fail(
            entry,
            DeadlineExceeded(
                "the deadline passed while waiting for a runner"
                if was_queued
                else "the deadline passed while the model was running"
            ),
        )

    def _drop(self, entry: _Entry[Result], reason: DropReason) -> bool:
        if entry not in self._queue:
            return False
        del self._queue[entry]
        entry.item = None
        self._set_queued_rows(self._queued_rows - entry.rows)
        if entry.is_counted:
            self._observer.request_dropped(reason=reason)
        return True

    def _set_queued_rows(self, rows: int) -> None:
        self._queued_rows = rows
        self._observer.queue_changed(rows=rows)

    def _dispatch(self) -> None:
        self._is_dispatch_due = False
        while len(self._running) < self._num_runners and (batch := self._take()):
            if self._start(batch):
                # The loop has been kept for long enough: what came in meanwhile is read first.
                if self._queue or self._alone:
                    self._dispatch_soon()
                break
        if self._idle is not None and not self._has_work():
            self._idle.set()

    def _dispatch_soon(self) -> None:
        if not self._is_dispatch_due:
            self._is_dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _take(self) -> list[_Entry[Result]]:
        while self._alone:
            entry = self._alone.popleft()
            if not entry.future.done():
                return [entry]
        now = self._clock()
        num_idle = self._num_runners - len(self._running)
        share = max(self._min_tile_rows, -(-self._queued_rows // num_idle))
        max_rows = min(self._cost.max_rows, share)
        batch: list[_Entry[Result]] = []
        rows = 0
        while self._queue:
            entry = next(iter(self._queue))
            if entry.future.done():  # Cancelled, and its `submit` has not run on yet.
                self._drop(entry, "cancelled")
                continue
            if entry.deadline <= now:
                self._expire(entry)
                continue
            if batch and rows + entry.rows > max_rows:
                break
            del self._queue[entry]
            batch.append(entry)
            rows += entry.rows
            self._observer.request_waited(seconds=time.perf_counter() - entry.enqueued_at)
        if batch:
            self._set_queued_rows(self._queued_rows - rows)
        return batch

    def _start(self, batch: list[_Entry[Result]]) -> bool:
        """Whether the batch has been run here already."""
        rows = sum(entry.rows for entry in batch)
        predicted_s = self._cost.seconds(rows)
        run: _Run[Item, Result] = _Run(batch, rows, self._clock(), predicted_s)
        if predicted_s <= self._plan.inline_s and not self._running:
            self._make(run)
            self._end(run)
            return True
        self._running.add(run)
        try:
            self._threads.submit(self._make_in_thread, run, asyncio.get_running_loop())
        except RuntimeError as exc:  # they are closed
            _log.error("a batch could not be run", exc_info=exc)
            self._running.discard(run)
            for entry in batch:
                _fail(entry, InferenceFailed("the model could not be run"))
        return False

    def _make_in_thread(self, run: _Run[Item, Result], loop: asyncio.AbstractEventLoop) -> None:
        self._make(run)
        try:
            loop.call_soon_threadsafe(self._finish, run)
        except RuntimeError:
            _log.debug("a run ended after its event loop")

    def _make(self, run: _Run[Item, Result]) -> None:
        # Errors come back as values: one of them, StopIteration, cannot be put on a future at
        # all, and its callers would wait for ever.
        started_at = time.perf_counter()
        try:
            run.results = self._run([entry.item for entry in run.batch])
            if len(run.results) != len(run.batch):
                raise ValueError(f"run: got {len(run.results)} results for {len(run.batch)} items")
        except BaseException as exc:  # noqa: BLE001 - the thread's edge; raised to its callers
            run.error = exc
        run.seconds = time.perf_counter() - started_at

    def _finish(self, run: _Run[Item, Result]) -> None:
        self._running.discard(run)
        self._end(run)
        self._dispatch()

    def _end(self, run: _Run[Item, Result]) -> None:
        batch, cause = run.batch, run.error
        self._observer.batch_finished(rows=run.rows, requests=len(batch), run_seconds=run.seconds)
        if cause is None:
            self._pace.add(observed_s=self._clock() - run.started_at, predicted=run.predicted_s)
            for entry, result in zip(batch, run.results, strict=True):
                entry.item = None
                if not entry.future.done():
                    entry.future.set_result(result)
        elif len(batch) == 1:
            error = InferenceFailed(f"model run failed: {type(cause).__name__}")
            error.__cause__ = cause
            batch[0].item = None
            _fail(batch[0], error)
        else:
            _log.warning(
                "a batch of %d requests failed with %s, running them one by one",
                len(batch),
                type(cause).__name__,
            )
            self._observer.batch_split(requests=len(batch))
            self._alone.extend(batch)


def _min_tile_rows(cost: RunCost) -> int:
    if cost.row_s <= 0:
        return _MIN_TILE_ROWS
    return max(_MIN_TILE_ROWS, round(_TILE_HAND_OVERS * cost.seconds(1) / cost.row_s))


def _fail(entry: _Entry[Result], error: ServiceError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
