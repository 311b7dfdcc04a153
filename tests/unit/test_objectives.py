"""Golden values of papers.md section 9."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.config import ObjectiveConfig
from model.objectives import (
    OBJECTIVES,
    Dials,
    LossInput,
    chain_log_probabilities,
    hinge,
    imputation_loss,
)

# Printed to eight decimals in papers.md.
PRINTED = 5e-9


def tensor(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def evaluated(
    name: str,
    logits: Tensor,
    labels: Tensor,
    *,
    row_weight: Tensor | None = None,
    step_weights: tuple[float, ...] = (),
    imputed: Tensor | None = None,
    masses: tuple[float, ...] = (),
    **dials: Any,
) -> Tensor:
    """A loss by name; `hinge` reads the logits as those of free heads, dr's tower says 0."""
    num_steps = labels.shape[1]
    is_marginal = name == "hinge"
    if imputed is None:
        imputed = torch.zeros(len(labels), num_steps - 1, dtype=labels.dtype)
    return OBJECTIVES[name].loss(
        LossInput(
            logits=logits,
            labels=labels,
            row_weight=torch.ones_like(labels) if row_weight is None else row_weight,
            marginal=logits if is_marginal else None,
            imputed=imputed,
        ),
        Dials(
            step_weights=step_weights or (1.0,) * num_steps,
            masses=masses or (1.0,) * num_steps,
            config=ObjectiveConfig(name=name, **dials),
        ),
    )


def total(logits: Tensor, labels: Tensor, name: str = "e2e") -> Tensor:
    """With unit weights, summed over rows instead of averaged."""
    return evaluated(name, logits, labels) * len(labels)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def loss_and_gradient(
    logits: tuple[float, ...], labels: tuple[float, ...], name: str = "e2e"
) -> tuple[float, list[float]]:
    z = tensor(logits).requires_grad_()
    loss = total(z, tensor(labels), name)
    return float(loss.detach()), gradient_of(loss, z)[0].tolist()


def chains(num_steps: int) -> list[tuple[float, ...]]:
    """Every label row that keeps the order."""
    return [(1.0,) * k + (0.0,) * (num_steps - k) for k in range(num_steps + 1)]


@pytest.mark.parametrize("name", ["e2e", "chain", "adjacent_mean", "hinge"])
def test_t01_gradient_is_that_of_finite_differences(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = tensor(*chains(4))
    logits = torch.from_numpy(rng.normal(size=(5, 4))).requires_grad_()

    assert torch.autograd.gradcheck(lambda z: total(z, labels, name), logits, eps=1e-6, atol=1e-8)


def test_t01_gradient_of_chain_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    for labels, z in itertools.product(chains(4), rng.normal(size=(5, 4))):
        _, gradient = loss_and_gradient(tuple(z), labels, "chain")

        before = (1.0, *labels[:-1])
        expected = [
            b * (1 / (1 + np.exp(-x)) - y) for b, x, y in zip(before, z, labels, strict=True)
        ]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "power"), [("ipw", 1.0), ("tempered", 0.5)])
def test_t01_gradient_of_weighted_losses_is_the_closed_form(name: str, power: float) -> None:
    rng = np.random.default_rng(1)
    for labels, z in itertools.product(chains(4), rng.normal(size=(5, 4))):
        _, gradient = loss_and_gradient(tuple(z), labels, name)

        c = 1 / (1 + np.exp(-z))
        reached = np.concatenate([[1.0], np.cumprod(c)[:-1]])
        before = (1.0, *labels[:-1])
        expected = before * np.maximum(reached, 0.01) ** -power * (c - labels)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8)


def test_t01_gradient_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    for labels, z in itertools.product(chains(4), rng.normal(size=(5, 4))):
        _, gradient = loss_and_gradient(tuple(z), labels)

        c = 1 / (1 + np.exp(-z))
        cumulative = np.cumprod(c)
        expected = [
            sum((cumulative[t] - labels[t]) * (1 - c[s]) / (1 - cumulative[t]) for t in range(s, 4))
            for s in range(4)
        ]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8)


