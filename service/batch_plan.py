"""What a micro-batcher is given: its limits, how to cut an item, its threads, whom to tell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from service.run_cost import RunCost

Item = TypeVar("Item")
Result = TypeVar("Result")

# `backlog` is refused by `Admission`, before a request gets here.
DropReason = Literal["backlog", "queue_full", "queue_time", "expired", "cancelled", "shutting_down"]


class BatchObserver(Protocol):
    """What a batcher reports, always on the event loop. Its methods must not raise."""

    def batch_finished(self, *, rows: int, requests: int, run_seconds: float) -> None:
        """One run of the model ended, well or badly; `run_seconds` is without the hand-over."""
        ...

    def batch_split(self, *, requests: int) -> None:
        """A combined run failed; its `requests` are being run again one by one."""
        ...

    def request_waited(self, *, seconds: float) -> None:
        """A request, or a part of a large one, left the queue for a runner after `seconds`."""
        ...

    def request_dropped(self, *, reason: DropReason) -> None:
        """A request was refused, or left the queue without having run."""
        ...

    def queue_changed(self, *, rows: int) -> None:
        """`rows` are waiting now."""
        ...


class Threads(Protocol):
    """Where runs are made: `RunnerThreads`, or an `Executor`."""

    # Any: whatever the call takes; what `submit` returns is not looked at.
    def submit(self, call: Callable[..., Any], /, *args: Any) -> object:
        """Has a thread call it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling(Generic[Item, Result]):
    """How an item is run in parts.

    Attributes:
        cut: From an item and a number, not above its rows, to that many items of about equal size.
        join: From their results, in order, to the item's.
    """

    cut: Callable[[Item, int], list[Item]]
    join: Callable[[list[Result]], Result]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How a batcher may use its runners.

    Attributes:
        cost: How long runs take, and how many rows are run together at most.
        max_queue_rows: Most rows waiting.
        num_runners: Batches under way at the same time.
        inline_s: A batch that takes no longer, with no other under way, is run on the event loop:
            the way to a thread and back would cost more than it hides. Between two such the loop
            goes once round.
    """

    cost: RunCost
    max_queue_rows: int
    num_runners: int = 1
    inline_s: float = 0.0
