"""T10: objectives on the simulation of papers.md 1.7, each minimised exactly on full batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.datasets.simulate import Simulation, draw_blocks
from model.objectives import OBJECTIVES, Dials, LossInput

NUM_ROWS = 200_000
RESTRICTED, WELL_SPECIFIED = ("x1", "x2"), ("x1", "x2", "x1_squared")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A simulated log; click: [N, 1], the fitted click logit, which is well specified."""

    frame: pl.DataFrame
    labels: Tensor
    click: Tensor
    p: Tensor
    q: Tensor


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sample() -> Sample:
    frame = pl.concat(draw_blocks(Simulation(rows=NUM_ROWS, seed=1)))
    labels = columns(frame, "click", "conversion")
    x1 = with_constant(columns(frame, "x1"))
    coefficients = minimum(lambda b: loss("chain", x1 @ b, labels[:, :1]), x1.shape[1])
    p, q = columns(frame, "true_p_click", "true_p_conversion").T
    return Sample(frame=frame, labels=labels, click=x1 @ coefficients, p=p, q=q)


def columns(frame: pl.DataFrame, *names: str) -> Tensor:
    return torch.from_numpy(frame.select(names).to_numpy().astype(np.float64))


def with_constant(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], dim=1)


def loss(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    num_steps = labels.shape[1]
    # dr's tower at its start: the base rate of clicked rows, which is wrong nearly everywhere.
    imputed = torch.full_like(labels[:, 1:], -2.5)
    seen = LossInput(
        logits=logits, labels=labels, row_weight=torch.ones_like(labels), imputed=imputed
    )
    masses = (1.0, float(labels[:, 0].mean()))[:num_steps]
    dials = Dials(step_weights=(1.0,) * num_steps, masses=masses, config=ObjectiveConfig(name=name))
    return OBJECTIVES[name].loss(seen, dials)


def minimum(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """[size, 1], by L-BFGS from zero."""
    coefficients = torch.zeros(size, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=40, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(coefficients)
        value.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        return value.detach()

    optimizer.step(closure)
    return coefficients.detach()


def fitted_conversion(sample: Sample, objective: str, features: tuple[str, ...]) -> Tensor:
    """[N], the q of a linear head on some features, minimised through the objective's loss."""
    given = with_constant(columns(sample.frame, *features))
    coefficients = minimum(
        lambda b: loss(objective, torch.cat([sample.click, given @ b], dim=1), sample.labels),
        given.shape[1],
    )
    return torch.sigmoid(given @ coefficients)[:, 0]


# papers.md 1.7: 1.261 +- 0.032 clicked-only (chain), 1.279 +- 0.034 E2E, 0.995 +- 0.027 IPW.
@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [("chain", 1.15, 1.40), ("e2e", 1.15, 1.40), ("ipw", 0.92, 1.07), ("dr", 0.92, 1.07)],
)
def test_t10_restricted_head_is_calibrated_on_all_impressions_only_by_ipw_and_dr(
    sample: Sample, objective: str, low: float, high: float
) -> None:
    found = fitted_conversion(sample, objective, RESTRICTED)

    assert low < float(found.mean() / sample.q.mean()) < high


# papers.md 1.7: 0.992 E2E, 0.994 clicked-only, 1.111 IPW.
@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [("chain", 0.94, 1.05), ("e2e", 0.94, 1.05), ("ipw", 1.05, 1.18)],
)
def test_t10_ipw_pays_for_it_in_the_calibration_of_ctcvr(
    sample: Sample, objective: str, low: float, high: float
) -> None:
    found = fitted_conversion(sample, objective, RESTRICTED)

    assert low < float((sample.p @ found) / (sample.p @ sample.q)) < high


@pytest.mark.parametrize("objective", ["chain", "e2e", "ipw", "dr"])
def test_t10_well_specified_head_is_calibrated_by_all(sample: Sample, objective: str) -> None:
    found = fitted_conversion(sample, objective, WELL_SPECIFIED)

    assert 0.92 < float(found.mean() / sample.q.mean()) < 1.07
    # papers.md 1.7: 0.0030 to 0.0036; the restricted heads have 0.032 and more.
    assert float((found - sample.q).square().mean().sqrt()) < 0.01
