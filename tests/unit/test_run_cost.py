"""The sweep on synthetic machines, whose best row count is known."""

from collections.abc import Callable

import numpy as np
import pytest

from service.run_cost import RunCost, RunTime, best_rows, fit_cost, sweep, sweep_sizes

US = 1e-6
HAND_OVER_S = 50 * US


class Machine:
    """Tells the time that runs by a cost curve would take; some are disturbed."""

    def __init__(self, curve: Callable[[int], float], *, disturbed: float = 0.0) -> None:
        self.curve = curve
        self.disturbed = disturbed
        self.rng = np.random.default_rng(1)
        self.now = 0.0

    def run(self, rows: int) -> None:
        self.now += self.curve(rows) * (1 + self.rng.exponential(0.02))
        if self.rng.random() < self.disturbed:
            self.now += self.rng.exponential(self.curve(rows) + 1e-3)

    def clock(self) -> float:
        return self.now


def flat(rows: int) -> float:
    return (25 + 2.6 * rows) * US


def knee(rows: int) -> float:
    """Rows over 400 leave the cache: each costs half as much again."""
    return (25 + 2.6 * rows + 1.3 * max(0, rows - 400)) * US


def step(rows: int) -> float:
    """From 150 rows on, every row costs more."""
    return (100 + (15 if rows <= 150 else 19) * rows) * US


@pytest.mark.parametrize("curve", [flat, knee, step])
@pytest.mark.parametrize("disturbed", [0.0, 0.3])
def test_cap_is_within_five_percent_of_the_best(
    curve: Callable[[int], float], disturbed: float
) -> None:
    machine = Machine(curve, disturbed=disturbed)

    chosen = best_rows(sweep(machine.run, clock=machine.clock))

    costs = {rows: (curve(rows) + HAND_OVER_S) / rows for rows in range(1, 2049)}
    assert costs[chosen] <= 1.05 * min(costs.values())


def test_cap_is_the_smallest_that_is_nearly_as_good() -> None:
    times = [RunTime(1, 30 * US), RunTime(100, 100 * US), RunTime(200, 252 * US)]

    # A row costs 80, 1.50 and 1.51 us.
    assert best_rows(times) == 100


def test_fit_predicts_the_runs_it_was_made_from() -> None:
    times = [RunTime(rows, flat(rows)) for rows in sweep_sizes(2048)]

    cost = fit_cost(times, max_rows=400)

    assert cost.max_rows == 400
    assert cost.fixed_s == pytest.approx(25 * US)
    assert cost.row_s == pytest.approx(2.6 * US)


def test_fit_does_not_look_past_the_cap() -> None:
    times = [RunTime(rows, knee(rows)) for rows in sweep_sizes(2048)]

    assert fit_cost(times, max_rows=390).row_s == pytest.approx(2.6 * US)


def test_fit_with_a_cap_below_every_second_size_has_a_line() -> None:
    cost = fit_cost([RunTime(1, 30 * US), RunTime(2, 32 * US)], max_rows=1)

    assert (cost.fixed_s, cost.row_s) == pytest.approx((28 * US, 2 * US))


def test_more_rows_than_the_cap_take_several_runs() -> None:
    cost = RunCost(fixed_s=30 * US, row_s=2 * US, max_rows=100)

    assert cost.seconds(0) == 0
    assert cost.seconds(100) == pytest.approx(30 * US + 200 * US + HAND_OVER_S)
    assert cost.seconds(101) == pytest.approx(2 * 30 * US + 202 * US + 2 * HAND_OVER_S)


def test_sweep_takes_the_least_time_of_each_size() -> None:
    durations = iter([5e-3, 9e-3, 4e-3, 8e-3, *[6e-3, 9.5e-3] * 8])
    now = 0.0

    def run(rows: int) -> None:
        nonlocal now
        now += next(durations)

    times = sweep(run, max_rows=2, clock=lambda: now)

    assert [t.seconds for t in times] == pytest.approx([4e-3, 8e-3])


def test_sweep_rests_after_each_run_and_makes_four_rounds() -> None:
    machine = Machine(flat)
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        machine.now += 100.0

    times = sweep(machine.run, clock=machine.clock, pause=rest)

    assert len(rests) == 4 * len(sweep_sizes(2048))
    assert times[-1].seconds == min(rests[len(times) - 1 :: len(times)])
    assert times[-1].seconds < 0.01


@pytest.mark.parametrize(("row_us", "num_rounds"), [(1.0, 10), (4.0, 6), (20.0, 5)])
def test_sweep_of_long_runs_ends_earlier(row_us: float, num_rounds: int) -> None:
    num_runs = 0
    now = 0.0

    def run(rows: int) -> None:
        nonlocal num_runs, now
        num_runs += rows == 1
        now += row_us * US * rows

    sweep(run, max_rows=2048, clock=lambda: now)

    # A round takes 13.5 ms at 1 us a row, and at 20 us, up to the first run of over 10 ms, 64 ms.
    assert num_runs == num_rounds


def test_sweep_tries_no_more_rows_than_take_10_ms() -> None:
    machine = Machine(lambda rows: 100 * US * rows)

    times = sweep(machine.run, clock=machine.clock)

    assert times[-1].rows == next(rows for rows in sweep_sizes(2048) if rows > 100)


def test_one_disturbed_run_does_not_end_the_row_counts() -> None:
    durations = iter([1e-3, 50e-3, 2e-3])
    now = 0.0

    def run(rows: int) -> None:
        nonlocal now
        now += next(durations, 3e-3)

    times = sweep(run, max_rows=3, clock=lambda: now)

    assert [t.rows for t in times] == [1, 2, 3]
    assert times[1].seconds == pytest.approx(2e-3)


@pytest.mark.parametrize("max_rows", [1, 2, 7, 100, 2048])
def test_sizes_reach_from_one_row_to_the_most(max_rows: int) -> None:
    sizes = sweep_sizes(max_rows)

    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert sizes == sorted(set(sizes))
