"""An impression log whose step probabilities are known, with its schema and training files.

The default is the simulation of papers.md 1.7: x ~ N(0, I); click logit -2 + 1.2 x1; conversion
logit -2.5 + 0.8 x1 - 0.6 x1^2 + 0.5 x2. x1 is the sum of a user's, an item's and the impression's
own factor. The factors of users and of items are normal quantiles in random order, scaled to
variance 1: x1 and x2 have mean 0 and variance 1 over all pairs however few users and items there
are, and are as good as normal from some hundreds on.

`correlation` is that of the click's logit with x1: the click's factor is r x1 + sqrt(1 - r^2) x3
with x3 a normal of its own, a column of the log where |r| < 1. The distribution of each probability
by itself does not depend on it; how the two go together does.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import tomli_w

Floats = npt.NDArray[np.float64]

CLICK = (-2.0, 1.2)  # offset, and slope in the click's factor
CONVERSION = (-2.5, 0.8, -0.6, 0.5)  # offset, and slopes in x1, x1^2, x2
LATER = (-1.0, 0.5, -0.3, 0.5)  # likewise, of every step after the conversion
VARIANCE_SHARES = {"user": 0.4, "item": 0.4, "impression": 0.2}  # of x1
START = 1_704_067_200  # 2024-01-01 00:00 UTC
DAYS = 60
DAY_S = 86_400
WINDOW_IN_DELAYS = 3.0  # a step's window, in mean delays: 95 % of first steps fall into it
# Conversions are few: a calibrator needs many rows. To compare with the truth fewer are enough.
SPLIT_SHARES = {"train": 0.6, "validation": 0.05, "calibration": 0.2, "test": 0.15}
BLOCK_ROWS = 1 << 16  # drawn at once, by a generator of their own
PART_BLOCKS = 16  # of a file, one row group each


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is simulated; the same values give the same bytes.

    Attributes:
        rows: impressions.
        users, items: how many there are; each impression draws one of each, evenly.
        steps: length of the chain, 2 or more.
        correlation: of the click's logit and x1, in [-1, 1].
        features: "rich" has x1_squared among the columns; "restricted" does not.
        delay_days: mean of the exponential time from each step after the click to the one before;
            0 is none. With delays the log ends with its last impression, and each step has an event
            time and a window of three mean delays.
        seed: of every draw.
    """

    rows: int = 1_000_000
    users: int = 20_000
    items: int = 2_000
    steps: int = 2
    correlation: float = 1.0
    features: Literal["rich", "restricted"] = "rich"
    delay_days: float = 0.0
    seed: int = 1

    @property
    def step_names(self) -> tuple[str, ...]:
        """click, conversion, step_3 and so on."""
        return ("click", "conversion", *(f"step_{t}" for t in range(3, self.steps + 1)))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The numeric columns that models are given."""
        names = ["x1", "x2"]
        if abs(self.correlation) < 1.0:
            names.append("x3")
        if self.features == "rich":
            names.append("x1_squared")
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class SimulationSummary:
    """What was written, by step name: rows with the step, mean true conditional probability."""

    rows: int
    labels: dict[str, int]
    true_means: dict[str, float]


def write_simulation(
    out: Path, simulation: Simulation, *, progress: Callable[[str], None]
) -> SimulationSummary:
    """Writes impressions/ (Parquet parts), schema.toml and train.toml; holds one part in memory.

    Raises:
        ValueError: an option is out of its range.
    """
    directory = out / "impressions"
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("part-*.parquet"):
        old.unlink()
    names = simulation.step_names
    rows, labels, truth = 0, np.zeros(len(names), np.int64), np.zeros(len(names))
    blocks: list[pl.DataFrame] = []
    num_parts = 0
    num_blocks = -(-simulation.rows // BLOCK_ROWS)
    for k, block in enumerate(draw_blocks(simulation)):
        blocks.append(block)
        rows += len(block)
        labels += np.array([int(block[name].sum()) for name in names])
        truth += np.array([float(block[f"true_p_{name}"].cast(pl.Float64).sum()) for name in names])
        if len(blocks) == PART_BLOCKS or k == num_blocks - 1:
            path = directory / f"part-{num_parts:05d}.parquet"
            pl.concat(blocks).write_parquet(path, row_group_size=BLOCK_ROWS)
            blocks, num_parts = [], num_parts + 1
            progress(f"drawn {rows:,} of {simulation.rows:,} impressions")
    (out / "schema.toml").write_text(tomli_w.dumps(schema_content(simulation)))
    (out / "train.toml").write_text(tomli_w.dumps(train_content()))
    return SimulationSummary(
        rows=rows,
        labels=dict(zip(names, labels.tolist(), strict=True)),
        true_means=dict(zip(names, (truth / rows).tolist(), strict=True)),
    )


def draw_blocks(simulation: Simulation) -> Iterator[pl.DataFrame]:
    """The log in order of time, block by block; a block depends on no other."""
    _check(simulation)
    user_factors = _factors(simulation.users, np.random.default_rng([simulation.seed, 0]))
    item_factors = _factors(simulation.items, np.random.default_rng([simulation.seed, 1]))
    for k in range(-(-simulation.rows // BLOCK_ROWS)):
        start = k * BLOCK_ROWS
        rows = np.arange(start, min(start + BLOCK_ROWS, simulation.rows))
        rng = np.random.default_rng([simulation.seed, 2, k])
        yield _block(simulation, rows, rng, user_factors=user_factors, item_factors=item_factors)


def conditional_probabilities(
    x1: Floats, x2: Floats, click_factor: Floats, *, num_steps: int
) -> Floats:
    """True P(step | step before), however late the step comes: [N, T].

    Source: papers.md 1.7 for click and conversion; the later steps' numbers are ours.
    """
    offset, slope = CLICK
    logits = [offset + slope * click_factor]
    for t in range(1, num_steps):
        offset, linear, square, second = CONVERSION if t == 1 else LATER
        logits.append(offset + linear * x1 + square * x1**2 + second * x2)
    return 1.0 / (1.0 + np.exp(-np.stack(logits, axis=1)))


def schema_content(simulation: Simulation) -> dict[str, Any]:  # Any: TOML values
    """The schema of a simulated log: its numbers, its chain, its truth."""
    steps = []
    for t, name in enumerate(simulation.step_names):
        step: dict[str, Any] = {"name": name, "label": name, "truth": f"true_p_{name}"}
        if t and simulation.delay_days:
            step["time"] = f"{name}_time"
            step["window_days"] = WINDOW_IN_DELAYS * simulation.delay_days
        steps.append(step)
    return {
        "log": {"split": "split"},
        "steps": steps,
        "features": [
            {"name": name, "kind": "numeric", "scope": "cross", "source": "request"}
            for name in simulation.feature_names
        ],
    }


def train_content() -> dict[str, Any]:  # Any: TOML values
    """A run in which the linear conversion head reaches its optimum.

    No record or id is dropped, as there is none; the last weights are kept, as the validation loss
    is that of the cumulative steps, which ipw and dr give up something of.
    """
    return {
        "data": {"impressions": "impressions", "schema_file": "schema.toml"},
        "net": {"architecture": "linear_head", "options": {"dropout": 0.0}},
        "objective": {"name": "e2e"},
        "optimizer": {
            "batch_rows": 4096,
            "learning_rate": 0.04,
            "final_learning_rate_share": 0.0,
            "average_decay": 0.9,
            "max_epochs": 8,
            "min_steps": 0,
            "evaluations_per_epoch": 1,
            "keep": "last",
            "drop_record_share": 0.0,
            "drop_id_share": 0.0,
        },
    }


def _check(simulation: Simulation) -> None:
    if simulation.rows < 1 or min(simulation.users, simulation.items) < 2:
        raise ValueError("at least one row, two users and two items are simulated")
    if simulation.steps < 2:
        raise ValueError(f"a chain has two steps or more, not {simulation.steps}")
    if not -1.0 <= simulation.correlation <= 1.0:
        raise ValueError(f"correlation is in [-1, 1], not {simulation.correlation}")
    if not 0.0 <= simulation.delay_days < math.inf:
        raise ValueError(f"delay_days is a number of days, not {simulation.delay_days}")


def _factors(count: int, rng: np.random.Generator) -> Floats:
    """Two columns [count, 2], mean 0 and variance 1: quantiles, each in an order of its own."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    quantiles /= quantiles.std()
    return np.stack([rng.permutation(quantiles), rng.permutation(quantiles)], axis=1)


