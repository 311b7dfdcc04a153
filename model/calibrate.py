"""Calibrators of the conditional steps, fitted on rows with the step before, on their own split.

A calibrator maps a step's logit to a calibrated logit: monotone, interpolated, bounded. The chain's
product is formed after it, so that the order of the cumulative probabilities stays exact.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from model.config import ObjectiveConfig
from model.logs import Labels
from model.metrics import row_log_losses
from model.objectives import propensity_weight

Floats = npt.NDArray[np.float64]

LOGIT_BOUND = 16.0  # calibrated probabilities stay within 1.1e-7 of 0 and 1
MAX_KNOTS = 64
NUM_FOLDS = 5
MAX_SLOPE = 20.0  # steeper is noise, and would blow rounding up beyond the parity of the graph
MIN_GAP = 1e-4  # between knots, in logits
PRIOR_ROWS = 1.0  # an isotonic block counts as if it held one more row, at the base rate


class Calibrator(BaseModel):
    """One step's map, piecewise linear in the logit, continued with the outer slopes.

    Attributes:
        x, y: knots, both ascending; empty for the identity, temperature and Platt.
        slope, offset: of the line; beyond isotonic knots the slope is 1.
        log_loss: cross-validated, by method, what the choice was made by.
    """

    model_config = ConfigDict(frozen=True)

    method: str = "identity"
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    slope: float = 1.0
    offset: float = 0.0
    log_loss: dict[str, float] = {}

    def apply(self, logits: Floats) -> Floats:
        """Calibrated logits, float64."""
        if self.x:
            x, y = np.array(self.x), np.array(self.y)
            inside = np.interp(logits, x, y)
            mapped = inside + np.minimum(logits - x[0], 0.0) + np.maximum(logits - x[-1], 0.0)
        else:
            mapped = self.slope * logits + self.offset
        bounded: Floats = np.clip(mapped, -LOGIT_BOUND, LOGIT_BOUND)
        return bounded


class CalibratorLayer(nn.Module):
    """The same map in the graph: a line plus one clipped segment between neighbouring knots."""

    def __init__(self, calibrator: Calibrator) -> None:
        super().__init__()
        self.has_knots = bool(calibrator.x)
        self.slope, self.offset = calibrator.slope, calibrator.offset
        if self.has_knots:
            x, y = np.array(calibrator.x), np.array(calibrator.y)
            widths = np.diff(x)
            for name, values in (
                ("starts", x[:-1]),
                ("widths", widths),
                ("slopes", np.diff(y) / widths),
                ("ends", np.array([x[0], x[-1], y[0]])),
            ):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        """[B] to [B]."""
        if self.has_knots:
            first, last, base = self.get_buffer("ends")
            starts, widths = self.get_buffer("starts"), self.get_buffer("widths")
            parts = torch.minimum(torch.relu(logits.unsqueeze(1) - starts), widths)
            inside = (parts * self.get_buffer("slopes")).sum(dim=1)
            mapped = base + inside + torch.relu(logits - last) - torch.relu(first - logits)
        else:
            mapped = self.slope * logits + self.offset
        return torch.clamp(mapped, -LOGIT_BOUND, LOGIT_BOUND)


def fit_calibrators(
    logits: npt.NDArray[np.float32],
    labels: Labels,
    *,
    user: npt.NDArray[np.int64],
    methods: Sequence[str],
    objective: ObjectiveConfig | None = None,
) -> list[Calibrator]:
    """The best method per step by log-loss, cross-validated over users within the given rows.

    A method replaces one before it in `methods` only if it is better by one standard error. Rows
    are weighted as the objective weighted them, by P_{t-1} of the calibrated steps before: a step
    calibrated on the rows as they came would be bent back to the space that it was trained out of.

    Args:
        logits: [N, T] uncalibrated.
        labels: of the same rows.
        user: [N]; no user is in two folds.
        methods: tried, the simplest first.
        objective: that the logits were trained by; None weighs all rows alike.
    """
    calibrators: list[Calibrator] = []
    log_reached = np.zeros(len(logits), np.float64)
    for t in range(logits.shape[1]):
        rows = labels.known[:, t].copy()
        if t:
            rows &= labels.values[:, t - 1] == 1
        weight = labels.weight[rows].astype(np.float64)
        if objective is not None:
            weight = weight * _scaled_propensity_weight(log_reached[rows], objective)
        calibrators.append(
            _choose(
                logits[rows, t].astype(np.float64),
                labels.values[rows, t].astype(np.float64),
                weight,
                user=user[rows],
                methods=methods,
            )
        )
        calibrated = calibrators[t].apply(logits[:, t].astype(np.float64))
        log_reached -= np.logaddexp(0.0, -calibrated)
    return calibrators


def calibrated_probabilities(
    logits: npt.NDArray[np.float32], calibrators: Sequence[Calibrator]
) -> npt.NDArray[np.float32]:
    """Conditional step probabilities [N, T] as served."""
    mapped = [
        calibrator.apply(logits[:, t].astype(np.float64))
        for t, calibrator in enumerate(calibrators)
    ]
    return (1.0 / (1.0 + np.exp(-np.stack(mapped, axis=1)))).astype(np.float32)


def _scaled_propensity_weight(log_reached: Floats, objective: ObjectiveConfig) -> Floats:
    """The objective's w_t(x), scaled to add to the effective number of rows, (sum w)^2 / sum w^2.

    The scale matters to the isotonic prior only, which counts in rows.
    """
    if not len(log_reached):
        return log_reached
    weight: Floats = propensity_weight(torch.from_numpy(log_reached), objective).numpy()
    scaled: Floats = weight * (weight.sum() / (weight @ weight))
    return scaled


def _choose(
    logits: Floats,
    label: Floats,
    weight: Floats,
    *,
    user: npt.NDArray[np.int64],
    methods: Sequence[str],
) -> Calibrator:
    positives = int(label.sum())
    if positives < 2 * NUM_FOLDS or len(label) - positives < 2 * NUM_FOLDS:
        return Calibrator()
    users, index = np.unique(user, return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(users))[index] % NUM_FOLDS
    per_user: dict[str, Floats] = {}
    for method in methods:
        predicted = np.empty(len(label))
        for k in range(NUM_FOLDS):
            inside, outside = fold != k, fold == k
            fitted = _fit(method, logits[inside], label[inside], weight[inside])
            predicted[outside] = 1.0 / (1.0 + np.exp(-fitted.apply(logits[outside])))
        losses = row_log_losses(predicted, label) * weight / weight.sum()
        per_user[method] = np.bincount(index, losses, len(users)).astype(np.float64)
    best = methods[0]
    for method in methods[1:]:
        gain = per_user[best] - per_user[method]
        # One standard error, over users: a correction that noise could have made is not made.
        if gain.sum() > np.sqrt(len(gain)) * gain.std():
            best = method
    chosen = _fit(best, logits, label, weight)
    totals = {method: float(losses.sum()) for method, losses in per_user.items()}
    return chosen.model_copy(update={"log_loss": totals})


def _fit(method: str, logits: Floats, label: Floats, weight: Floats) -> Calibrator:
    """One method's fit; the identity where rows of one class are all there is (a fold's rest)."""
    if label.min(initial=1.0) >= label.max(initial=0.0):
        return Calibrator()
    return _FITTERS[method](logits, label, weight)


def _identity(logits: Floats, label: Floats, weight: Floats) -> Calibrator:
    return Calibrator()


def _temperature(logits: Floats, label: Floats, weight: Floats) -> Calibrator:
    """Logits over one T > 0: the slope is 1 / T."""
    model = LogisticRegression(C=1e6, fit_intercept=False)
    slope = float(model.fit(logits[:, None], label, sample_weight=weight).coef_[0, 0])
    if slope <= 0.0:
        return Calibrator()
    return Calibrator(method="temperature", slope=min(slope, MAX_SLOPE))


def _platt(logits: Floats, label: Floats, weight: Floats) -> Calibrator:
    model = LogisticRegression(C=1e6).fit(logits[:, None], label, sample_weight=weight)
    slope = float(model.coef_[0, 0])
    if slope <= 0.0:
        return Calibrator()
    return Calibrator(method="platt", slope=slope, offset=float(model.intercept_[0]))


def _isotonic(logits: Floats, label: Floats, weight: Floats) -> Calibrator:
    fitted = IsotonicRegression().fit_transform(logits, label, sample_weight=weight)
    order = np.argsort(logits, kind="stable")
    block = np.concatenate([[0], np.cumsum(np.diff(fitted[order]) > 0)])
    rows = np.bincount(block, weight[order]).astype(np.float64)
    if len(rows) > MAX_KNOTS:
        share = np.minimum((np.cumsum(rows) - rows / 2) / rows.sum() * MAX_KNOTS, MAX_KNOTS - 1)
        block = share.astype(np.int64)[block]
        block = np.unique(block, return_inverse=True)[1]
        rows = np.bincount(block, weight[order]).astype(np.float64)
    rate = np.average(label, weights=weight)
    x = np.bincount(block, weight[order] * logits[order]) / rows
    positives = np.bincount(block, weight[order] * label[order])
    y = np.maximum.accumulate((positives + PRIOR_ROWS * rate) / (rows + PRIOR_ROWS))
    x, y = _without_steep_parts(x, np.log(y / (1.0 - y)), rows)
    if len(x) < 2:
        return Calibrator()
    return Calibrator(method="isotonic", x=tuple(x.tolist()), y=tuple(y.tolist()))


def _without_steep_parts(x: Floats, y: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Merges neighbouring knots, the steepest first, until no slope is above MAX_SLOPE."""
    while len(x) > 1:
        slopes = np.diff(y) / np.maximum(np.diff(x), 1e-12)
        k = int(np.argmax(slopes))
        if slopes[k] <= MAX_SLOPE and np.diff(x).min() > MIN_GAP:
            break
        if slopes[k] <= MAX_SLOPE:
            k = int(np.argmin(np.diff(x)))
        pair = slice(k, k + 2)
        for values in (x, y):
            values[k] = np.average(values[pair], weights=rows[pair])
        rows[k] = rows[pair].sum()
        x, y, rows = (np.delete(values, k + 1) for values in (x, y, rows))
    return x, y


_FITTERS: dict[str, Callable[[Floats, Floats, Floats], Calibrator]] = {
    "identity": _identity,
    "temperature": _temperature,
    "platt": _platt,
    "isotonic": _isotonic,
}
