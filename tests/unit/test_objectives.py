"""Golden values of papers.md section 9."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.objectives import OBJECTIVES, chain_log_probabilities, e2e

# Printed to eight decimals in papers.md.
PRINTED = 5e-9


def tensor(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def total(logits: Tensor, labels: Tensor) -> Tensor:
    """E2E with unit weights, summed over rows instead of averaged."""
    weight = torch.ones_like(labels)
    steps = [1.0] * labels.shape[1]
    return e2e(logits, labels, row_weight=weight, step_weights=steps) * len(labels)


def loss_and_gradient(
    logits: tuple[float, ...], labels: tuple[float, ...]
) -> tuple[float, list[float]]:
    z = tensor(logits).requires_grad_()
    loss = total(z, tensor(labels))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
    assert z.grad is not None
    return float(loss.detach()), z.grad[0].tolist()


def chains(num_steps: int) -> list[tuple[float, ...]]:
    """Every label row that keeps the order."""
    return [(1.0,) * k + (0.0,) * (num_steps - k) for k in range(num_steps + 1)]


def test_t01_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    labels = tensor(*chains(4))
    logits = torch.from_numpy(rng.normal(size=(5, 4))).requires_grad_()

    assert torch.autograd.gradcheck(lambda z: total(z, labels), logits, eps=1e-6, atol=1e-8)


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


def test_t02_three_steps_loss_per_step() -> None:
    z, y = tensor((0.5, -1.0, -2.0)), tensor((1.0, 1.0, 0.0))
    weight = torch.ones_like(y)

    losses = [
        float(e2e(z, y, row_weight=weight, step_weights=[float(t == s) for s in range(3)]))
        for t in range(3)
    ]

    np.testing.assert_allclose(losses, [0.47407698, 1.78733867, 0.02015697], rtol=0, atol=PRINTED)


def test_t02_three_steps_gradient() -> None:
    _, gradient = loss_and_gradient((0.5, -1.0, -2.0), (1.0, 1.0, 0.0))

    np.testing.assert_allclose(
        gradient, [-0.74739405, -0.71617313, 0.01793434], rtol=0, atol=PRINTED
    )


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


EXTREMES = [
    *itertools.product((800.0, -800.0), repeat=2),
    *itertools.product((40.0, -40.0), repeat=2),
    (20.0, -90.0),
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


def test_one_step_is_binary_cross_entropy() -> None:
    logits, labels = tensor((0.3,), (-2.0,)), tensor((1.0,), (0.0,))

    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    torch.testing.assert_close(total(logits, labels), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t13_batch_without_clicks_is_finite(name: str) -> None:
    logits = torch.zeros(8, 2, requires_grad=True)

    loss = OBJECTIVES[name](
        logits,
        torch.zeros(8, 2),
        row_weight=torch.ones(8, 2),
        step_weights=[1.0, 1.0],
    )
    loss.backward()

    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t14_mean_of_half_batches_is_the_batch(name: str) -> None:
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.normal(size=(12, 3)))
    # All clicks in the first half: a denominator that counts them would tell.
    labels = tensor(*[(1.0, 1.0, 0.0)] * 6, *[(0.0, 0.0, 0.0)] * 6)
    weight = torch.from_numpy(rng.uniform(0.5, 2.0, (12, 3)))

    def loss(rows: slice) -> float:
        return float(
            OBJECTIVES[name](
                logits[rows], labels[rows], row_weight=weight[rows], step_weights=[1.0, 2.0, 3.0]
            )
        )

    halves = (loss(slice(0, 6)) + loss(slice(6, 12))) / 2
    assert halves == pytest.approx(loss(slice(0, 12)), rel=1e-12)


def test_a_masked_step_neither_counts_nor_pulls() -> None:
    logits = tensor((0.5, -1.0), (0.5, -1.0)).requires_grad_()
    weight = tensor((1.0, 0.0), (1.0, 1.0))

    loss = e2e(logits, tensor((1.0, 1.0), (1.0, 1.0)), row_weight=weight, step_weights=[1.0, 1.0])
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped

    # Per step 0.47407698 and 1.78733867 (T2); the first row lacks the second; two rows.
    assert float(loss.detach()) == pytest.approx((2 * 0.47407698 + 1.78733867) / 2, abs=1e-8)
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0.0
    assert logits.grad[1, 1] != 0.0


def test_a_row_weight_is_so_many_equal_rows() -> None:
    logits, labels = tensor((0.5, -1.0), (2.0, 1.0)), tensor((1.0, 0.0), (0.0, 0.0))
    weighted = e2e(
        logits, labels, row_weight=tensor((3.0, 3.0), (1.0, 1.0)), step_weights=[1.0, 1.0]
    )

    repeated = total(logits[[0, 0, 0, 1]], labels[[0, 0, 0, 1]])

    assert float(weighted) * 2 == pytest.approx(float(repeated), rel=1e-12)


def test_step_weights_scale_their_terms() -> None:
    z, y = tensor((0.5, -1.0, -2.0)), tensor((1.0, 1.0, 0.0))

    loss = e2e(z, y, row_weight=torch.ones_like(y), step_weights=[1.0, 0.5, 2.0])

    assert float(loss) == pytest.approx(0.47407698 + 1.78733867 / 2 + 2 * 0.02015697, abs=1e-8)
