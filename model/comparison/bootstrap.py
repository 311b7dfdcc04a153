"""Test metrics under draws of users, with replacement; the same draws for every model.

Draw k is the same users in every call with as many of them, so that two models' k-th values are a
pair. Rows of one user are not independent: users are drawn, not rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.spec import Schema
from model.logs import Labels
from model.metrics import row_log_losses, space_names

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SEED = 20240607


@dataclass(frozen=True, kw_only=True)
class DrawnMetrics:
    """values float64 [draws, len(names)]; NaN where a draw lacks a class."""

    names: tuple[str, ...]
    values: Floats


def drawn_metrics(
    conditional: npt.NDArray[np.float32],
    labels: Labels,
    *,
    user: Ids,
    schema: Schema,
    num_draws: int,
) -> DrawnMetrics:
    """AUC of every step, log-loss and NE of the cumulative ones, under each draw.

    Args:
        conditional: [N, T] conditional step probabilities.
        labels: of the same rows.
        user: [N]; whole numbers.
        schema: names the steps.
        num_draws: each costs one pass over the rows per cumulative step.
    """
    users, index = np.unique(user, return_inverse=True)
    statistics = _statistics(conditional, labels, index=index, num_users=len(users), schema=schema)
    rows = [
        [value for statistic in statistics.values() for value in statistic(counts)]
        for counts in _draws(len(users), num_draws)
    ]
    names = tuple(name for group in statistics for name in group)
    return DrawnMetrics(names=names, values=np.array(rows, np.float64).reshape(-1, len(names)))


def _draws(num_users: int, num_draws: int) -> Iterator[Floats]:
    """How often each user is drawn."""
    rng = np.random.default_rng(SEED)
    for _ in range(num_draws):
        drawn = rng.integers(num_users, size=num_users)
        yield np.bincount(drawn, minlength=num_users).astype(np.float64)


Statistic = Callable[[Floats], tuple[float, ...]]


def _statistics(
    conditional: npt.NDArray[np.float32],
    labels: Labels,
    *,
    index: Ids,
    num_users: int,
    schema: Schema,
) -> dict[tuple[str, ...], Statistic]:
    wide = conditional.astype(np.float64)
    cumulative = np.cumprod(wide, axis=1)
    values, weight = labels.values.astype(np.float64), labels.weight.astype(np.float64)
    cumulative_names, conditional_names = space_names(schema)
    statistics: dict[tuple[str, ...], Statistic] = {}
    for t, name in enumerate(cumulative_names):
        rows = labels.known[:, t]
        given = (cumulative[rows, t], values[rows, t], weight[rows], index[rows])
        statistics[(f"auc_{name}",)] = _DrawnAuc(*given)
        statistics[(f"log_loss_{name}", f"ne_{name}")] = _DrawnLoss(*given, num_users)
    for t, name in enumerate(conditional_names, start=1):
        rows = labels.known[:, t] & (labels.values[:, t - 1] == 1)
        statistics[(f"auc_{name}",)] = _DrawnAuc(
            wide[rows, t], values[rows, t], weight[rows], index[rows]
        )
    return statistics


class _DrawnAuc:
    """AUC with ties half: rows are sorted once, a draw is one cumulative sum over the negatives."""

    def __init__(self, predicted: Floats, label: Floats, weight: Floats, index: Ids) -> None:
        is_positive = label == 1
        negatives, positives = np.flatnonzero(~is_positive), np.flatnonzero(is_positive)
        negatives = negatives[np.argsort(predicted[negatives], kind="stable")]
        scores = predicted[negatives]
        self._lower = np.searchsorted(scores, predicted[positives], "left")
        self._upper = np.searchsorted(scores, predicted[positives], "right")
        self._positive_user, self._positive_weight = index[positives], weight[positives]
        self._negative_user = index[negatives].astype(np.int32)
        # Most logs weigh all rows alike: a multiplication over all of them is saved.
        self._negative_weight = None if np.all(weight == 1.0) else weight[negatives]
        self._below = np.zeros(len(negatives) + 1, np.float64)

    def __call__(self, counts: Floats) -> tuple[float]:
        drawn = counts[self._negative_user]
        if self._negative_weight is not None:
            drawn *= self._negative_weight
        below = self._below
        np.cumsum(drawn, out=below[1:])
        positives = counts[self._positive_user] * self._positive_weight
        pairs = float(positives.sum() * below[-1])
        wins = float(positives @ (below[self._lower] + below[self._upper])) / 2.0
        return (wins / pairs if pairs else float("nan"),)


class _DrawnLoss:
    """Log-loss, and NE: log-loss over that of the drawn rows' own rate; from sums per user."""

    def __init__(
        self, predicted: Floats, label: Floats, weight: Floats, index: Ids, num_users: int
    ) -> None:
        self._sums = np.stack(
            [
                np.bincount(index, values * weight, num_users)
                for values in (row_log_losses(predicted, label), label, np.ones(len(label)))
            ]
        )

    def __call__(self, counts: Floats) -> tuple[float, float]:
        loss, positives, total = (self._sums @ counts).tolist()
        if not total:
            return float("nan"), float("nan")
        rate = positives / total
        if rate in (0.0, 1.0):
            return loss / total, float("nan")
        entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log(1.0 - rate))
        return loss / total, loss / total / float(entropy)
