"""What a model run costs by its rows, measured at load; knows neither the model nor the queue.

Says how many rows are best run together, and how long so many waiting rows will take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_SWEEP_ROWS = 2048

# Of one more run besides the model: to a thread and back, putting requests together and apart.
_HAND_OVER_S = 50e-6
# A cap this much dearer per row than the best is taken if it is smaller: a shorter run is a
# shorter wait for everybody behind it.
_TOLERANCE = 0.02
_STEP = 1.2  # between row counts tried
_MIN_ROUNDS, _MAX_ROUNDS = 4, 10
_ROUNDS_BUDGET_S = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """Predicts the duration of model runs, the way to a thread and back included.

    Attributes:
        fixed_s: Seconds of the model for a run, whatever its rows.
        row_s: Seconds for each of its rows.
        max_rows: Most rows of one run; more rows take several runs.
    """

    fixed_s: float
    row_s: float
    max_rows: int

    def seconds(self, rows: int) -> float:
        """Time of the runs that so many rows take, one after another; 0 for no rows."""
        num_runs = -(-rows // self.max_rows)
        return num_runs * (_HAND_OVER_S + self.fixed_s) + rows * self.row_s


@dataclass(frozen=True, slots=True)
class RunTime:
    """The least seconds that a run of so many rows took."""

    rows: int
    seconds: float


def sweep(
    run: Callable[[int], None],
    *,
    max_rows: int = MAX_SWEEP_ROWS,
    clock: Callable[[], float] = time.thread_time,
) -> list[RunTime]:
    """Measures runs of 1 row to `max_rows`. Blocks: ten rounds, or down to four if they take 0.3 s.

    Each row count is tried once per round and its least time counts: what disturbs a run only
    ever makes it longer, and seldom hits the same row count every time.

    Args:
        run: Runs the model with so many rows.
        max_rows: At least 1.
        clock: Seconds. The thread's own CPU time is blind to other load on the machine; not fit
            for runs with threads of their own.
    """
    sizes = sweep_sizes(max_rows)
    least = [float("inf")] * len(sizes)
    give_up_at = time.perf_counter() + _ROUNDS_BUDGET_S
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() > give_up_at:
            break
        for index, rows in enumerate(sizes):
            started_at = clock()
            run(rows)
            least[index] = min(least[index], clock() - started_at)
    return [RunTime(rows, seconds) for rows, seconds in zip(sizes, least, strict=True)]


def fit_cost(times: Sequence[RunTime], *, max_rows: int | None = None) -> RunCost:
    """Fits a fixed cost and a cost per row to the runs up to the cap.

    Args:
        times: By ascending rows, at least two.
        max_rows: The cap; None chooses the one where a row is cheapest, hand-over included, or
            the smallest that is nearly as cheap.
    """
    cap = best_rows(times) if max_rows is None else max_rows
    # Two points at least, and never only the smallest: a line needs a length.
    inside = [t for t in times if t.rows <= cap]
    used = inside if len(inside) >= 2 else list(times[:2])
    rows = np.array([t.rows for t in used], np.float64)
    seconds = np.array([t.seconds for t in used], np.float64)
    # Relative errors count: else the large runs alone would decide.
    weights = 1.0 / np.maximum(seconds, 1e-9)
    design = np.stack([np.ones_like(rows), rows], axis=1) * weights[:, None]
    fixed_s, row_s = np.linalg.lstsq(design, seconds * weights, rcond=None)[0].tolist()
    return RunCost(fixed_s=max(fixed_s, 0.0), row_s=max(row_s, 0.0), max_rows=cap)


def best_rows(times: Sequence[RunTime]) -> int:
    """The smallest row count at which a row costs at most 2 % more than at the best one."""
    costs = [(t.seconds + _HAND_OVER_S) / t.rows for t in times]
    limit = min(costs) * (1 + _TOLERANCE)
    return next(t.rows for t, cost in zip(times, costs, strict=True) if cost <= limit)


def sweep_sizes(max_rows: int) -> list[int]:
    """The row counts that `sweep` runs: from 1 to `max_rows` in steps of a fifth."""
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(max_rows, max(sizes[-1] + 1, round(sizes[-1] * _STEP))))
    return sizes
