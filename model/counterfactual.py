"""Loss terms for a later step that also use the rows which never reached it: DCMT and NISE.

Terms on logits alone; which logits, and what is added to them, is not known here. `reached` is the
label of the step before, `labels` that of the step itself; both are cumulative, 0 or 1.
"""

import torch
from torch import Tensor
from torch.nn import functional

MIN_PROPENSITY = 0.01  # a weight is at most 100


def dcmt(
    logits: Tensor,
    counterfactual: Tensor,
    labels: Tensor,
    *,
    reached: Tensor,
    propensity: Tensor,
    row_weight: Tensor,
    penalty: float,
) -> Tensor:
    """mean_D w [y_1 l(y_2, r)/p + (1-y_1) l(1-y_2, r*)/(1-p) + lambda |1 - (r + r*)|].

    Every row that did not reach the step counts as a counterfactual positive; the penalty ties the
    second tower to the first. Source: papers.md 5, after NISE eq. 6.

    Args:
        logits: [B] float32, of r, the step's conditional probability.
        counterfactual: [B] float32, of r*, the second tower's.
        labels: [B] float32.
        reached: [B] float32.
        propensity: [B] float32, p of having reached the step; detached here, and clipped so that
            neither p nor 1-p is below MIN_PROPENSITY.
        row_weight: [B] float32, 0 where a label is not known yet; the denominator is B.
        penalty: lambda.
    """
    share = propensity.detach().clamp(MIN_PROPENSITY, 1.0 - MIN_PROPENSITY)
    factual = _cross_entropy(logits, labels) / share
    other = _cross_entropy(counterfactual, 1.0 - labels) / (1.0 - share)
    excess = (torch.sigmoid(counterfactual) - torch.sigmoid(-logits)).abs()  # r + r* - 1
    losses = reached * factual + (1.0 - reached) * other + penalty * excess
    return (losses * row_weight).mean()


def nise(
    logits: Tensor, labels: Tensor, *, reached: Tensor, row_weight: Tensor, is_detached: bool
) -> Tensor:
    """mean_D w [y_1 l(y_2, r) + (1-y_1) l(r, r)]: the model's own output labels the other rows.

    With the target detached those rows have no gradient at all; without, theirs is -z r(1-r), which
    drives every r below 0.5 towards 0. Source: NISE eq. 8-11; the gradients: papers.md 5 [derived].

    Args:
        logits: [B] float32, z of r = sigmoid(z), the step's conditional probability.
        labels: [B] float32.
        reached: [B] float32.
        row_weight: [B] float32, 0 where a label is not known yet; the denominator is B.
        is_detached: whether the target is; the authors' code does not detach it.
    """
    own = torch.sigmoid(logits)
    pseudo = _cross_entropy(logits, own.detach() if is_detached else own)
    losses = reached * _cross_entropy(logits, labels) + (1.0 - reached) * pseudo
    return (losses * row_weight).mean()


def nise_weight(first: Tensor, later: Tensor, *, scale: float = 1.0, limit: float = 50.0) -> Tensor:
    """The weight alpha min(L_ctr / L_cvr, beta) of L_cvr. Source: NISE, papers.md 5.

    A constant: with its gradient w L_cvr would be L_ctr again. [derived]
    """
    ratio = first.detach() / later.detach().clamp(min=torch.finfo(later.dtype).tiny)
    return scale * ratio.clamp(max=limit)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """l(y, sigmoid(z)) = softplus(z) - y z, [B]; its gradient flows into the targets too."""
    return functional.softplus(logits) - targets * logits
