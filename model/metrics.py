"""Metrics of probabilities: AUC, log-loss, NE, PCOC, ECE; the space stands in each name."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from model.contract.log_spec import serves_click_and_conversion
from model.contract.spec import Schema
from model.logs import Labels

Floats = npt.NDArray[np.float64]
NUM_ECE_BINS = 20
NUM_BOOTSTRAPS = 1000

Probabilities = Mapping[str, npt.NDArray[np.float32]]


def auc(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Area under the ROC curve, ties half; NaN when one class is absent."""
    if label.min(initial=1.0) == label.max(initial=0.0):
        return float("nan")
    return float(roc_auc_score(label, predicted, sample_weight=weight))


def gauc(predicted: Floats, label: Floats, weight: Floats, *, user: npt.NDArray[np.int64]) -> float:
    """Mean AUC within each user who has both classes, weighted by the user's impressions.

    Ties half; NaN when no user has both. What one user's ranking gains, whatever users' rates are.
    """
    if not len(label):
        return float("nan")
    order = np.lexsort((predicted, user))
    score, who = predicted[order], user[order]
    positive = (weight * label)[order]
    negative = (weight * (1.0 - label))[order]
    is_new_user = np.append(True, who[1:] != who[:-1])
    # A group is the rows of one user at one score; a user is some neighbouring groups.
    is_new_group = is_new_user | np.append(True, score[1:] != score[:-1])
    groups = np.flatnonzero(is_new_group)
    positives, negatives = (np.add.reduceat(values, groups) for values in (positive, negative))
    users = np.flatnonzero(is_new_user[groups])
    before = np.cumsum(negatives) - negatives
    of_user = np.cumsum(is_new_user[groups]) - 1
    below = before - before[users][of_user]
    wins = np.add.reduceat(positives * (below + negatives / 2.0), users)
    totals = [np.add.reduceat(values, users) for values in (positives, negatives)]
    pairs = totals[0] * totals[1]
    has_both = pairs > 0
    if not has_both.any():
        return float("nan")
    impressions = (totals[0] + totals[1])[has_both]
    return float(np.average(wins[has_both] / pairs[has_both], weights=impressions))


def log_loss(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Mean negative log likelihood, natural log."""
    return float(np.average(row_log_losses(predicted, label), weights=weight))


def row_log_losses(predicted: Floats, label: Floats) -> Floats:
    """Negative log likelihood of each row; finite, however wrong a prediction is."""
    tiny = np.finfo(np.float64).tiny
    return -(
        label * np.log(np.maximum(predicted, tiny))
        + (1.0 - label) * np.log(np.maximum(1.0 - predicted, tiny))
    )


def ne(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Log-loss over that of the base rate of the same rows: below 1 is better than the rate."""
    rate = np.average(label, weights=weight)
    if rate in (0.0, 1.0):
        return float("nan")
    return log_loss(predicted, label, weight) / log_loss(np.full(len(label), rate), label, weight)


def pcoc(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Sum predicted over sum observed: 1 is calibrated; NaN when nothing was observed."""
    observed = float(label @ weight)
    return float(predicted @ weight) / observed if observed else float("nan")


def pcoc_interval(
    predicted: Floats, label: Floats, weight: Floats, *, user: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """95 % bootstrap interval of PCOC, drawing users: rows of one user are not independent."""
    users, index = np.unique(user, return_inverse=True)
    sums = np.stack(
        [np.bincount(index, values * weight, len(users)) for values in (predicted, label)]
    )
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(NUM_BOOTSTRAPS):
        drawn = np.bincount(rng.integers(len(users), size=len(users)), minlength=len(users))
        total, observed = sums @ drawn
        ratios.append(total / observed if observed else np.nan)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def ece(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Mean |predicted - observed| over bins of equal row counts."""
    order = np.argsort(predicted, kind="stable")
    total = 0.0
    for part in np.array_split(order, NUM_ECE_BINS):
        gap = (predicted[part] - label[part]) @ weight[part]
        total += abs(float(gap))
    return total / float(weight.sum())


def space_names(schema: Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the spaces: of each cumulative step, and of each conditional from the second on."""
    names = [step.name for step in schema.steps]
    cumulative = tuple(f"p_{name}" for name in names)
    conditional = tuple(f"{b}_given_{a}" for a, b in pairwise(names))
    if serves_click_and_conversion(schema.steps):
        return (*cumulative[:-2], "ctr", "ctcvr"), (*conditional[:-1], "cvr_clicked")
    return cumulative, conditional


def chain_metrics(
    conditional: npt.NDArray[np.float32],
    labels: Labels,
    *,
    schema: Schema,
    user: npt.NDArray[np.int64] | None = None,
) -> dict[str, float | list[float]]:
    """Every metric of every step.

    Args:
        conditional: [N, T] conditional step probabilities.
        labels: of the same rows; rows whose label is not known are left out of the step.
        schema: names the steps.
        user: [N], for bootstrap intervals of PCOC and the AUC within users of the cumulative
            steps; None leaves them out.
    """
    wide = conditional.astype(np.float64)
    cumulative = np.cumprod(wide, axis=1)
    values = labels.values.astype(np.float64)
    weight = labels.weight.astype(np.float64)
    cumulative_names, conditional_names = space_names(schema)
    result: dict[str, float | list[float]] = {}
    for t, name in enumerate(cumulative_names):
        rows = labels.known[:, t]
        result |= _metrics(name, cumulative[rows, t], values[rows, t], weight[rows], user, rows)
    for t, name in enumerate(conditional_names, start=1):
        rows = labels.known[:, t] & (labels.values[:, t - 1] == 1)
        result |= _metrics(name, wide[rows, t], values[rows, t], weight[rows], None, rows)
    return result


def _metrics(
    name: str,
    predicted: Floats,
    label: Floats,
    weight: Floats,
    user: npt.NDArray[np.int64] | None,
    rows: npt.NDArray[np.bool_],
) -> dict[str, float | list[float]]:
    result: dict[str, float | list[float]] = {
        f"rows_{name}": float(len(label)),
        f"positives_{name}": float(label.sum()),
    }
    if not len(label):
        return result
    result[f"rate_{name}"] = float(np.average(label, weights=weight))
    result[f"mean_{name}"] = float(np.average(predicted, weights=weight))
    for function in (auc, log_loss, ne, pcoc, ece):
        result[f"{function.__name__}_{name}"] = function(predicted, label, weight)
    if user is not None:
        interval = pcoc_interval(predicted, label, weight, user=user[rows])
        result[f"pcoc_interval_{name}"] = list(interval)
        result[f"gauc_user_by_impressions_{name}"] = gauc(predicted, label, weight, user=user[rows])
    return result