def test_t02_three_steps_log_probabilities() -> None:
    reached, stopped = chain_log_probabilities(tensor((0.5, -1.0, -2.0)))

    np.testing.assert_allclose(
        reached[0], [-0.47407698, -1.78733867, -3.91426668], rtol=0, atol=PRINTED
    )
    np.testing.assert_allclose(
        stopped[0], [-0.97407698, -0.18320807, -0.02015697], rtol=0, atol=PRINTED
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e2e", [0.47407698, 1.78733867, 0.02015697]),
        ("chain", [0.47407698, 1.31326169, 0.12692801]),
    ],
)
def test_t02_three_steps_loss_per_step(name: str, expected: list[float]) -> None:
    z, y = tensor((0.5, -1.0, -2.0)), tensor((1.0, 1.0, 0.0))

    losses = [
        float(evaluated(name, z, y, step_weights=tuple(float(t == s) for s in range(3))))
        for t in range(3)
    ]

    np.testing.assert_allclose(losses, expected, rtol=0, atol=PRINTED)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e2e", [-0.74739405, -0.71617313, 0.01793434]),
        ("chain", [-0.37754067, -0.73105858, 0.11920292]),
    ],
)
def test_t02_three_steps_gradient(name: str, expected: list[float]) -> None:
    _, gradient = loss_and_gradient((0.5, -1.0, -2.0), (1.0, 1.0, 0.0), name)

    np.testing.assert_allclose(gradient, expected, rtol=0, atol=PRINTED)


def test_t02_chain_is_the_likelihood_of_the_path() -> None:
    loss, _ = loss_and_gradient((0.5, -1.0, -2.0), (1.0, 1.0, 0.0), "chain")

    assert loss == pytest.approx(1.91426668, abs=PRINTED)


@pytest.mark.parametrize(
    ("labels", "loss", "gradient"),
    [
        ((0.0, 0.0), 0.04944073, [0.04823912, 0.00083838]),
        ((1.0, 0.0), 3.04944073, [-0.95176088, 0.00083838]),
        ((1.0, 1.0), 10.11532463, [-1.90514825, -0.98201379]),
    ],
)
def test_t03_two_steps(labels: tuple[float, ...], loss: float, gradient: list[float]) -> None:
    found = loss_and_gradient((-3.0, -4.0), labels)

    np.testing.assert_allclose(found[0], loss, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(found[1], gradient, rtol=0, atol=PRINTED)


@pytest.mark.parametrize(
    ("labels", "loss"),
    [((0.0, 0.0), 0.04858735), ((1.0, 0.0), 3.06673728), ((1.0, 1.0), 7.06673728)],
)
def test_t03_two_steps_of_chain(labels: tuple[float, ...], loss: float) -> None:
    found, _ = loss_and_gradient((-3.0, -4.0), labels, "chain")

    assert found == pytest.approx(loss, abs=PRINTED)


EXTREMES = [
    *itertools.product((800.0, -800.0), repeat=2),
    *itertools.product((40.0, -40.0), repeat=2),
    (20.0, -90.0),
    (-40.0, 40.0),
]


@pytest.mark.parametrize("logits", EXTREMES)
@pytest.mark.parametrize("labels", chains(2))
def test_t04_extreme_logits_are_finite_and_gradients_bounded(
    logits: tuple[float, ...], labels: tuple[float, ...]
) -> None:
    loss, gradient = loss_and_gradient(logits, labels)

    assert math.isfinite(loss)
    # One step's term moves a logit by at most 1; there are two terms.
    assert max(map(abs, gradient)) <= 2.0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_t04_every_loss_of_extreme_logits_is_finite_and_wide(name: str, dtype: torch.dtype) -> None:
    rows = [(z, y) for z in EXTREMES for y in chains(2)]
    logits = torch.tensor([z for z, _ in rows], dtype=dtype).requires_grad_()
    labels = torch.tensor([y for _, y in rows])

    loss = evaluated(name, logits, labels)

    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_of(loss, logits)).all()


