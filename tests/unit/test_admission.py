"""Admission on a machine whose clocks the test turns."""

import math

import pytest

from service.admission import Admission, Clocks, LearntRatio
from service.errors import Overloaded

MS = 1e-3
BODY = 1000  # bytes


class Machine:
    """A loop that works at a pace, on a core that it has for a share of the time."""

    def __init__(self, *, work_s: float, share: float = 1.0) -> None:
        self.wall = 100.0
        self.cpu = 5.0
        self.work_s = work_s
        self.share = share
        self.admission = Admission(clocks=Clocks(wall=lambda: self.wall, cpu=lambda: self.cpu))

    def spend(self, cpu_s: float) -> None:
        self.cpu += cpu_s
        self.wall += cpu_s / self.share

    def serve(self, count: int, *, body_bytes: int = BODY, store_s: float = 0.0) -> None:
        """Requests one after another, each in a turn of its own."""
        for _ in range(count):
            self.admission.announce(body_bytes=body_bytes)
            self.admission.begin_turn()
            work = self.admission.enter(body_bytes=body_bytes)
            self.spend(self.work_s)
            self.admission.end_turn()
            self.wall += store_s
            self.admission.leave(work)

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.admission.enter(body_bytes=BODY)

    def is_refused(self, *, timeout_s: float, waited_s: float = 0.0, body: int = BODY) -> bool:
        try:
            self.admission.check(
                body_bytes=body, arrived_at=self.wall - waited_s, timeout_s=timeout_s
            )
        except Overloaded:
            return True
        return False


def test_wait_is_what_is_under_way_at_the_learnt_pace() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)

    machine.fill(40)

    assert machine.admission.predicted_wait_s == pytest.approx(20 * MS, rel=0.01)


def test_wait_is_stretched_by_what_else_runs_on_the_core() -> None:
    machine = Machine(work_s=0.5 * MS, share=0.25)
    machine.serve(500)

    machine.fill(40)

    assert machine.admission.predicted_wait_s == pytest.approx(80 * MS, rel=0.01)


def test_slow_store_does_not_look_like_a_queue() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500, store_s=15 * MS)

    machine.fill(40)

    assert machine.admission.predicted_wait_s == pytest.approx(20 * MS, rel=0.01)


def test_request_is_refused_if_twice_as_long_would_be_too_late() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)
    machine.fill(40)

    # Twice 20 ms, and half a millisecond of its own.
    assert not machine.is_refused(timeout_s=41 * MS)
    assert machine.is_refused(timeout_s=40 * MS)


def test_time_before_it_was_read_counts() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)
    machine.fill(40)

    assert not machine.is_refused(timeout_s=50 * MS, waited_s=5 * MS)
    assert machine.is_refused(timeout_s=50 * MS, waited_s=20 * MS)


def test_refusal_says_how_long_the_queue_is() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)
    machine.fill(40)

    with pytest.raises(
        Overloaded, match="40 requests are under way and take about 20 ms"
    ) as caught:
        machine.admission.check(body_bytes=BODY, arrived_at=machine.wall, timeout_s=10 * MS)

    assert caught.value.retry_after_s == pytest.approx(20 * MS, rel=0.01)


def test_other_waits_are_added() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)
    machine.fill(20)

    with pytest.raises(Overloaded):
        machine.admission.check(
            body_bytes=BODY, arrived_at=machine.wall, timeout_s=40 * MS, other_wait_s=20 * MS
        )


def test_idle_service_takes_what_can_hardly_be_done() -> None:
    machine = Machine(work_s=50 * MS)
    machine.serve(500)

    assert not machine.is_refused(timeout_s=1 * MS)


def test_request_that_waited_its_whole_time_is_refused_by_an_idle_service() -> None:
    machine = Machine(work_s=0.5 * MS)

    assert machine.is_refused(timeout_s=10 * MS, waited_s=10 * MS)


def test_announced_requests_count_until_their_turn_begins() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)

    for _ in range(40):
        machine.admission.announce(body_bytes=BODY)

    assert machine.admission.predicted_wait_s == pytest.approx(20 * MS, rel=0.01)
    machine.admission.begin_turn()
    assert machine.admission.predicted_wait_s == 0


def test_larger_bodies_are_more_work() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)

    machine.admission.enter(body_bytes=BODY)
    small_s = machine.admission.predicted_wait_s
    machine.admission.enter(body_bytes=20 * BODY)

    assert machine.admission.predicted_wait_s > 5 * small_s


def test_those_who_left_are_no_work_any_more() -> None:
    machine = Machine(work_s=0.5 * MS)

    work = [machine.admission.enter(body_bytes=n) for n in (10, 333, 7)]
    for one in work:
        machine.admission.leave(one)

    assert machine.admission.predicted_wait_s == 0


def test_pace_follows_a_machine_that_becomes_slower() -> None:
    machine = Machine(work_s=0.5 * MS)
    machine.serve(500)

    machine.work_s = 2 * MS
    machine.serve(1000)

    machine.fill(10)
    assert machine.admission.predicted_wait_s == pytest.approx(20 * MS, rel=0.05)


def test_ratio_forgets_by_the_seconds_observed() -> None:
    ratio = LearntRatio(observed_s=2.0, predicted=1.0)

    ratio.add(observed_s=0.5, predicted=0.5)

    # What was before counts 1/e.
    assert ratio.value == pytest.approx((2.0 / math.e + 0.5) / (1.0 / math.e + 0.5))


def test_requests_that_end_in_one_bunch_do_not_look_cheap() -> None:
    machine = Machine(work_s=0.5 * MS)
    for _ in range(50):
        work = [machine.admission.enter(body_bytes=BODY) for _ in range(100)]
        machine.spend(45 * MS)
        for one in work:
            machine.spend(0.05 * MS)
            machine.admission.leave(one)

    machine.fill(40)

    assert machine.admission.predicted_wait_s == pytest.approx(20 * MS, rel=0.05)
