"""Losses of the chain, from step logits, in log space; never from products of probabilities."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def chain_log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log P_t and log(1 - P_t) of the cumulative steps, [B, T] each, float32 or wider.

    S_t = sum_{s<=t} log sigmoid(z_s); F_t = log sum_{s<=t} exp(S_{s-1} + log sigmoid(-z_s)).
    Exact for every finite logit; S is monotone in t by construction. Source: papers.md 1.6
    [derived].
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
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


def e2e(
    logits: Tensor, labels: Tensor, *, row_weight: Tensor, step_weights: Sequence[float]
) -> Tensor:
    """sum_t lambda_t mean_rows w l(y_t, P_t): every step on all impressions.

    Source: papers.md 1.5 [derived]; that it is the paper's loss is [reconstructed].

    Args:
        logits: [B, T] float32, conditional steps.
        labels: [B, T] float32, cumulative, 0 or 1.
        row_weight: [B, T] float32, 0 where a label is not known yet. The denominator is B, never a
            count of labels.
        step_weights: lambda, length T.
    """
    reached, stopped = chain_log_probabilities(logits)
    losses = -(labels * reached + (1.0 - labels) * stopped)
    weights = torch.tensor(list(step_weights), dtype=losses.dtype)
    return (losses * row_weight).mean(dim=0) @ weights


Objective = Callable[..., Tensor]

OBJECTIVES: dict[str, Objective] = {"e2e": e2e}
