"""What each loss estimates over all impressions: papers.md section 9, T6 to T9, T11 and T12.

A population is its outcomes, one row each, with their probabilities as row weights: the loss is
then its expectation, and no tolerance is statistical but T9's.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.objectives import OBJECTIVES, Dials, LossInput

# (p, q) of two equally likely types of impressions: papers.md 1.4.
TWO_TYPES = ((0.5, 0.2), (0.05, 0.05))
SECOND_STEP = (0.0, 1.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def second_step_loss(
    name: str,
    q_logit: Tensor,
    *,
    types: tuple[tuple[float, float], ...] = TWO_TYPES,
    propensity: tuple[float, ...] | None = None,
    masses: tuple[float, ...] = (1.0, 1.0),
    **dials: Any,
) -> Tensor:
    """The expected second term, for a CVR logit common to all rows.

    Args:
        propensity: the model's p of each type; the true one when None.
    """
    modelled = propensity or tuple(p for p, _ in types)
    rows = [
        (chance / len(types), labels, logit(p_model), logit(q))
        for (p, q), p_model in zip(types, modelled, strict=True)
        for chance, labels in (
            (1.0 - p, (0.0, 0.0)),
            (p * (1.0 - q), (1.0, 0.0)),
            (p * q, (1.0, 1.0)),
        )
    ]
    p_logits = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    weight = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    seen = LossInput(
        logits=torch.stack([p_logits, q_logit.expand(len(rows))], dim=1),
        labels=torch.tensor([row[1] for row in rows], dtype=torch.float64),
        row_weight=weight.unsqueeze(1).expand(-1, 2) * len(rows),
        imputed=torch.tensor([[row[3]] for row in rows], dtype=torch.float64),
    )
    config = ObjectiveConfig(name=name, propensity_clip=1e-6, **dials)
    return OBJECTIVES[name].loss(
        seen, Dials(step_weights=SECOND_STEP, masses=masses, config=config)
    )


def slope(loss: Callable[[Tensor], Tensor], at: float) -> float:
    z = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z), z)
    return float(gradient)


def best_probability(loss: Callable[[Tensor], Tensor]) -> float:
    """Where a convex loss of one logit is least, by bisection of its slope."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(loss, middle) < 0.0 else (low, middle)
    return 1.0 / (1.0 + math.exp(-(low + high) / 2))


@pytest.mark.parametrize("name", ["e2e", "chain", "adjacent_mean"])
def test_t06_saturated_losses_are_least_at_the_counts(name: str) -> None:
    """Twenty cells with a logit each per step: c_t = n_t / n_{t-1}, clicked-only CVR included."""
    rng = np.random.default_rng(0)
    clicks = rng.integers(4, 12, 20)
    conversions = np.array([rng.integers(1, n) for n in clicks])
    shown = clicks + rng.integers(3, 30, 20)
    cell = np.repeat(np.arange(20), shown)
    place = np.concatenate([np.arange(n) for n in shown])
    labels = torch.from_numpy(
        np.stack([place < clicks[cell], place < conversions[cell]], axis=1).astype(np.float64)
    )
    index = torch.from_numpy(cell)
    dials = Dials(step_weights=(1.0, 1.0), masses=(1.0, 0.3), config=ObjectiveConfig(name=name))
    logits = torch.zeros(20, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=150,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        seen = LossInput(logits=logits[index], labels=labels, row_weight=torch.ones_like(labels))
        loss = OBJECTIVES[name].loss(seen, dials)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        return float(loss.detach())

    optimizer.step(closure)

    expected = np.stack([clicks / shown, conversions / clicks], axis=1)
    found = torch.sigmoid(logits.detach())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", 0.186364),
        ("adjacent_mean", 0.186364),
        ("e2e", 0.187427),
        ("ipw", 0.125),
        ("dr", 0.125),
    ],
)
def test_t07_constant_cvr_of_two_types(name: str, expected: float) -> None:
    found = best_probability(lambda z: second_step_loss(name, z))

    assert found == pytest.approx(expected, abs=1e-6)


def test_t07_labels_keep_dr_right_where_propensities_are_wrong() -> None:
    """The tower knows q; ipw with the same propensities, too high for the rare type, does not."""

    def best(name: str) -> float:
        return best_probability(lambda z: second_step_loss(name, z, propensity=(0.5, 0.5)))

    assert best("dr") == pytest.approx(0.125, abs=1e-6)
    # Equal propensities: the clicked-only answer.
    assert best("ipw") == pytest.approx(0.186364, abs=1e-6)


def test_t07_errors_do_not_keep_dr_s_head_right() -> None:
    """The head's gradient is that of ipw, whatever the tower knows."""
    found = best_probability(
        lambda z: second_step_loss("dr", z, propensity=(0.5, 0.5), imputation="error")
    )

    assert found == pytest.approx(0.186364, abs=1e-6)