def test_t04_certain_chain_keeps_its_complement() -> None:
    _, stopped = chain_log_probabilities(tensor((800.0, 800.0)))

    np.testing.assert_allclose(stopped[0], [-800.0, -799.30685], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t04_narrow_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    for reached in chain_log_probabilities(torch.tensor(EXTREMES, dtype=dtype)):
        assert reached.dtype == torch.float32
        assert torch.isfinite(reached).all()


def test_t05_cumulative_probabilities_never_rise() -> None:
    logits = torch.from_numpy(
        np.random.default_rng(2).normal(0.0, 20.0, (200_000, 5)).astype(np.float32)
    )

    reached, _ = chain_log_probabilities(logits)

    assert (reached[:, 1:] <= reached[:, :-1]).all()
    served = reached.exp()
    assert (served[:, 1:] <= served[:, :-1]).all()


def test_probability_and_complement_add_to_one() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(100, 3)))

    reached, stopped = chain_log_probabilities(logits)

    torch.testing.assert_close(reached.exp() + stopped.exp(), torch.ones(100, 3).double())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t06_one_step_is_binary_cross_entropy(name: str) -> None:
    logits, labels = tensor((0.3,), (-2.0,)), tensor((1.0,), (0.0,))

    # log(1 + e^-0.3) and log(1 + e^-2)
    assert float(total(logits, labels, name)) == pytest.approx(0.55435524 + 0.12692801, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t13_batch_without_clicks_is_finite(name: str) -> None:
    logits = torch.zeros(8, 2, requires_grad=True)

    loss = evaluated(name, logits, torch.zeros(8, 2))

    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_of(loss, logits)).all()


@pytest.mark.parametrize("name", ["chain", "adjacent_mean", "ipw", "tempered"])
def test_t13_batch_without_clicks_leaves_the_second_head_alone(name: str) -> None:
    logits = torch.zeros(8, 2, requires_grad=True)

    gradient = gradient_of(evaluated(name, logits, torch.zeros(8, 2)), logits)

    assert (gradient[:, 1] == 0.0).all()
    assert (gradient[:, 0] != 0.0).all()


def test_t13_batch_without_clicks_does_not_train_the_tower() -> None:
    seen = LossInput(
        logits=torch.zeros(8, 2),
        labels=torch.zeros(8, 2),
        row_weight=torch.ones(8, 2),
        imputed=torch.zeros(8, 1),
    )
    dials = Dials(step_weights=(1.0, 1.0), masses=(1.0, 0.1), config=ObjectiveConfig(name="dr"))

    assert float(imputation_loss(seen, dials)) == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t14_mean_of_half_batches_is_the_batch(name: str) -> None:
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.normal(size=(12, 3)))
    # All clicks in the first half: a denominator that counts them would tell.
    labels = tensor(*[(1.0, 1.0, 0.0)] * 6, *[(0.0, 0.0, 0.0)] * 6)
    weight = torch.from_numpy(rng.uniform(0.5, 2.0, (12, 3)))

    def loss(rows: slice) -> float:
        return float(
            evaluated(
                name,
                logits[rows],
                labels[rows],
                row_weight=weight[rows],
                step_weights=(1.0, 2.0, 3.0),
                masses=(1.0, 0.5, 0.25),
                e2e_weight=1.0,
            )
        )

    halves = (loss(slice(0, 6)) + loss(slice(6, 12))) / 2
    assert halves == pytest.approx(loss(slice(0, 12)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "dials"),
    [
        ("ipw", {}),
        ("tempered", {}),
        ("dr", {"imputation": "label"}),
        ("dr", {"imputation": "error"}),
    ],
)
def test_t15_the_second_step_s_term_does_not_move_the_first(
    name: str, dials: dict[str, Any]
) -> None:
    logits = tensor((0.5, -1.0), (-2.0, 0.3)).requires_grad_()

    loss = evaluated(name, logits, tensor((1.0, 1.0), (1.0, 0.0)), step_weights=(0.0, 1.0), **dials)
    gradient = gradient_of(loss, logits)

    assert (gradient[:, 0] == 0.0).all()
    assert (gradient[:, 1] != 0.0).all()


