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
# A run that takes longer is a long wait for everybody behind it, and no larger one is tried.
_LONGEST_RUN_S = 10e-3


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
    pause: Callable[[float], None] | None = None,
) -> list[RunTime]:
    """Measures runs of 1 row to `max_rows`. Blocks: ten rounds, or down to four if they take 0.3 s.

    Each row count is tried once per round and its least time counts: what disturbs a run only
    ever makes it longer, and seldom hits the same row count every time. Row counts end, after two
    at least, with the first that takes over 10 ms twice.

    Args:
        run: Runs the model with so many rows.
        max_rows: At least 1.
        clock: Seconds. The thread's own CPU time is blind to other load on the machine; not fit
            for runs with threads of their own.
        pause: Called with the time of each run after it, for one who wants the core to be free
            in between. Then there are four rounds.
    """

    def timed(rows: int) -> float:
        started_at = clock()
        run(rows)
        seconds = clock() - started_at
        if pause is not None:
            pause(seconds)
        return seconds

    sizes = sweep_sizes(max_rows)
    least: list[float] = []
    for rows in sizes:
        seconds = timed(rows)
        if seconds > _LONGEST_RUN_S:
            seconds = min(seconds, timed(rows))
        least.append(seconds)
        if seconds > _LONGEST_RUN_S and len(least) >= 2:
            break
    used_s = sum(least)
    for number in range(1, _MAX_ROUNDS):
        if number >= _MIN_ROUNDS and (pause is not None or used_s > _ROUNDS_BUDGET_S):
            break
        for index, before in enumerate(least):
            seconds = timed(sizes[index])
            used_s += seconds
            least[index] = min(before, seconds)
    return [RunTime(rows, seconds) for rows, seconds in zip(sizes, least, strict=False)]


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