def test_t08_risk_bias_is_the_covariance() -> None:
    """Constant q = 0.1; Cov(p, e) / E[p] = 0.13482969."""
    z = torch.tensor(logit(0.1), dtype=torch.float64)

    naive = float(second_step_loss("adjacent_mean", z, masses=(1.0, 0.275)))
    ideal = float(second_step_loss("ipw", z))

    assert naive == pytest.approx(0.51484328, abs=5e-9)
    assert ideal == pytest.approx(0.38001359, abs=5e-9)
    assert naive - ideal == pytest.approx(0.13482969, abs=1e-8)


@pytest.mark.parametrize(
    ("modelled", "expected"), [(0.05, 0.4), (0.08, 0.25), (0.1, 0.2), (0.12, 1 / 6)]
)
def test_t11_a_wrong_ctr_leaks_into_e2e_s_cvr(modelled: float, expected: float) -> None:
    found = best_probability(
        lambda z: second_step_loss("e2e", z, types=((0.1, 0.2),), propensity=(modelled,))
    )

    assert found == pytest.approx(expected, abs=1e-6)


def test_t11_a_ctr_below_ctcvr_pins_the_cvr_at_one() -> None:
    found = best_probability(
        lambda z: second_step_loss("e2e", z, types=((0.1, 0.2),), propensity=(0.015,))
    )

    assert found > 1.0 - 1e-6


@pytest.mark.parametrize(
    ("name", "expected"), [("e2e", 0.0711111), ("chain", 0.08), ("ipw", 0.16), ("dr", 0.16)]
)
def test_t12_weight_of_a_cvr_error_at_the_truth(name: str, expected: float) -> None:
    z = torch.tensor(logit(0.2), dtype=torch.float64)

    curvature = torch.autograd.functional.hessian(
        lambda x: second_step_loss(name, x, types=((0.5, 0.2),)), z
    )

    assert float(curvature) == pytest.approx(expected, abs=1e-7)


# Ten impressions of each type, and a model whose CVR is 0.1 everywhere: R_D is T8's.
NUM_DRAWS = 2_000
RISK = 0.38001359
ERRORS = (0.54481, 0.21522)  # E[l(r, 0.1)]: 0.2 and 0.05 are the true CVRs


def drawn_losses(
    name: str, *, propensity: tuple[float, float], imputed: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """The second term of each draw of labels."""
    p, q = (np.repeat([pair[i] for pair in TWO_TYPES], 10) for i in range(2))
    rng = np.random.default_rng(0)
    clicks = rng.random((NUM_DRAWS, 20)) < p
    labels = np.stack([clicks, clicks & (rng.random((NUM_DRAWS, 20)) < q)], axis=2)
    modelled = [[logit(value), logit(0.1)] for value in propensity for _ in range(10)]
    logits = torch.tensor(modelled, dtype=torch.float64)
    tower = torch.tensor([[value] for value in imputed for _ in range(10)], dtype=torch.float64)
    config = ObjectiveConfig(name=name, imputation="error", propensity_clip=1e-6)
    dials = Dials(step_weights=SECOND_STEP, masses=(1.0, 1.0), config=config)
    ones = torch.ones(20, 2, dtype=torch.float64)
    return np.array(
        [
            float(
                OBJECTIVES[name].loss(
                    LossInput(logits=logits, labels=y, row_weight=ones, imputed=tower), dials
                )
            )
            for y in torch.from_numpy(labels.astype(np.float64))
        ]
    )


def tower_saying(*errors: float) -> tuple[float, float]:
    """Outputs whose softplus are the errors."""
    first, second = (math.log(math.expm1(error)) for error in errors)
    return first, second


EXACT, HALF = (0.5, 0.05), (0.25, 0.025)


@pytest.mark.parametrize(
    ("name", "propensity", "errors"),
    [
        ("ipw", EXACT, ERRORS),
        ("dr", EXACT, (0.3, 0.7)),
        ("dr", HALF, ERRORS),
    ],
    ids=["ipw", "dr with a wrong tower", "dr with wrong propensities"],
)
def test_t09_one_right_model_makes_the_risk_unbiased(
    name: str, propensity: tuple[float, float], errors: tuple[float, float]
) -> None:
    losses = drawn_losses(name, propensity=propensity, imputed=tower_saying(*errors))

    standard_error = losses.std() / math.sqrt(NUM_DRAWS)
    assert abs(losses.mean() - RISK) < 3 * standard_error
    assert standard_error < 0.02


@pytest.mark.parametrize(
    ("name", "errors", "bias"),
    [
        # E[(p / p_hat - 1)(e - e_hat)] with p / p_hat = 2: E[e] without a tower, then with one that
        # says 0.2 too little, then 0.2 too much.
        ("ipw", ERRORS, 0.38001359),
        ("dr", (0.34481, 0.01522), 0.2),
        ("dr", (0.74481, 0.41522), -0.2),
    ],
)
def test_t09_wrong_models_bias_as_the_formula_says(
    name: str, errors: tuple[float, float], bias: float
) -> None:
    losses = drawn_losses(name, propensity=HALF, imputed=tower_saying(*errors))

    standard_error = losses.std() / math.sqrt(NUM_DRAWS)
    assert abs(losses.mean() - RISK - bias) < 3 * standard_error
    assert np.sign(losses.mean() - RISK) == np.sign(bias)
    assert abs(bias) > 5 * standard_error