def _block(
    simulation: Simulation,
    rows: npt.NDArray[np.int64],
    rng: np.random.Generator,
    *,
    user_factors: Floats,
    item_factors: Floats,
) -> pl.DataFrame:
    count, num_steps = len(rows), simulation.steps
    user = rng.integers(simulation.users, size=count)
    item = rng.integers(simulation.items, size=count)
    roots = {name: math.sqrt(share) for name, share in VARIANCE_SHARES.items()}
    mixed = roots["user"] * user_factors[user] + roots["item"] * item_factors[item]
    mixed += roots["impression"] * rng.standard_normal((count, 2))
    # The truth is that of the numbers as written.
    x1, x2 = mixed.astype(np.float32).T.astype(np.float64)
    x3 = rng.standard_normal(count).astype(np.float32).astype(np.float64)
    r = simulation.correlation
    truth = conditional_probabilities(
        x1, x2, r * x1 + math.sqrt(1.0 - r * r) * x3, num_steps=num_steps
    )
    happens = np.logical_and.accumulate(rng.random((count, num_steps)) < truth, axis=1)
    # int64 microseconds since 1970, evenly over the log's days.
    time = (START + rows / simulation.rows * DAYS * DAY_S) * 1e6
    columns: dict[str, Any] = {
        "user_id": user,
        "item_id": item,
        "time": _stamps(time),
        "split": _splits(count, rng),
        "x1": x1.astype(np.float32),
        "x2": x2.astype(np.float32),
        "x3": x3.astype(np.float32),
        "x1_squared": (x1**2).astype(np.float32),
    }
    for name in {"x3", "x1_squared"} - set(simulation.feature_names):
        del columns[name]
    if simulation.delay_days:
        happens, truth = _delay(simulation, columns, happens, truth, time=time, rng=rng)
    for t, name in enumerate(simulation.step_names):
        columns[name] = happens[:, t].astype(np.int8)
        columns[f"true_p_{name}"] = truth[:, t].astype(np.float32)
    return pl.DataFrame(columns)