@pytest.mark.parametrize("form", ["label", "error"])
def test_t15_the_tower_s_loss_moves_neither_head(form: Any) -> None:
    logits = tensor((0.5, -1.0), (-2.0, 0.3)).requires_grad_()
    imputed = tensor((0.1,), (0.2,)).requires_grad_()
    seen = LossInput(
        logits=logits,
        labels=tensor((1.0, 1.0), (1.0, 0.0)),
        row_weight=torch.ones(2, 2),
        imputed=imputed,
    )
    config = ObjectiveConfig(name="dr", imputation=form)

    loss = imputation_loss(seen, Dials(step_weights=(1.0, 1.0), masses=(1.0, 1.0), config=config))

    found = torch.autograd.grad(loss, [logits, imputed], allow_unused=True)
    assert found[0] is None
    assert (found[1] != 0.0).all()


def test_the_head_s_loss_does_not_move_the_tower() -> None:
    imputed = tensor((0.1,), (0.2,)).requires_grad_()
    logits = tensor((0.5, -1.0), (-2.0, 0.3)).requires_grad_()

    loss = evaluated("dr", logits, tensor((1.0, 1.0), (0.0, 0.0)), imputed=imputed)

    assert torch.autograd.grad(loss, imputed, allow_unused=True) == (None,)


def test_adjacent_mean_divides_by_the_data_set_s_masses() -> None:
    z, y = tensor((0.5, -1.0, -2.0)), tensor((1.0, 1.0, 0.0))

    loss = evaluated("adjacent_mean", z, y, masses=(1.0, 0.5, 0.125))

    # T2's chain terms.
    assert float(loss) == pytest.approx(
        0.47407698 + 1.31326169 / 0.5 + 0.12692801 / 0.125, abs=1e-7
    )


def test_ipw_divides_by_the_probability_of_the_step_before() -> None:
    loss, _ = loss_and_gradient((0.5, -1.0, -2.0), (1.0, 1.0, 0.0), "ipw")

    # T2's chain terms; P_1 = exp(-0.47407698) = 0.62245933, P_2 = exp(-1.78733867) = 0.16740512.
    assert loss == pytest.approx(
        0.47407698 + 1.31326169 / 0.62245933 + 0.12692801 / 0.16740512, abs=1e-6
    )


def test_clip_bounds_the_weight() -> None:
    # P_1 = 1.2e-4; the second term is log 2.
    z, y = tensor((-9.0, 0.0)), tensor((1.0, 1.0))

    loss = evaluated("ipw", z, y, step_weights=(0.0, 1.0), propensity_clip=0.05)

    assert float(loss) == pytest.approx(20 * 0.69314718, abs=1e-6)


@pytest.mark.parametrize(("tempering", "same"), [(0.0, "chain"), (1.0, "ipw")])
def test_tempered_is_chain_at_0_and_ipw_at_1(tempering: float, same: str) -> None:
    rng = np.random.default_rng(5)
    labels = tensor(*chains(3))
    logits = torch.from_numpy(rng.normal(size=(4, 3)))

    loss = evaluated("tempered", logits, labels, tempering=tempering)

    assert float(loss) == float(evaluated(same, logits, labels))


@pytest.mark.parametrize("name", ["ipw", "tempered", "dr"])
def test_added_e2e_leaves_the_first_step_s_term_single(name: str) -> None:
    """ESCM2: l(y_1, p) + l(y_2, pq) + the weighted CVR loss."""
    z, y = tensor((-3.0, -4.0)), tensor((1.0, 0.0))

    added = float(evaluated(name, z, y, e2e_weight=1.0) - evaluated(name, z, y))

    # T3: both e2e terms are 3.04944073, the first log(1 + e^3) = 3.04858735.
    assert added == pytest.approx(3.04944073 - 3.04858735, abs=1e-8)


