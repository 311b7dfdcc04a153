"""Admission in front of a simulated event loop that is offered more than it can do.

The loop goes round in turns: it reads what has arrived, refuses or lets in, then gives every
request that is under way its next step. A request has three steps, with the store's answer to
wait for between them; all cost time of the one core there is.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest

from service.admission import Admission, Clocks
from service.errors import Overloaded

STEP_S = 0.15e-3  # three of them: 2,222 requests per second at most
REFUSAL_S = 0.05e-3
STORE_S = 0.4e-3
TIMEOUT_S = 0.1
BODY = 1000
SECONDS = 6.0


@dataclass
class Request:
    arrived_at: float
    steps_left: int = 3
    due_at: float = 0.0
    work: float = 0.0


@dataclass
class Simulation:
    """One core, of which the loop has a share; the rest is another process's."""

    share: float = 1.0
    stall_every_s: float | None = None
    stall_s: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)
    num_refused: int = 0

    def spend(self, cpu_s: float) -> None:
        self.cpu += cpu_s
        self.wall += cpu_s / self.share

    def run(self, rate: float, *, is_admission_on: bool = True) -> None:
        admission = Admission(clocks=Clocks(wall=lambda: self.wall, cpu=lambda: self.cpu))
        rng = np.random.default_rng(5)
        times = np.cumsum(rng.exponential(1 / rate, int(rate * SECONDS * 1.2)))
        arrivals = [float(t) for t in times if t < SECONDS]
        arrivals.reverse()
        under_way: list[Request] = []
        next_stall_at = self.stall_every_s or float("inf")
        while arrivals or under_way:
            if self.wall >= next_stall_at and self.stall_every_s is not None:
                self.wall += self.stall_s
                next_stall_at += self.stall_every_s
            new: list[Request] = []
            now = self.wall
            while arrivals and arrivals[-1] <= now:
                request = Request(arrivals.pop())
                try:
                    if is_admission_on:
                        admission.check(
                            body_bytes=BODY, arrived_at=request.arrived_at, timeout_s=TIMEOUT_S
                        )
                except Overloaded:
                    self.num_refused += 1
                    self.spend(REFUSAL_S)
                    continue
                admission.announce(body_bytes=BODY)
                new.append(request)
            admission.begin_turn()
            due = [request for request in under_way if request.due_at <= self.wall]
            for request in new:
                request.work = admission.enter(body_bytes=BODY)
            under_way += new
            for request in (*due, *new):
                self.spend(STEP_S)
                request.steps_left -= 1
                request.due_at = self.wall + STORE_S
                if not request.steps_left:
                    admission.leave(request.work)
                    self.latencies.append(self.wall - request.arrived_at)
            under_way = [request for request in under_way if request.steps_left]
            admission.end_turn()
            if not due and not new:
                next_due = [r.due_at for r in under_way] + arrivals[-1:]
                self.wall = max(self.wall, min(next_due, default=self.wall))

    @property
    def in_time(self) -> int:
        return sum(latency <= TIMEOUT_S for latency in self.latencies)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_answered_requests_keep_their_time_and_the_throughput_stays(
    share: float, factor: float
) -> None:
    simulation = Simulation(share=share)
    peak = share / (3 * STEP_S)

    simulation.run(factor * peak)

    assert simulation.in_time == len(simulation.latencies)
    refusals = simulation.num_refused * REFUSAL_S / share / simulation.wall
    assert simulation.in_time / simulation.wall >= 0.9 * (1 - refusals) * peak


def test_without_admission_nobody_is_in_time() -> None:
    simulation = Simulation()

    simulation.run(2.0 / (3 * STEP_S), is_admission_on=False)

    assert simulation.in_time < 0.1 * len(simulation.latencies)


def test_nobody_is_refused_below_saturation() -> None:
    simulation = Simulation()

    simulation.run(0.9 / (3 * STEP_S))

    assert simulation.num_refused == 0
    assert simulation.in_time == len(simulation.latencies)


def test_stalls_do_not_make_answered_requests_late() -> None:
    simulation = Simulation(stall_every_s=0.5, stall_s=0.03)

    simulation.run(1.5 / (3 * STEP_S))

    assert simulation.in_time >= 0.999 * len(simulation.latencies)


def test_service_takes_all_again_after_a_long_stall() -> None:
    simulation = Simulation(stall_every_s=2.0, stall_s=1.0)

    simulation.run(0.5 / (3 * STEP_S))

    # What arrived in the first 0.95 of each of three seconds is lost, and hardly any more.
    lost = simulation.num_refused + len(simulation.latencies) - simulation.in_time
    assert lost <= 1.15 * 3 * 0.95 * 0.5 / (3 * STEP_S)
