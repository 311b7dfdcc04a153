"""Puts waiting requests together into one model run; knows neither the model nor HTTP.

Work-conserving: there is no timer. Whenever a runner is free it takes what is waiting, so a
request waits for others only while all runners are busy.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    ServiceError,
    ShuttingDown,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

DropReason = Literal["overloaded", "expired", "cancelled", "shutting_down"]

_log = logging.getLogger(__name__)


class BatchObserver(Protocol):
    """What a batcher reports, always on the event loop. Its methods must not raise."""

    def batch_finished(self, *, rows: int, requests: int, run_seconds: float) -> None:
        """One run of the model ended, well or badly; `run_seconds` is without the hand-over."""
        ...

    def batch_split(self, *, requests: int) -> None:
        """A combined run failed; its `requests` are being run again one by one."""
        ...

    def request_waited(self, *, seconds: float) -> None:
        """A request left the queue for a runner after `seconds`."""
        ...

    def request_dropped(self, *, reason: DropReason) -> None:
        """A request was refused, or left the queue without having run."""
        ...

    def queue_changed(self, *, rows: int) -> None:
        """`rows` are waiting now."""
        ...


@dataclass(slots=True, eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    rows: int
    deadline: float
    enqueued_at: float
    future: "asyncio.Future[Result]"


@dataclass(slots=True)
class _Run(Generic[Result]):
    results: list[Result] = field(default_factory=list)
    error: Exception | None = None
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
        executor: Executor,
        observer: BatchObserver,
        max_batch_rows: int,
        max_queue_rows: int,
        num_runners: int = 1,
    ) -> None:
        """Starts nothing; the first `submit` does.

        Args:
            run: Blocking; from the items of one batch to as many results in the same order.
                Called on `executor`, by up to `num_runners` threads at once.
            size: Rows of an item, at least 1. Called on the event loop.
            executor: Needs a free worker per runner. The owner shuts it down, after `close`.
            observer: Told about every batch, wait and drop.
            max_batch_rows: Most rows run together; a larger item runs alone.
            max_queue_rows: Most rows waiting.
            num_runners: Batches under way at the same time.
        """
        self._run = run
        self._size = size
        self._executor = executor
        self._observer = observer
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._num_runners = num_runners
        # An ordered set: entries leave from the front, and from the middle when their caller does.
        self._queue: OrderedDict[_Entry[Item, Result], None] = OrderedDict()
        self._queued_rows = 0
        self._running: dict[asyncio.Task[None], list[_Entry[Item, Result]]] = {}
        self._is_dispatch_due = False
        self._is_closing = False
        self._seconds_per_row = 0.0

    @property
    def queued_rows(self) -> int:
        """Rows waiting for a runner, without those being run."""
        return self._queued_rows

    async def submit(self, item: Item, deadline: float) -> Result:
        """Waits for the item's result.

        Args:
            item: Its batch may hold other callers' items.
            deadline: Absolute, in the event loop's time.

        Returns:
            The element of `run`'s results that belongs to this item.

        Raises:
            Overloaded: The queue has no room for the item's rows; raised at once.
            ShuttingDown: `close` was called before, or its limit passed while this one waited.
            DeadlineExceeded: The deadline passed. Raised at the deadline, even if a run with
                this item is under way then; its result is dropped.
            InferenceFailed: `run` raised for this item alone.
            ValueError: `size` says less than 1.
        """
        loop = asyncio.get_running_loop()
        rows = self._size(item)
        if rows < 1:
            raise ValueError(f"size of an item: got {rows} rows, expected at least 1")
        now = loop.time()
        self._refuse(rows, is_expired=deadline <= now)
        # Not the loop's time: uvloop tells it in whole milliseconds.
        enqueued_at = time.perf_counter()
        entry: _Entry[Item, Result] = _Entry(
            item, rows, deadline, enqueued_at, loop.create_future()
        )
        self._queue[entry] = None
        self._set_queued_rows(self._queued_rows + rows)
        self._wake(loop)
        timer = loop.call_at(deadline, self._expire, entry)
        try:
            return await entry.future
        except asyncio.CancelledError:
            self._drop(entry, "cancelled")
            raise
        finally:
            timer.cancel()

    async def close(self, drain_timeout_s: float) -> None:
        """Refuses new items, finishes those that wait or run, and fails the rest at the limit.

        A run that is under way at the limit cannot be stopped: its thread ends it, its callers
        do not wait for it. Calling it again is harmless.

        Args:
            drain_timeout_s: Most seconds to wait, 0 to wait for nothing.
        """
        self._is_closing = True
        loop = asyncio.get_running_loop()
        limit = loop.time() + drain_timeout_s
        while (self._queue or self._running) and loop.time() < limit:
            self._dispatch()
            if self._running:
                await asyncio.wait(
                    self._running,
                    timeout=limit - loop.time(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
        for entry in list(self._queue):
            self._drop(entry, "shutting_down")
            _fail(entry, ShuttingDown("the service stopped before this request was run"))
        tasks = list(self._running)
        for task in tasks:
            task.cancel("batcher is closing")
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse(self, rows: int, *, is_expired: bool) -> None:
        if self._is_closing:
            self._observer.request_dropped(reason="shutting_down")
            raise ShuttingDown("the service is shutting down")
        if is_expired:
            self._observer.request_dropped(reason="expired")
            raise DeadlineExceeded("the deadline had passed before the request was queued")
        if self._queued_rows + rows > self._max_queue_rows:
            self._observer.request_dropped(reason="overloaded")
            raise Overloaded(
                f"queue: {self._queued_rows} of {self._max_queue_rows} rows are waiting, "
                f"no room for {rows} more",
                retry_after_s=self._queued_rows * self._seconds_per_row / self._num_runners,
            )

    def _expire(self, entry: _Entry[Item, Result]) -> None:
        was_queued = self._drop(entry, "expired")
        _fail(
            entry,
            DeadlineExceeded(
                "the deadline passed while waiting for a runner"
                if was_queued
                else "the deadline passed while the model was running"
            ),
        )

    def _drop(self, entry: _Entry[Item, Result], reason: DropReason) -> bool:
        if entry not in self._queue:
            return False
        del self._queue[entry]
        self._set_queued_rows(self._queued_rows - entry.rows)
        self._observer.request_dropped(reason=reason)
        return True

    def _set_queued_rows(self, rows: int) -> None:
        self._queued_rows = rows
        self._observer.queue_changed(rows=rows)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not at once: requests that arrive in the same turn of the loop share a batch.
        if not self._is_dispatch_due and len(self._running) < self._num_runners:
            self._is_dispatch_due = True
            loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_dispatch_due = False
        while self._queue and len(self._running) < self._num_runners:
            batch = self._take()
            if not batch:
                return
            task = asyncio.get_running_loop().create_task(self._run_batch(batch))
            self._running[task] = batch
            task.add_done_callback(self._finish)

    def _take(self) -> list[_Entry[Item, Result]]:
        now = asyncio.get_running_loop().time()
        batch: list[_Entry[Item, Result]] = []
        rows = 0
        while self._queue:
            entry = next(iter(self._queue))
            if entry.future.done():  # Cancelled, and its `submit` has not run on yet.
                self._drop(entry, "cancelled")
                continue
            if entry.deadline <= now:
                self._expire(entry)
                continue
            if batch and rows + entry.rows > self._max_batch_rows:
                break
            del self._queue[entry]
            batch.append(entry)
            rows += entry.rows
            self._observer.request_waited(seconds=time.perf_counter() - entry.enqueued_at)
        if batch:
            self._set_queued_rows(self._queued_rows - rows)
        return batch

    async def _run_batch(self, batch: list[_Entry[Item, Result]]) -> None:
        error = await self._run_once(batch)
        if error is None:
            return
        if len(batch) == 1:
            _fail(batch[0], error)
            return
        _log.warning(
            "a batch of %d requests failed with %s, running them one by one",
            len(batch),
            type(error.__cause__).__name__,
        )
        self._observer.batch_split(requests=len(batch))
        for entry in batch:
            if entry.future.done():
                continue
            alone_error = await self._run_once([entry])
            if alone_error is not None:
                _fail(entry, alone_error)

    async def _run_once(self, batch: list[_Entry[Item, Result]]) -> InferenceFailed | None:
        loop = asyncio.get_running_loop()
        items = [entry.item for entry in batch]
        outcome = await loop.run_in_executor(self._executor, self._run_in_thread, items)
        rows = sum(entry.rows for entry in batch)
        self._observer.batch_finished(rows=rows, requests=len(batch), run_seconds=outcome.seconds)
        if outcome.error is not None:
            error = InferenceFailed(f"model run failed: {type(outcome.error).__name__}")
            error.__cause__ = outcome.error
            return error
        self._seconds_per_row += 0.1 * (outcome.seconds / rows - self._seconds_per_row)
        for entry, result in zip(batch, outcome.results, strict=True):
            if not entry.future.done():
                entry.future.set_result(result)
        return None

    def _run_in_thread(self, items: list[Item]) -> _Run[Result]:
        # Errors come back as values: one of them, StopIteration, cannot be put on a future at
        # all, and its callers would wait for ever.
        outcome: _Run[Result] = _Run()
        started_at = time.perf_counter()
        try:
            outcome.results = self._run(items)
            if len(outcome.results) != len(items):
                raise ValueError(f"run: got {len(outcome.results)} results for {len(items)} items")
        except Exception as exc:  # noqa: BLE001 - the edge of the executor; raised to its callers
            outcome.error = exc
        outcome.seconds = time.perf_counter() - started_at
        return outcome

    def _finish(self, task: "asyncio.Task[None]") -> None:
        batch = self._running.pop(task)
        error: ServiceError | None = None
        if task.cancelled():
            error = ShuttingDown("the service stopped while this request was run")
        elif (exc := task.exception()) is not None:
            # The executor is gone, or this class has a bug: nobody may be left waiting.
            _log.error("a batch could not be run", exc_info=exc)
            error = InferenceFailed("the model could not be run")
        if error is not None:
            for entry in batch:
                _fail(entry, error)
        self._dispatch()


def _fail(entry: _Entry[Item, Result], error: ServiceError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