def test_dr_with_errors_pulls_the_head_as_ipw_does() -> None:
    rng = np.random.default_rng(6)
    labels = tensor(*chains(3))
    logits = torch.from_numpy(rng.normal(size=(4, 3))).requires_grad_()
    imputed = torch.from_numpy(rng.normal(size=(4, 2)))

    robust = evaluated("dr", logits, labels, imputed=imputed, imputation="error")
    inverse = evaluated("ipw", logits, labels)

    torch.testing.assert_close(
        gradient_of(robust, logits), gradient_of(inverse, logits), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("labels", "pull"),
    [
        # q - r, then the clicked rows' (r - y) / p on top: q = 0.5, r = 0.25, p = 0.5.
        ((0.0, 0.0), 0.25),
        ((1.0, 0.0), 0.25 + 0.5),
        ((1.0, 1.0), 0.25 - 1.5),
    ],
)
def test_dr_with_labels_pulls_the_head_of_every_row(labels: tuple[float, ...], pull: float) -> None:
    logits = tensor((0.0, 0.0)).requires_grad_()

    loss = evaluated("dr", logits, tensor(labels), imputed=tensor((-math.log(3.0),)))

    assert gradient_of(loss, logits)[0, 1].item() == pytest.approx(pull, abs=1e-12)


