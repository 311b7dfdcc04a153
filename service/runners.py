"""Threads that do nothing but model runs; knows neither the model nor the queue in front of it."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Any: a call takes the arguments it was given with.
_Call = tuple[Callable[..., object], tuple[Any, ...]]


class RunnerThreads:
    """Calls functions on threads of its own, in the order given.

    In place of a `ThreadPoolExecutor`: it keeps no result and so needs no future, no lock and no
    second thread switch for one. A call says itself what became of it, and must not raise.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        """Starts nothing; the first call does.

        Args:
            num_threads: Calls under way at once.
            name: Prefix of the threads' names.
        """
        self._num_threads = num_threads
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_started = False
        self._is_closed = False

    def submit(self, call: Callable[..., object], /, *args: Any) -> None:  # Any: see _Call
        """Has a thread call it. From any thread.

        Raises:
            RuntimeError: After `close`.
        """
        if self._is_closed:
            raise RuntimeError("the runner threads are closed")
        if not self._is_started:
            self._start()
        self._calls.put((call, args))

    def close(self) -> None:
        """Lets the threads go once they have made the calls they were given; does not wait."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for _ in range(self._num_threads):
                self._calls.put(None)

    def _start(self) -> None:
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
            for number in range(self._num_threads):
                # A run that never ends must not keep the process from ending.
                threading.Thread(
                    target=_work, args=(self._calls,), name=f"{self._name}-{number}", daemon=True
                ).start()


def _work(calls: "SimpleQueue[_Call | None]") -> None:
    while (given := calls.get()) is not None:
        call, args = given
        call(*args)
        # Else the last batch would live until the next one comes.
        del given, call, args
