import pytest

from service.stores.breaker import CircuitBreaker, Permit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(max_failures=3, open_s=0.25, clock=clock)


def admitted(breaker: CircuitBreaker) -> Permit:
    permit = breaker.admit()
    assert permit is not None
    return permit


def fail(breaker: CircuitBreaker, *, times: int) -> None:
    for _ in range(times):
        admitted(breaker).fail()


def test_starts_closed_and_admits(breaker: CircuitBreaker) -> None:
    assert breaker.state == "closed"
    assert breaker.admit() is not None


def test_opens_after_the_failures_in_a_row(breaker: CircuitBreaker) -> None:
    fail(breaker, times=2)
    assert breaker.state == "closed"
    fail(breaker, times=1)
    assert breaker.state == "open"
    assert breaker.admit() is None


def test_a_success_starts_the_count_again(breaker: CircuitBreaker) -> None:
    fail(breaker, times=2)
    admitted(breaker).succeed()
    fail(breaker, times=2)
    assert breaker.state == "closed"


def test_stays_open_for_its_time_and_then_admits_one_probe(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, times=3)
    clock.now += 0.249
    assert breaker.admit() is None
    clock.now += 0.001
    assert breaker.state == "half_open"
    assert breaker.admit() is not None
    assert breaker.admit() is None
    assert breaker.state == "half_open"


def test_probe_that_succeeds_closes_it(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, times=3)
    clock.now += 0.25
    admitted(breaker).succeed()
    assert breaker.state == "closed"
    fail(breaker, times=2)
    assert breaker.state == "closed"


def test_probe_that_fails_opens_it_for_another_period(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, times=3)
    clock.now += 10
    admitted(breaker).fail()
    assert breaker.state == "open"
    clock.now += 0.249
    assert breaker.admit() is None
    clock.now += 0.001
    assert breaker.admit() is not None


def test_probe_that_was_not_made_lets_the_next_one_through(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, times=3)
    clock.now += 0.25
    admitted(breaker).release()
    assert breaker.admit() is not None


def test_late_reports_from_before_the_opening_do_not_count(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    slow = [admitted(breaker) for _ in range(3)]
    fail(breaker, times=3)
    clock.now += 0.2
    slow[0].succeed()
    assert breaker.state == "open"
    slow[1].fail()
    slow[2].release()
    clock.now += 0.05
    assert breaker.state == "half_open"


def test_late_release_does_not_admit_a_second_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    slow = admitted(breaker)
    fail(breaker, times=3)
    clock.now += 0.25
    admitted(breaker)
    slow.release()
    assert breaker.admit() is None


def test_only_the_first_report_of_a_permit_counts(breaker: CircuitBreaker) -> None:
    fail(breaker, times=2)
    permit = admitted(breaker)
    permit.fail()
    permit.succeed()
    permit.fail()
    assert breaker.state == "open"