@pytest.mark.parametrize(
    ("form", "imputed", "expected"),
    [
        # Clicked, not converted, p = 0.5: twice the cross-entropy of r = 0.25, log(4 / 3).
        ("label", -math.log(3.0), 2 * 0.28768207),
        # l(0, c = 0.5) = log 2; softplus(0) = log 2 says so already, softplus(log 3) = log 4.
        ("error", 0.0, 0.0),
        ("error", math.log(3.0), 2 * 0.69314718**2),
    ],
)
def test_the_tower_is_trained_on_clicked_rows_over_their_propensity(
    form: Any, imputed: float, expected: float
) -> None:
    seen = LossInput(
        logits=tensor((0.0, 0.0)),
        labels=tensor((1.0, 0.0)),
        row_weight=torch.ones(1, 2),
        imputed=tensor((imputed,)),
    )
    config = ObjectiveConfig(name="dr", imputation=form)
    dials = Dials(step_weights=(1.0, 1.0), masses=(1.0, 0.5), config=config)

    assert float(imputation_loss(seen, dials)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_step_neither_counts_nor_pulls(name: str) -> None:
    """Rows 0 and 1 differ only in what is not known yet: step 2, and so step 3's space."""
    logits = tensor(*[(0.5, -1.0, -2.0)] * 2, (0.1, 0.2, 0.3)).requires_grad_()
    weight = tensor((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    labels = tensor((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 0.0))

    def loss(rows: list[int]) -> Tensor:
        return evaluated(name, logits[rows], labels[rows], row_weight=weight[rows])

    assert float(loss([0, 2]).detach()) == float(loss([1, 2]).detach())
    gradient = gradient_of(loss([0, 1, 2]), logits)
    assert (gradient[:2, 1:] == 0.0).all()
    assert (gradient[2] != 0.0).all()


@pytest.mark.parametrize("name", ["chain", "adjacent_mean", "ipw", "tempered", "dr"])
def test_a_step_after_an_unknown_one_does_not_count(name: str) -> None:
    """Whether the row is in the third step's space is not known, whatever its own weight says."""
    logits = tensor((0.5, -1.0, -2.0)).requires_grad_()
    labels, weight = tensor((1.0, 1.0, 1.0)), tensor((1.0, 0.0, 1.0))

    gradient = gradient_of(evaluated(name, logits, labels, row_weight=weight), logits)

    assert (gradient[0, 1:] == 0.0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_weight_is_so_many_equal_rows(name: str) -> None:
    logits, labels = tensor((0.5, -1.0), (2.0, 1.0)), tensor((1.0, 0.0), (0.0, 0.0))
    weight = tensor((3.0, 3.0), (1.0, 1.0))

    weighted = evaluated(name, logits, labels, row_weight=weight)

    repeated = total(logits[[0, 0, 0, 1]], labels[[0, 0, 0, 1]], name)
    assert float(weighted) * 2 == pytest.approx(float(repeated), rel=1e-12)


def test_step_weights_scale_their_terms() -> None:
    z, y = tensor((0.5, -1.0, -2.0)), tensor((1.0, 1.0, 0.0))

    loss = evaluated("e2e", z, y, step_weights=(1.0, 0.5, 2.0))

    assert float(loss) == pytest.approx(0.47407698 + 1.78733867 / 2 + 2 * 0.02015697, abs=1e-8)


def hinge_penalty(*probabilities: tuple[float, float], weight: float = 1.0) -> float:
    """Of free heads at these probabilities: the loss with the penalty less that without."""
    marginal = torch.logit(tensor(*probabilities))
    labels = torch.zeros_like(marginal)
    losses = [float(evaluated("hinge", marginal, labels, hinge_weight=w)) for w in (weight, 0.0)]
    return losses[0] - losses[1]


def test_t25_hinge_is_zero_where_the_order_holds() -> None:
    assert hinge_penalty((0.4, 0.4), (0.3, 0.1)) == pytest.approx(0.0, abs=1e-12)


def test_t25_hinge_is_the_mean_over_rows_not_the_sum() -> None:
    excesses = ((0.2, 0.5), (0.3, 0.1), (0.1, 0.2), (0.4, 0.4))

    assert hinge_penalty(*excesses) == pytest.approx((0.3 + 0.1) / 4, abs=1e-12)
    assert hinge_penalty(*excesses, weight=0.6) == pytest.approx(0.6 * 0.1, abs=1e-12)


def test_t25_hinge_pulls_neighbours_together() -> None:
    marginal = tensor((0.0, 1.0)).requires_grad_()
    labels = torch.zeros(1, 2, dtype=torch.float64)

    pulls = [
        gradient_of(evaluated("hinge", marginal, labels, hinge_weight=w), marginal)
        for w in (1.0, 0.0)
    ]

    # d(P_2 - P_1): -P_1 (1 - P_1) = -0.25 and P_2 (1 - P_2) = 0.19661193.
    np.testing.assert_allclose((pulls[0] - pulls[1])[0], [-0.25, 0.19661193], rtol=0, atol=1e-8)


def free_heads() -> LossInput:
    return LossInput(
        logits=tensor((9.0, 9.0), (9.0, 9.0)),  # not read
        labels=tensor((1.0, 0.0), (0.0, 0.0)),
        row_weight=torch.ones(2, 2, dtype=torch.float64),
        marginal=tensor((0.3, 1.0), (-2.0, 0.0)),
    )


# log(1 + e^-0.3), log(1 + e), log(1 + e^-2), log 2: mean over two rows of the sum over steps.
BCE_SUM = (0.55435524 + 1.31326169 + 0.12692801 + 0.69314718) / 2


def test_t40_aitm_without_its_penalty_is_the_sum_of_cross_entropies() -> None:
    config = ObjectiveConfig(name="hinge", hinge_weight=0.0)
    dials = Dials(step_weights=(1.0, 1.0), masses=(1.0, 0.5), config=config)

    assert float(hinge(free_heads(), dials)) == pytest.approx(BCE_SUM, abs=1e-8)


def test_t40_e2e_of_free_heads_is_the_sum_of_cross_entropies() -> None:
    dials = Dials(step_weights=(1.0, 1.0), masses=(1.0, 0.5))

    loss = OBJECTIVES["e2e"].loss(free_heads(), dials)

    assert float(loss) == pytest.approx(BCE_SUM, abs=1e-8)


def test_t38_esmm_is_e2e_of_two_steps() -> None:
    """A hand-written ESMM with the same weights: BCE(p) + BCE(pq)."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 2).double()
    features = torch.randn(64, 6, dtype=torch.float64)
    clicks = torch.rand(64) < 0.5
    labels = torch.stack([clicks, clicks & (torch.rand(64) < 0.5)], dim=1).double()

    ours = evaluated("e2e", net(features), labels)
    p, q = torch.sigmoid(net(features)).unbind(dim=1)
    esmm = functional.binary_cross_entropy(p, labels[:, 0]) + functional.binary_cross_entropy(
        p * q, labels[:, 1]
    )

    torch.testing.assert_close(ours, esmm, rtol=0, atol=1e-7)
    for one, other in zip(
        torch.autograd.grad(ours, list(net.parameters())),
        torch.autograd.grad(esmm, list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
