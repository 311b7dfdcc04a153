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
    durations = iter([5.0, 9.0, 4.0, 8.0, *[6.0, 9.5] * 8])
    now = 0.0

    def run(rows: int) -> None:
        nonlocal now
        now += next(durations)

    times = sweep(run, max_rows=2, clock=lambda: now)

    assert times == [RunTime(1, 4.0), RunTime(2, 8.0)]


@pytest.mark.parametrize("max_rows", [1, 2, 7, 100, 2048])
def test_sizes_reach_from_one_row_to_the_most(max_rows: int) -> None:
    sizes = sweep_sizes(max_rows)

    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert sizes == sorted(set(sizes))
