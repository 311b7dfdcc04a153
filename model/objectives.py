"""Losses of the chain, from step logits, in log space; never from products of probabilities.

Each is a function of what a loss sees of a batch and of the dials. All divide by the batch's number
of rows, never by a count of labels, so that a batch without clicks is an ordinary one.

Shape letters: B rows, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """What a loss sees of a batch.

    Attributes:
        logits: [B, T], conditional steps.
        labels: [B, T] float32, cumulative, 0 or 1.
        row_weight: [B, T] float32, 0 where a label is not known yet.
        marginal: [B, T], logits of the cumulative steps where the network's heads are free.
        imputed: [B, T - 1], the imputation tower's outputs for the steps from the second on; only
            `dr` has it.
    """

    logits: Tensor
    labels: Tensor
    row_weight: Tensor
    marginal: Tensor | None = None
    imputed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Dials:
    """What is fixed for a whole training.

    Attributes:
        step_weights: lambda, length T.
        masses: Pi_{t-1}, share of the training rows with the step before, length T; the first is 1.
    """

    step_weights: tuple[float, ...]
    masses: tuple[float, ...]
    config: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def chain_log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log P_t and log(1 - P_t) of the cumulative steps, [B, T] each, float32 or wider.

    S_t = sum_{s<=t} log sigmoid(z_s); F_t = log sum_{s<=t} exp(S_{s-1} + log sigmoid(-z_s)).
    Exact for every finite logit; S is monotone in t by construction. Source: papers.md 1.6
    [derived].
    """
    wide = _widened(logits)
    log_yes, log_no = functional.logsigmoid(wide), functional.logsigmoid(-wide)
    log_reached = torch.zeros_like(wide[:, 0])
    log_stopped: Tensor | None = None
    reached, stopped = [], []
    for t in range(wide.shape[1]):
        stop = log_reached + log_no[:, t]
        log_stopped = stop if log_stopped is None else torch.logaddexp(log_stopped, stop)
        log_reached = log_reached + log_yes[:, t]
        reached.append(log_reached)
        stopped.append(log_stopped)
    return torch.stack(reached, dim=1), torch.stack(stopped, dim=1)


def weight_power(config: ObjectiveConfig) -> float:
    """The k of an objective's weights P_{t-1}^-k: 0 where all rows weigh alike. papers.md 1.5."""
    return {"ipw": 1.0, "dr": 1.0, "tempered": config.tempering}.get(config.name, 0.0)


def propensity_weight(log_reached: Tensor, config: ObjectiveConfig) -> Tensor:
    """w_t(x) = max(P_{t-1}, clip)^-k from log P_{t-1}, detached, of the same shape.

    The calibrators' fit weighs its rows by the same function.
    """
    floor = math.log(config.propensity_clip)
    return torch.exp(-weight_power(config) * log_reached.detach().clamp(min=floor))


def log_reached_before(logits: Tensor) -> Tensor:
    """Log P_{t-1} of every step, [B, T], float32 or wider, detached; the first is 0."""
    reached, _ = chain_log_probabilities(logits.detach())
    return torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=1)


def rows_with_step_before(seen: LossInput) -> Tensor:
    """Weight w y_{t-1} of each row in each step's own space, [B, T].

    Where an earlier label is not known, neither is whether the row belongs to the space: 0.
    """
    return _row_weight_where_known(seen) * _label_before(seen.labels)


def e2e(seen: LossInput, dials: Dials) -> Tensor:
    """sum_t lambda_t mean_rows w l(y_t, P_t): every step on all impressions.

    For T = 2 this is ESMM's loss. On free heads it is the sum of their binary cross-entropies.
    Source: papers.md 1.5 [derived]; that it is TAFE's loss is [reconstructed].
    """
    return _weighted_mean(_cumulative_losses(seen) * seen.row_weight, dials.step_weights)


def chain(seen: LossInput, dials: Dials) -> Tensor:
    """sum_t lambda_t mean_rows w y_{t-1} l(y_t, c_t): with lambda = 1 the path's -log likelihood.

    Source: papers.md 1.5 [derived].
    """
    return _weighted_mean(_step_losses(seen) * rows_with_step_before(seen), dials.step_weights)


def adjacent_mean(seen: LossInput, dials: Dials) -> Tensor:
    """Chain, each term over Pi_{t-1}: the mean over the step's own space.

    PLE divides by the batch's count of those rows (PLE eq. 9); a constant of the data set keeps the
    estimate unbiased. Source: papers.md 1.5 [derived].
    """
    scaled = tuple(w / mass for w, mass in zip(dials.step_weights, dials.masses, strict=True))
    return _weighted_mean(_step_losses(seen) * rows_with_step_before(seen), scaled)


def inverse_propensity(seen: LossInput, dials: Dials) -> Tensor:
    """Chain, each row weighted by max(P_{t-1}, clip)^-k: k = 1 is ipw, else tempered.

    P comes from the model's own logits and is detached. `e2e_weight` adds the e2e terms of the
    steps after the first (the first is in both alike, and ESCM2 has it once): with k = 1 and weight
    1 that is ESCM2-IPW. Source: papers.md 1.3, 1.5 [derived].
    """
    weight = propensity_weight(log_reached_before(seen.logits), dials.config)
    terms = _step_losses(seen) * rows_with_step_before(seen) * weight
    return _weighted_mean(terms, dials.step_weights) + _added_e2e(seen, dials)


