"""Metrics of predictions against known probabilities, over every impression: simulators only."""

import numpy as np
import numpy.typing as npt

from model.contract.spec import Schema
from model.metrics import Floats, pcoc, row_log_losses, space_names


def entire_space_names(schema: Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the cumulative steps, and of the conditional ones from the second on.

    "all" in a name says that a conditional probability is measured on all impressions, not on those
    with the step before. Source: papers.md 6.1.
    """
    cumulative, conditional = space_names(schema)
    return cumulative, tuple(
        "cvr_all" if name == "cvr_clicked" else f"{name}_all" for name in conditional
    )


def truth_metrics(
    conditional: npt.NDArray[np.float32],
    truth: npt.NDArray[np.float32],
    *,
    weight: npt.NDArray[np.float32],
    schema: Schema,
) -> dict[str, float]:
    """Bias and error of every step, conditional and cumulative, on all rows given.

    `pcoc` is sum predicted over sum true; `excess_log_loss` the expected log-loss above that of the
    truth, the mean Kullback-Leibler divergence in nats. Source: papers.md 1.7.

    Args:
        conditional: [N, T] predicted conditional step probabilities.
        truth: [N, T], the known ones.
        weight: [N] of the rows.
        schema: names the steps.
    """
    predicted, true = conditional.astype(np.float64), truth.astype(np.float64)
    weights = weight.astype(np.float64)
    cumulative_names, conditional_names = entire_space_names(schema)
    spaces = [
        (name, np.prod(predicted[:, : t + 1], axis=1), np.prod(true[:, : t + 1], axis=1))
        for t, name in enumerate(cumulative_names)
    ]
    spaces += [
        (name, predicted[:, t], true[:, t]) for t, name in enumerate(conditional_names, start=1)
    ]
    result: dict[str, float] = {}
    for name, given, known in spaces:
        result |= {
            f"mean_{name}": float(np.average(given, weights=weights)),
            f"true_mean_{name}": float(np.average(known, weights=weights)),
            f"pcoc_{name}": pcoc(given, known, weights),
            f"rmse_{name}": float(np.sqrt(np.average((given - known) ** 2, weights=weights))),
            f"excess_log_loss_{name}": _excess_log_loss(given, known, weights),
        }
    return result


def _excess_log_loss(predicted: Floats, true: Floats, weight: Floats) -> float:
    excess = row_log_losses(predicted, true) - row_log_losses(true, true)
    return float(np.average(excess, weights=weight))
