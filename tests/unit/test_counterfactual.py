"""DCMT's and NISE's terms: papers.md section 9, T42 and T43."""

import math

import pytest
import torch
from torch import Tensor

from model.counterfactual import dcmt, nise, nise_weight

LN_3 = math.log(3.0)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fitted_sum(penalty: float) -> float:
    """R + r* where gradient descent ends, for 10 rows, half of them reached, 1 in 5 of those so."""
    towers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reached = column(*[1.0] * 5, *[0.0] * 5)
    labels = column(1.0, *[0.0] * 9)
    optimizer = torch.optim.Adam([towers], lr=0.1)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.985)
    for _ in range(600):
        loss = dcmt(
            towers[0].expand(10),
            towers[1].expand(10),
            labels,
            reached=reached,
            propensity=torch.full((10,), 0.5, dtype=torch.float64),
            row_weight=torch.ones(10, dtype=torch.float64),
            penalty=penalty,
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        optimizer.step()
        decay.step()
    return float(torch.sigmoid(towers.detach()).sum())


def test_t42_a_large_penalty_of_dcmt_forces_both_towers_to_add_up_to_one() -> None:
    assert fitted_sum(1e6) == pytest.approx(1.0, abs=1e-3)


def test_t42_without_the_penalty_they_do_not() -> None:
    """R goes to 0.2, and r* towards 1: every row not reached is a counterfactual positive."""
    assert fitted_sum(0.0) > 1.15


def test_t42_dcmt_by_hand() -> None:
    """ln 2 / 0.5, and -ln 0.75 / 0.8 + 2 * 0.25, their mean."""
    loss = dcmt(
        column(0.0, 0.0),
        column(0.0, LN_3),
        column(1.0, 0.0),
        reached=column(1.0, 0.0),
        propensity=column(0.5, 0.2),
        row_weight=column(1.0, 1.0),
        penalty=2.0,
    )

    assert float(loss) == pytest.approx(1.1229488, abs=1e-6)


def test_t42_propensity_is_clipped_and_has_no_gradient() -> None:
    """Both sides at most 100 times: 100 ln 2."""
    propensity = column(1e-5, 1.0).requires_grad_()
    logits = column(0.0, 0.0).requires_grad_()

    loss = dcmt(
        logits,
        column(0.0, 0.0),
        column(1.0, 0.0),
        reached=column(1.0, 0.0),
        propensity=propensity,
        row_weight=column(1.0, 1.0),
        penalty=0.0,
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped

    assert float(loss.detach()) == pytest.approx(69.3147181, abs=1e-6)
    assert propensity.grad is None
    assert logits.grad is not None


def gradient(*, is_detached: bool) -> Tensor:
    """Of two rows not reached, at z = ln 3 and -ln 3, times the number of rows."""
    logits = column(LN_3, -LN_3).requires_grad_()
    loss = nise(
        logits,
        column(0.0, 0.0),
        reached=column(0.0, 0.0),
        row_weight=column(1.0, 1.0),
        is_detached=is_detached,
    )
    (found,) = torch.autograd.grad(loss, logits)
    return found * 2


def test_t43_nise_term_has_no_gradient_if_the_target_is_detached() -> None:
    torch.testing.assert_close(gradient(is_detached=True), column(0.0, 0.0), rtol=0, atol=1e-15)


def test_t43_nise_term_pulls_to_the_ends_if_the_target_is_not_detached() -> None:
    """-z r(1-r) at r = 3/4 and 1/4: -+ ln 3 * 3/16."""
    expected = column(-0.2059898, 0.2059898)
    torch.testing.assert_close(gradient(is_detached=False), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_detached", [False, True])
def test_t43_nise_by_hand(is_detached: bool) -> None:
    """Reached and converted at r = 1/4: ln 4. Not reached: the entropy of 3/4. Then their mean."""
    loss = nise(
        column(-LN_3, LN_3),
        column(1.0, 0.0),
        reached=column(1.0, 0.0),
        row_weight=column(1.0, 1.0),
        is_detached=is_detached,
    )

    assert float(loss) == pytest.approx(0.9743148, abs=1e-6)


def test_rows_whose_label_is_not_known_do_not_count_but_stay_in_the_denominator() -> None:
    loss = nise(
        column(0.0, 5.0),
        column(1.0, 0.0),
        reached=column(1.0, 1.0),
        row_weight=column(1.0, 0.0),
        is_detached=True,
    )

    assert float(loss) == pytest.approx(0.3465736, abs=1e-6)  # ln 2 / 2


def test_t43_weight_of_the_later_loss_is_bounded_and_a_constant() -> None:
    first, later = column(0.6).requires_grad_(), column(0.2)

    weight = nise_weight(first, later, scale=2.0)

    assert float(weight) == pytest.approx(6.0)
    assert not weight.requires_grad
    assert float(nise_weight(first, column(0.0))) == 50.0