def dr(seen: LossInput, dials: Dials) -> Tensor:
    """mean_rows w [e + y_{t-1} (l - e) / max(P_{t-1}, clip)] from step 2 on.

    Step 1 is the plain mean of l(y_1, c_1). With `imputation = "label"` the tower says r, the label
    that a row would have had with the step before, and e = l(r, c_t) moves with the head's logit: a
    row pulls it towards r + y_{t-1} (y_t - r) / P_{t-1}. With "error" the tower says e itself, as
    in ESCM2-DR; e then does not depend on the head, whose gradient is exactly that of ipw. The
    tower is detached here and has its own loss, `imputation_loss`. A row's pull may lie outside [0,
    1], so that its term has no minimum; the clip bounds it. `e2e_weight` as for ipw. Source:
    papers.md 1.3 [derived]; ESCM2 for "error".
    """
    if seen.logits.shape[1] == 1:
        return chain(seen, dials)  # one step has nothing to impute
    assert seen.imputed is not None
    imputed = _widened(seen.imputed).detach()
    losses = _step_losses(seen)
    if dials.config.imputation == "label":
        later = _widened(seen.logits)[:, 1:]
        # r l(1, c) + (1 - r) l(0, c) = softplus(z) - r z
        expected = functional.softplus(later) - torch.sigmoid(imputed) * later
    else:
        expected = functional.softplus(imputed)
    correction = _corrections(seen, dials) * (losses[:, 1:] - expected)
    terms = torch.cat([losses[:, :1], expected + correction], dim=1) * _row_weight_where_known(seen)
    return _weighted_mean(terms, dials.step_weights) + _added_e2e(seen, dials)


def imputation_loss(seen: LossInput, dials: Dials) -> Tensor:
    """sum_t mean_rows w y_{t-1} / max(P_{t-1}, clip) times the tower's loss: what trains it.

    "label": the cross-entropy of y_t. "error": the square of l(y_t, c_t) - e, l detached. Weighted
    by 1 / P_{t-1}, as e is averaged over all impressions and its errors count there. Any positive
    weight is consistent; at the optimum of this one the corrections of `dr` add to 0, so that pulls
    outside [0, 1] cancel instead of piling up. [derived]
    """
    assert seen.imputed is not None
    imputed = _widened(seen.imputed)
    if dials.config.imputation == "label":
        losses = _cross_entropies(imputed, seen.labels[:, 1:])
    else:
        errors = _step_losses(seen)[:, 1:].detach()
        losses = (errors - functional.softplus(imputed)).square()
    terms = losses * _corrections(seen, dials) * _row_weight_where_known(seen)[:, 1:]
    return terms.mean(dim=0).sum()


def hinge(seen: LossInput, dials: Dials) -> Tensor:
    """e2e of free heads + hinge_weight sum_t mean_rows w max(P_t - P_{t-1}, 0).

    Source: AITM eq. 11-13 (its calibrator), with a mean over rows as in its code.
    """
    assert seen.marginal is not None
    cumulative = torch.sigmoid(_widened(seen.marginal))
    excess = torch.relu(cumulative[:, 1:] - cumulative[:, :-1]) * seen.row_weight[:, 1:]
    return e2e(seen, dials) + dials.config.hinge_weight * excess.mean(dim=0).sum()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An entry of the table: the loss, and which `options.outputs` of a network it can read."""

    loss: Callable[[LossInput, Dials], Tensor]
    outputs: tuple[str, ...] = ("conditional",)


OBJECTIVES: dict[str, Objective] = {
    "e2e": Objective(loss=e2e, outputs=("conditional", "marginal")),
    "chain": Objective(loss=chain),
    "adjacent_mean": Objective(loss=adjacent_mean),
    "ipw": Objective(loss=inverse_propensity),
    "tempered": Objective(loss=inverse_propensity),
    "dr": Objective(loss=dr),
    "hinge": Objective(loss=hinge, outputs=("marginal",)),
}


def _corrections(seen: LossInput, dials: Dials) -> Tensor:
    """y_{t-1} / max(P_{t-1}, clip) of the steps from the second on, [B, T - 1], detached."""
    weight = propensity_weight(log_reached_before(seen.logits), dials.config)
    return (_label_before(seen.labels) * weight)[:, 1:]


def _added_e2e(seen: LossInput, dials: Dials) -> Tensor:
    later = (0.0, *(dials.config.e2e_weight * weight for weight in dials.step_weights[1:]))
    if not any(later):
        return seen.logits.new_zeros(())
    return _weighted_mean(_cumulative_losses(seen) * seen.row_weight, later)


def _step_losses(seen: LossInput) -> Tensor:
    """l(y_t, c_t), [B, T], float32 or wider."""
    return _cross_entropies(seen.logits, seen.labels)


def _cumulative_losses(seen: LossInput) -> Tensor:
    """l(y_t, P_t), [B, T], float32 or wider."""
    if seen.marginal is not None:
        return _cross_entropies(seen.marginal, seen.labels)
    reached, stopped = chain_log_probabilities(seen.logits)
    return -(seen.labels * reached + (1.0 - seen.labels) * stopped)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    wide = _widened(logits)
    return -(labels * functional.logsigmoid(wide) + (1.0 - labels) * functional.logsigmoid(-wide))


def _label_before(labels: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1]], dim=1)


def _row_weight_where_known(seen: LossInput) -> Tensor:
    """Row weights, 0 also where an earlier step's label is not known."""
    known = (seen.row_weight > 0).to(seen.row_weight.dtype)
    return seen.row_weight * torch.cumprod(known, dim=1)


def _weighted_mean(terms: Tensor, step_weights: tuple[float, ...]) -> Tensor:
    weights = torch.tensor(step_weights, dtype=terms.dtype)
    return terms.mean(dim=0) @ weights


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
