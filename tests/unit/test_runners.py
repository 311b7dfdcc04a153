import threading

import pytest

from service.runners import RunnerThreads

LIMIT_S = 20.0


def test_calls_are_made_in_order_on_a_thread_of_their_own() -> None:
    runners = RunnerThreads(1, name="run")
    seen: list[tuple[int, str]] = []
    done = threading.Event()

    for number in range(3):
        runners.submit(lambda n: seen.append((n, threading.current_thread().name)), number)
    runners.submit(done.set)

    assert done.wait(LIMIT_S)
    assert seen == [(0, "run-0"), (1, "run-0"), (2, "run-0")]
    runners.close()


def test_as_many_calls_at_once_as_threads() -> None:
    runners = RunnerThreads(2, name="run")
    meeting = threading.Barrier(3)

    for _ in range(2):
        runners.submit(meeting.wait, LIMIT_S)

    meeting.wait(LIMIT_S)
    runners.close()


def test_close_lets_given_calls_end_and_refuses_more() -> None:
    runners = RunnerThreads(1, name="run")
    gate, done = threading.Event(), threading.Event()
    runners.submit(gate.wait, LIMIT_S)
    runners.submit(done.set)

    runners.close()
    runners.close()

    with pytest.raises(RuntimeError, match="closed"):
        runners.submit(done.set)
    gate.set()
    assert done.wait(LIMIT_S)


def test_no_thread_is_left_after_close() -> None:
    runners = RunnerThreads(1, name="leaves")
    here: list[threading.Thread] = []
    runners.submit(lambda: here.append(threading.current_thread()))

    runners.close()

    while not here:
        pass
    here[0].join(LIMIT_S)
    assert not here[0].is_alive()


def test_closed_before_the_first_call_starts_nothing() -> None:
    runners = RunnerThreads(1, name="run")

    runners.close()

    with pytest.raises(RuntimeError, match="closed"):
        runners.submit(print)
