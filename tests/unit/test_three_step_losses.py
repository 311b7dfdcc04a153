"""Chains of three steps: every objective and alignment reaches every step of every architecture."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from model.config import TrainConfig
from model.contract.blocks import Blocks
from model.contract.encode import Encoder
from model.criterion import Criterion
from model.golden import synthetic_requests
from model.nets import ARCHITECTURES, build_net
from model.nets.layers import Net, NetInput, NetOutput, NetSpec
from model.objectives import OBJECTIVES

ENCODER = Encoder(tiny.fitted_schema())
SPEC = replace(NetSpec.of(ENCODER), num_steps=3)
RATES = (0.3, 0.4, 0.2)
ROWS = 16
# Each length of chain in turn.
LABELS = torch.tensor(
    [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]] * (ROWS // 4), dtype=torch.float32
)
ALIGNED = ("shared_bottom", "mmoe", "ple", "aitm", "tafe")
CASES = [
    (architecture, objective, outputs)
    for architecture in sorted(ARCHITECTURES)
    for objective, entry in OBJECTIVES.items()
    for outputs in entry.outputs
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_blocks() -> Blocks:
    requests = synthetic_requests(
        ENCODER, sizes=[4] * (ROWS // 4), last_time=tiny.NOON, rng=np.random.default_rng(0)
    )
    return requests.encode(ENCODER)


def make(architecture: str, *, outputs: str, **sections: Any) -> tuple[Net, Criterion]:
    """Moved off its start, where weights at zero would let nothing through."""
    torch.manual_seed(0)
    options = {"embedding": 4, "dropout": 0.0, "outputs": outputs}
    net = build_net(architecture, spec=SPEC, options=options)
    net.set_base_rates(RATES)
    config = TrainConfig.model_validate(
        {"data": {"impressions": "x", "schema_file": "y"}, **sections}
    )
    move(net)  # before the criterion's own draws: the same network whatever they are
    criterion = Criterion(config, net, step_rates=RATES)
    move(criterion)
    return net, criterion


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def loss_of(criterion: Criterion, output: NetOutput, blocks: Blocks) -> Tensor:
    loss: Tensor = criterion(
        output, LABELS, row_weight=torch.ones_like(LABELS), blocks=blocks, progress=0.5
    )
    return loss


@pytest.mark.parametrize(("architecture", "objective", "outputs"), CASES)
def test_every_objective_moves_every_step(architecture: str, objective: str, outputs: str) -> None:
    net, criterion = make(architecture, outputs=outputs, objective={"name": objective})
    blocks = make_blocks()
    output = net(NetInput.of(blocks))
    heads = output.logits if output.marginal is None else output.marginal

    (gradient,) = torch.autograd.grad(loss_of(criterion, output, blocks), heads)

    assert gradient.shape == (ROWS, 3)
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(dim=0) > 1e-4).all()


def test_every_architecture_with_every_objective_is_a_case() -> None:
    """e2e reads both sorts of outputs, the others one each."""
    assert len(CASES) == 8 * (7 + 1) == len(ARCHITECTURES) * (len(OBJECTIVES) + 1)


@pytest.mark.parametrize("form", ["label", "error"])
def test_tower_of_dr_learns_of_both_later_steps(form: str) -> None:
    net, criterion = make(
        "tafe", outputs="conditional", objective={"name": "dr", "imputation": form}
    )
    blocks = make_blocks()

    loss_of(criterion, net(NetInput.of(blocks)), blocks).backward()

    assert criterion.imputation is not None
    gradient = criterion.imputation.heads.output.weight.grad
    assert gradient is not None
    assert len(gradient) == 2
    assert gradient.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("mode", ["fixed", "prior", "robust", "naive"])
@pytest.mark.parametrize("architecture", ALIGNED)
def test_alignment_moves_every_step_s_representation(architecture: str, mode: str) -> None:
    """Of the whole loss, less that without alignment."""
    gradients = []
    for alignment in ("off", mode):
        net, criterion = make(
            architecture,
            outputs="conditional",
            alignment={"mode": alignment, "weight": 1.0},
        )
        blocks = make_blocks()
        output = net(NetInput.of(blocks))
        (gradient,) = torch.autograd.grad(
            loss_of(criterion, output, blocks), output.representations
        )
        gradients.append(gradient)
    of_alignment = gradients[1] - gradients[0]

    assert torch.isfinite(of_alignment).all()
    assert (of_alignment.abs().sum(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("outputs", ["conditional", "marginal"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_three_steps_are_ordered(architecture: str, outputs: str) -> None:
    """Free heads too, which `logits` make conditional ones of."""
    net, _ = make(architecture, outputs=outputs)

    with torch.no_grad():
        logits = net.eval()(NetInput.of(make_blocks())).logits
    cumulative = torch.cumprod(torch.sigmoid(logits), dim=1)

    assert logits.shape == (ROWS, 3)
    assert (cumulative[:, 1:] <= cumulative[:, :-1]).all()
    assert (cumulative > 0).all()
