"""The criterion: what it refuses, dr's tower, and what it reports of the weights."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import TrainConfig
from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.errors import SpecError
from model.criterion import Criterion
from model.imputation import NUM_REMEMBERED
from model.nets import build_net
from model.nets.layers import NetOutput, NetSpec
from model.objectives import OBJECTIVES

SPEC = NetSpec(
    request_tables={"town": 5},
    candidate_tables={"brand": 5},
    request_dense=0,
    candidate_dense=0,
    histories=(),
    num_steps=2,
)
WIDTH = 6
NO_BLOCKS = Blocks(
    request=RequestBlock(
        ids=np.zeros((0, 1), np.int64),
        dense=np.zeros((0, 0), np.float32),
        history=np.zeros((0, 0), np.int64),
    ),
    candidate=CandidateBlock(ids=np.zeros((0, 1), np.int64), dense=np.zeros((0, 0), np.float32)),
    request_of=np.zeros(0, np.int64),
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(
    *, outputs: str = "conditional", rates: tuple[float, ...] = (0.1, 0.2), **objective: Any
) -> Criterion:
    """For a shared bottom, whose representations and shared part are WIDTH wide."""
    config = TrainConfig.model_validate(
        {"data": {"impressions": "x", "schema_file": "y"}, "objective": objective}
    )
    options = {"outputs": outputs, "widths": [8, WIDTH], "head": WIDTH, "embedding": 4}
    torch.manual_seed(0)
    spec = replace(SPEC, num_steps=len(rates))
    net = build_net("shared_bottom", spec=spec, options=options)
    return Criterion(config, net, step_rates=rates)


def output_of(logits: Tensor, *, representation: Tensor | None = None) -> NetOutput:
    """With the given representation, [B, WIDTH], for every step and as the shared part."""
    rows, num_steps = logits.shape
    shared = torch.ones(rows, WIDTH) if representation is None else representation
    return NetOutput(
        logits=logits,
        representations=shared.unsqueeze(1).expand(-1, num_steps, -1),
        shared=shared,
    )


def loss_of(
    criterion: Criterion,
    output: NetOutput,
    labels: Tensor,
    row_weight: Tensor | None = None,
) -> Tensor:
    loss: Tensor = criterion(
        output,
        labels,
        row_weight=torch.ones_like(labels) if row_weight is None else row_weight,
        blocks=NO_BLOCKS,
        progress=0.0,
    )
    return loss


@pytest.mark.parametrize("name", ["chain", "adjacent_mean", "ipw", "tempered", "dr"])
def test_losses_of_conditional_steps_refuse_free_heads(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}' reads conditional outputs, .* is 'marginal'"):
        make(outputs="marginal", name=name)


def test_t25_hinge_refuses_heads_that_are_ordered_already() -> None:
    with pytest.raises(SpecError, match=r"'hinge' reads marginal outputs, .* is 'conditional'"):
        make(name="hinge")


def test_an_objective_of_no_name_is_refused_with_all_that_there_are() -> None:
    known = "e2e, chain, adjacent_mean, ipw, tempered, dr, hinge"

    with pytest.raises(SpecError, match=f"no objective 'magic'; there are {known}"):
        make(name="magic")


def test_adjacent_mean_s_masses_are_products_of_the_step_rates() -> None:
    criterion = make(name="adjacent_mean", rates=(0.1, 0.2, 0.5))

    loss = loss_of(criterion, output_of(torch.zeros(1, 3)), torch.ones(1, 3))

    assert float(loss) == pytest.approx(math.log(2.0) * (1.0 + 10.0 + 50.0), rel=1e-6)


@pytest.mark.parametrize("form", ["label", "error"])
def test_dr_s_tower_cannot_bend_the_representations(form: str) -> None:
    criterion = make(name="dr", imputation=form)
    representation = torch.randn(4, WIDTH, requires_grad=True)

    loss = loss_of(
        criterion,
        output_of(torch.zeros(4, 2, requires_grad=True), representation=representation),
        torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped

    assert representation.grad is None
    assert all(p.grad is not None and p.grad.any() for p in criterion.parameters())


def test_dr_s_tower_is_trained_by_the_one_optimiser() -> None:
    criterion = make(name="dr")

    (group,) = criterion.parameter_groups()

    assert set(map(id, group["params"])) == set(map(id, criterion.parameters()))
    assert len(group["params"]) == 4
    assert (group["weight_decay"], group["rate_share"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"dr", "hinge"}))
def test_other_objectives_train_nothing_beside_the_network(name: str) -> None:
    assert make(name=name).parameter_groups() == []


def test_dr_s_tower_starts_at_the_base_rate() -> None:
    criterion = make(name="dr")

    assert criterion.imputation is not None
    bias = criterion.imputation.heads.output.bias
    assert torch.sigmoid(bias).item() == pytest.approx(0.2, abs=1e-6)


def test_dr_s_error_tower_starts_at_the_base_rate_s_entropy() -> None:
    criterion = make(name="dr", imputation="error")

    assert criterion.imputation is not None
    bias = criterion.imputation.heads.output.bias
    assert torch.nn.functional.softplus(bias).item() == pytest.approx(0.50040242, abs=1e-6)


def test_dr_s_tower_learns_the_conversion_rate_of_each_kind_of_row() -> None:
    """Two kinds of rows, q = 0.75 and 0.25; only clicked ones tell."""
    criterion = make(name="dr")
    clicked = [[1.0, 1.0]] * 3 + [[1.0, 0.0]]
    rare = [[1.0, 1.0]] + [[1.0, 0.0]] * 3
    labels = torch.tensor([*clicked, *rare, *[[0.0, 0.0]] * 8])
    kind = torch.tensor([1.0] * 4 + [-1.0] * 4 + [1.0, -1.0] * 4).unsqueeze(1)
    output = output_of(torch.zeros(16, 2), representation=kind.expand(-1, WIDTH))
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.02)

    for _ in range(200):
        optimizer.zero_grad()
        loss_of(criterion, output, labels).backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        optimizer.step()

    assert criterion.imputation is not None
    found = torch.sigmoid(criterion.imputation(output).detach())[[0, 4], 0]
    np.testing.assert_allclose(found, [0.75, 0.25], rtol=0, atol=0.01)


def test_dr_of_one_step_has_no_tower() -> None:
    criterion = make(name="dr", rates=(0.1,))

    loss = loss_of(criterion, output_of(torch.zeros(2, 1)), torch.tensor([[1.0], [0.0]]))

    assert float(loss) == pytest.approx(math.log(2.0), rel=1e-6)
    assert criterion.statistics() == {}


def clicks_at(*probabilities: float) -> Tensor:
    """Logits of rows with these P_1."""
    first = torch.logit(torch.tensor(probabilities, dtype=torch.float64)).float()
    return torch.stack([first, torch.zeros_like(first)], dim=1)


CLICKS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("name", ["ipw", "dr"])
def test_weights_are_reported(name: str) -> None:
    """Weights of the clicked rows 2, 2 and 100, the last clipped; so is the row without a click."""
    criterion = make(name=name, propensity_clip=0.01)

    loss_of(criterion, output_of(clicks_at(0.5, 0.5, 0.005, 0.001)), CLICKS)

    report = criterion.statistics()["propensity_weights"]
    assert report["training_steps"] == 1
    (step,) = report["steps"]
    assert step == {
        "step": 2,
        "clipped_share": 0.5,
        "clipped_share_reached": pytest.approx(1 / 3),
        "effective_share": pytest.approx(104**2 / (3 * (2**2 + 2**2 + 100**2)), rel=1e-5),
        "largest_weight": pytest.approx(100.0, rel=1e-5),
    }


def test_tempered_weights_are_reported_with_their_power() -> None:
    criterion = make(name="tempered", tempering=0.5, propensity_clip=0.01)

    loss_of(criterion, output_of(clicks_at(0.5, 0.5, 0.005, 0.001)), CLICKS)

    (step,) = criterion.statistics()["propensity_weights"]["steps"]
    assert step["largest_weight"] == pytest.approx(10.0, rel=1e-5)


def test_only_the_last_steps_weights_are_reported() -> None:
    criterion = make(name="ipw")

    loss_of(criterion, output_of(clicks_at(0.5, 0.5, 0.005, 0.001)), CLICKS)
    for _ in range(NUM_REMEMBERED):
        loss_of(criterion, output_of(clicks_at(0.5, 0.5, 0.5, 0.5)), CLICKS)

    report = criterion.statistics()["propensity_weights"]
    assert report["training_steps"] == NUM_REMEMBERED
    assert report["steps"][0]["largest_weight"] == pytest.approx(2.0)
    assert report["steps"][0]["effective_share"] == pytest.approx(1.0)
    assert report["steps"][0]["clipped_share"] == 0.0


def test_rows_of_unknown_labels_are_not_in_the_report() -> None:
    criterion = make(name="ipw")
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])

    loss_of(criterion, output_of(clicks_at(0.5, 0.5, 0.005, 0.001)), CLICKS, weight)

    (step,) = criterion.statistics()["propensity_weights"]["steps"]
    assert (step["clipped_share"], step["clipped_share_reached"]) == (0.0, 0.0)
    assert step["largest_weight"] == pytest.approx(2.0)


def test_a_report_without_a_click_is_json() -> None:
    criterion = make(name="ipw")

    loss_of(criterion, output_of(clicks_at(0.5, 0.5)), torch.zeros(2, 2))

    (step,) = json.loads(json.dumps(criterion.statistics()))["propensity_weights"]["steps"]
    assert step["effective_share"] is None
    assert step["largest_weight"] is None
    assert step["clipped_share"] == 0.0


def test_a_resumed_criterion_reports_the_steps_before() -> None:
    first, second = make(name="ipw"), make(name="ipw")
    loss_of(first, output_of(clicks_at(0.5, 0.5, 0.005, 0.001)), CLICKS)

    second.load_state_dict(first.state_dict())

    assert second.statistics() == first.statistics()


@pytest.mark.parametrize("name", ["e2e", "chain", "adjacent_mean"])
def test_losses_without_propensities_report_nothing(name: str) -> None:
    assert make(name=name).statistics() == {}