def _delay(
    simulation: Simulation,
    columns: dict[str, Any],
    happens: npt.NDArray[np.bool_],
    truth: Floats,
    *,
    time: Floats,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Labels as the log's end knows them, and the truth of labels that count within the window.

    With exponential delays D of one mean, step t is within the window W if D_2 + .. + D_t <= W,
    whatever x is: its probability given the step before is c_t times the ratio of two Erlang
    distributions at W. [derived]
    """
    delays = rng.exponential(simulation.delay_days * DAY_S * 1e6, (len(time), simulation.steps))
    delays[:, 0] = 0.0
    event_time = np.floor(time[:, None] + np.cumsum(delays, axis=1))
    log_end = (START + (simulation.rows - 1) / simulation.rows * DAYS * DAY_S) * 1e6
    happened = happens & (event_time <= np.floor(log_end))
    truth = truth.copy()
    for t, name in enumerate(simulation.step_names[1:], start=1):
        columns[f"{name}_time"] = _stamps(event_time[:, t]).set(pl.Series(~happened[:, t]), None)
        within = _erlang(t, WINDOW_IN_DELAYS)
        before = _erlang(t - 1, WINDOW_IN_DELAYS) if t > 1 else 1.0
        truth[:, t] *= within / before
    return happened, truth


def _erlang(shape: int, x: float) -> float:
    """P(the sum of so many unit exponentials <= x)."""
    return 1.0 - math.exp(-x) * sum(x**n / math.factorial(n) for n in range(shape))


def _stamps(micros: Floats) -> pl.Series:
    return pl.Series(micros.astype(np.int64)).cast(pl.Datetime("us", "UTC"))


def _splits(count: int, rng: np.random.Generator) -> pl.Series:
    """Names drawn row by row: the generator does not drift, so that time would tell nothing."""
    bounds = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
    names = np.array(list(SPLIT_SHARES))
    return pl.Series(names[np.searchsorted(bounds, rng.random(count), side="right")].tolist())
