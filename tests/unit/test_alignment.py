"""The alignment term: papers.md section 9, T26 to T37, and what stands around it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from model.alignment import (
    WINDOW,
    Alignment,
    feature_classes,
    info_nce,
    prior_penalty,
    robust_loss,
    warm_up,
)
from model.calibrate import Calibrator
from model.config import AlignmentConfig, TrainConfig, load_config
from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.encode import Encoder
from model.contract.errors import SpecError
from model.criterion import Criterion
from model.export import ScoringGraph, to_onnx
from model.golden import synthetic_requests
from model.nets import build_net
from model.nets.layers import Net, NetInput, NetOutput, NetSpec

ENCODER = Encoder(tiny.fitted_schema())
SPEC = NetSpec.of(ENCODER)
SMALL: dict[str, dict[str, Any]] = {
    "shared_bottom": {"embedding": 4, "dropout": 0.0, "widths": (24, 16), "head": 8},
    "tafe": {
        "embedding": 4,
        "dropout": 0.0,
        "width": 8,
        "pattern_hidden": 16,
        "pattern": 12,
        "head": 8,
        "indicator": 4,
    },
}
LEARNED = ("prior", "robust", "naive")
BINDING = {"weight": 1.0, "warm_up_share": 0.0}

each_net = pytest.mark.parametrize("architecture", SMALL)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_net(architecture: str, *, num_steps: int = 2, **options: Any) -> Net:
    torch.manual_seed(0)
    spec = replace(SPEC, num_steps=num_steps)
    return build_net(architecture, spec=spec, options={**SMALL[architecture], **options})


def make(net: Net, *, num_steps: int = 2, is_moved: bool = False, **settings: Any) -> Alignment:
    """An alignment of full weight; `is_moved` leaves the start, where every tau is tau_0."""
    torch.manual_seed(1)
    config = AlignmentConfig.model_validate({**BINDING, "mode": "prior", **settings})
    alignment = Alignment(config, net, num_steps=num_steps)
    if is_moved:
        with torch.no_grad():
            for parameter in alignment.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return alignment


def make_blocks(sizes: list[int], seed: int = 0) -> Blocks:
    requests = synthetic_requests(
        ENCODER, sizes=sizes, last_time=tiny.NOON, rng=np.random.default_rng(seed)
    )
    return requests.encode(ENCODER)


def distinct_blocks(num_rows: int) -> Blocks:
    """One request, and candidates that differ in their last number."""
    blocks = make_blocks([num_rows])
    blocks.candidate.dense[:, -1] = np.arange(num_rows)
    return blocks


def take(blocks: Blocks, rows: list[int]) -> Blocks:
    """Those impressions; the request block stays as it is."""
    return Blocks(
        request=blocks.request,
        candidate=CandidateBlock(
            ids=blocks.candidate.ids[rows], dense=blocks.candidate.dense[rows]
        ),
        request_of=blocks.request_of[rows],
    )


def make_output(
    representations: Tensor, *, shared_width: int = 16, shared: Tensor | None = None
) -> NetOutput:
    """An output of [B, T, K] representations, as if of the small shared bottom."""
    rows, num_steps = representations.shape[:2]
    return NetOutput(
        logits=torch.zeros(rows, num_steps),
        representations=representations,
        shared=torch.randn(rows, shared_width) if shared is None else shared,
    )


def others(num_rows: int) -> Tensor:
    return ~torch.eye(num_rows, dtype=torch.bool)


def rotated(first: tuple[float, ...]) -> Tensor:
    """Each row is the first, turned so that its first entry stands on the diagonal."""
    return torch.stack(
        [torch.roll(torch.tensor(first, dtype=torch.float64), shift) for shift in range(len(first))]
    )


def value(scalar: Tensor) -> float:
    return float(scalar.detach())


def least(slope: Any, *, low: float, high: float) -> float:
    """Where an increasing slope crosses 0 in [low, high], else the bound it points to."""
    if slope(low) >= 0 or slope(high) <= 0:
        return low if slope(low) >= 0 else high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 0.5 * (low + high)


def slope_of(loss: Any) -> Any:
    """The derivative by tau of the first row's loss, float64."""

    def slope(temperature: float) -> float:
        given = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(given)[0], given)
        return float(gradient)

    return slope


def gradients(term: Tensor, net: Net) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    term.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
    return {
        name: parameter.grad.clone()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


# The losses


def test_t26_a_fixed_temperature_is_plain_info_nce() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(12)
    alignment = make(net, mode="fixed", temperature=0.3, prior_weight=7.0, projection=0)
    torch.manual_seed(3)
    representations = torch.randn(12, 2, 8)

    term = alignment(make_output(representations), blocks, progress=0.5)

    u, v = (functional.normalize(representations[:, t], dim=1) for t in (0, 1))
    target = torch.arange(12)
    plain = functional.cross_entropy(u @ v.T / 0.3, target)
    plain = (plain + functional.cross_entropy(v @ u.T / 0.3, target)) / 2
    assert value(term) == pytest.approx(value(plain) / math.log(12), abs=1e-6)


@pytest.mark.parametrize("mode", ["prior", "naive"])
def test_t26_an_untrained_network_is_the_fixed_temperature(mode: str) -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(12)
    torch.manual_seed(3)
    output = make_output(torch.randn(12, 2, 8))

    term = make(net, mode=mode)(output, blocks, progress=0.5)

    fixed = make(net, mode="fixed")(output, blocks, progress=0.5)
    assert value(term) == pytest.approx(value(fixed), abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "losses"),
    [((0.1, 0.5), (3.35406e-4, 0.59813887)), ((0.1, 0.1), (3.35406e-4, 0.31326169))],
)
def test_t27_golden_losses(temperature: tuple[float, float], losses: tuple[float, float]) -> None:
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.3]])

    found = info_nce(similarity, torch.tensor(temperature), others(2))

    torch.testing.assert_close(found, torch.tensor(losses), rtol=0, atol=1e-7)


def test_t27_golden_gradient_by_the_temperature() -> None:
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    temperature = torch.tensor([0.1, 0.5], requires_grad=True)

    info_nce(similarity, temperature, others(2)).sum().backward()

    assert temperature.grad is not None
    torch.testing.assert_close(
        temperature.grad, torch.tensor([0.02682801, 0.1800664]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_t28_equal_similarities_lose_log_b(temperature: float) -> None:
    losses = info_nce(torch.full((8, 8), 0.4), torch.full((8,), temperature), others(8))

    torch.testing.assert_close(losses, torch.full((8,), 2.0794415), rtol=0, atol=1e-6)


def test_t28_an_infinite_temperature_loses_log_b() -> None:
    torch.manual_seed(0)

    losses = info_nce(torch.rand(8, 8), torch.full((8,), 1e7), others(8))

    torch.testing.assert_close(losses, torch.full((8,), 2.0794415), rtol=0, atol=1e-6)


def test_t28_perfect_alignment_at_no_temperature_loses_nothing() -> None:
    losses = info_nce(torch.eye(8), torch.full((8,), 0.01), others(8))

    assert torch.equal(losses, torch.zeros(8))


def test_t29_gradients_are_the_closed_forms() -> None:
    """(pi_ij - 1[i=j]) / tau_i and (s_ii - sum_j pi_ij s_ij) / tau_i^2."""
    rng = np.random.default_rng(0)
    values, temperatures = rng.uniform(-1, 1, (5, 5)), rng.uniform(0.1, 1, 5)
    similarity = torch.tensor(values, requires_grad=True)
    temperature = torch.tensor(temperatures, requires_grad=True)

    info_nce(similarity, temperature, others(5)).sum().backward()

    weights = np.exp(values / temperatures[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    by_similarity = (weights - np.eye(5)) / temperatures[:, None]
    by_temperature = (np.diag(values) - (weights * values).sum(axis=1)) / temperatures**2
    assert similarity.grad is not None
    assert temperature.grad is not None
    np.testing.assert_allclose(similarity.grad.numpy(), by_similarity, rtol=0, atol=1e-12)
    np.testing.assert_allclose(temperature.grad.numpy(), by_temperature, rtol=0, atol=1e-12)


def test_t29_gradients_are_the_finite_differences() -> None:
    rng = np.random.default_rng(1)
    similarity = torch.tensor(rng.uniform(-1, 1, (4, 4)), requires_grad=True)
    temperature = torch.tensor(rng.uniform(0.2, 1, 4), requires_grad=True)
    negatives = others(4)
    negatives[0, 2] = False

    assert torch.autograd.gradcheck(
        lambda s, t: info_nce(s, t, negatives), (similarity, temperature)
    )
    assert torch.autograd.gradcheck(
        lambda s, t: robust_loss(s, t, negatives, rho=torch.full((4,), 0.4)),
        (similarity, temperature),
    )


@pytest.mark.parametrize(
    ("row", "best"),
    [
        ((0.9, 0.1, 0.2, 0.0), 0.05),
        ((0.3, 0.5, 0.0, -0.2), 0.44298),
        ((-0.2, 0.5, 0.3, 0.1), 1.0),
    ],
)
def test_t30_regimes_of_the_naive_temperature(row: tuple[float, ...], best: float) -> None:
    slope = slope_of(lambda tau: info_nce(rotated(row), tau.expand(4), others(4)))

    assert least(slope, low=0.05, high=1.0) == pytest.approx(best, abs=1e-5)


def fit_temperatures(**settings: Any) -> Tensor:
    """Temperatures after training the network on rows that are aligned and apart."""
    net, blocks = make_net("shared_bottom", head=16), distinct_blocks(16)
    alignment = make(net, projection=0, **settings)
    output = make_output(torch.eye(16).unsqueeze(1).repeat(1, 2, 1))
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.05)
    num_steps = 300
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / num_steps)
        optimizer.zero_grad()
        alignment(output, blocks, progress=0.5).backward()
        optimizer.step()
    return alignment.temperatures(output).detach()


def test_t31_a_strong_prior_holds_the_temperature() -> None:
    temperatures = fit_temperatures(prior_weight=1e6)

    assert float((temperatures - 0.2).abs().max()) < 1e-3


@pytest.mark.parametrize("settings", [{"prior_weight": 0.0}, {"mode": "naive"}])
def test_t31_without_a_prior_the_temperature_collapses(settings: dict[str, Any]) -> None:
    """Documents why the naive training is not the default."""
    temperatures = fit_temperatures(**settings)

    assert float((temperatures <= 1.01 * 0.05).double().mean()) > 0.9


def test_t31_the_default_prior_keeps_the_temperature_inside() -> None:
    temperatures = fit_temperatures(prior_weight=0.1)

    assert 1.01 * 0.05 < float(temperatures.min()) < float(temperatures.max()) < 0.2


def test_t32_robust_optimum_has_divergence_rho() -> None:
    row = (0.2, 0.6, 0.1, -0.4, 0.3)
    rho = 0.5
    slope = slope_of(
        lambda tau: robust_loss(
            rotated(row), tau.expand(5), others(5), rho=torch.full((5,), rho, dtype=torch.float64)
        )
    )

    best = least(slope, low=1e-3, high=100.0)

    weights = np.exp(np.array(row[1:]) / best)
    weights /= weights.sum()
    divergence = float((weights * np.log(4 * weights)).sum())
    assert divergence == pytest.approx(rho, abs=1e-6)
    assert 0.01 < best < 10.0


@pytest.mark.parametrize(
    "settings",
    [
        {"robust_share": 1.0},
        {"mode": "robust", "negatives": "one"},
        {"mode": "robust", "rows": 2},
        {"temperature": 0.05},
        {"temperature": 1.0},
        {"min_temperature": 2.0, "max_temperature": 1.0},
        {"updates_embedding": False},
    ],
)
def test_t32_configurations_without_an_optimum_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AlignmentConfig.model_validate(settings)


def test_t32_a_rho_of_log_n_is_a_fault_of_the_configuration(tmp_path: Any) -> None:
    path = tmp_path / "train.toml"
    path.write_text('[data]\nimpressions = "x"\nschema_file = "y"\n')

    with pytest.raises(SpecError, match="robust_share"):
        load_config(path, overrides=["alignment.robust_share=1.0"])


# The term and its gradients


def task_config(architecture: str, **alignment: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "data": {"impressions": "x", "schema_file": "y"},
            "net": {"architecture": architecture},
            "alignment": alignment,
        }
    )


def one_step(architecture: str, **alignment: Any) -> tuple[Tensor, dict[str, Tensor], Criterion]:
    """Logits and gradients of the network after one loss, with the criterion."""
    net, blocks = make_net(architecture, dropout=0.1).train(), make_blocks([4, 4, 4])
    criterion = Criterion(task_config(architecture, **alignment), net, step_rates=(0.2, 0.1))
    torch.manual_seed(5)
    output = net(NetInput.of(blocks))
    labels = (torch.arange(24).reshape(12, 2) % 3 == 0).float()
    loss = criterion(output, labels, row_weight=torch.ones(12, 2), blocks=blocks, progress=0.5)
    return output.logits.detach(), gradients(loss, net), criterion


@each_net
@pytest.mark.parametrize("mode", ["fixed", *LEARNED])
def test_t33_weight_zero_is_the_base_model_to_the_bit(architecture: str, mode: str) -> None:
    base_logits, base_gradients, _ = one_step(architecture)

    logits, found, criterion = one_step(architecture, mode=mode, weight=0.0)

    assert torch.equal(logits, base_logits)
    assert found.keys() == base_gradients.keys()
    assert all(torch.equal(found[name], base_gradients[name]) for name in found)
    given = [p.grad for group in criterion.parameter_groups() for p in group["params"]]
    assert given
    assert all(gradient is None or not gradient.any() for gradient in given)


@each_net
def test_alignment_moves_both_architectures(architecture: str) -> None:
    """Also the shared bottom: its representations are the towers' hidden layers."""
    net, blocks = make_net(architecture), make_blocks([4, 4, 4])
    alignment = make(net)

    found = gradients(alignment(net(NetInput.of(blocks)), blocks, progress=0.5), net)

    moved = {name for name, gradient in found.items() if gradient.any()}
    assert {name for name in found if name.endswith("embedding.table.weight")} <= moved
    assert ("heads.hidden.weight" in moved) == (architecture == "shared_bottom")
    assert len(moved) > 5
    assert not any(name.startswith("heads.output") for name in moved)


@pytest.mark.parametrize("mode", LEARNED)
def test_t34_the_temperature_gives_the_encoder_no_gradient(mode: str) -> None:
    net, blocks = make_net("tafe"), make_blocks([4, 4, 4])
    alignment = make(net, mode=mode, is_moved=True)

    temperatures = alignment.temperatures(net(NetInput.of(blocks)))

    assert value(temperatures.std()) > 1e-3
    found = torch.autograd.grad(temperatures.sum(), list(net.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


@pytest.mark.parametrize("mode", LEARNED)
def test_t34_the_encoder_sees_the_temperatures_as_constants(mode: str) -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(10)
    alignment = make(net, mode=mode, is_moved=True, projection=0)
    torch.manual_seed(3)
    representations = torch.randn(10, 2, 8, requires_grad=True)
    output = make_output(representations)

    (found,) = torch.autograd.grad(alignment(output, blocks, progress=0.5), representations)

    constants = alignment.temperatures(output)[0].detach()
    u, v = (functional.normalize(representations[:, t], dim=1) for t in (0, 1))
    both = [info_nce(s, constants, others(10)).mean() for s in (u @ v.T, v @ u.T)]
    (expected,) = torch.autograd.grad((both[0] + both[1]) / 2 / math.log(10), representations)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_robust_network_is_trained_by_the_robust_loss_alone() -> None:
    """One-hot rows: the negatives are all alike, so dJ/dtau is rho = 0.5 log 7 at any tau."""
    net, blocks = make_net("shared_bottom"), distinct_blocks(8)
    alignment = make(net, mode="robust", robust_share=0.5, projection=0)
    output = make_output(torch.eye(8).unsqueeze(1).repeat(1, 2, 1))

    alignment(output, blocks, progress=0.5).backward()

    assert alignment.relatedness is not None
    gradient = alignment.relatedness.output.bias.grad
    assert gradient is not None
    # dtau/dx = -0.95 r (1 - r) at r = 0.8 / 0.95.
    assert float(gradient) == pytest.approx(0.972955 * -0.95 * 0.8421053 * 0.1578947, abs=1e-5)


# Which rows are contrasted


def test_t35_identical_rows_are_not_each_others_negatives() -> None:
    """Two orthogonal rows and a copy of the first: as if the copy were not there for the first."""
    net = make_net("shared_bottom")
    blocks = take(distinct_blocks(2), [0, 1, 0])
    representations = torch.eye(2)[[0, 1, 0]].unsqueeze(1).repeat(1, 2, 1)
    alignment = make(net, mode="fixed", temperature=0.5, projection=0)

    term = alignment(make_output(representations), blocks, progress=0.5)

    # Rows 0 and 2 have one negative, row 1 two; s/tau is 2 for the positive, 0 for negatives.
    one = math.log1p(math.exp(-2)) / math.log(2)
    two = math.log1p(2 * math.exp(-2)) / math.log(3)
    assert value(term) == pytest.approx((2 * one + two) / 3, abs=1e-6)


def test_t35_only_rows_of_all_equal_features_are_duplicates() -> None:
    blocks = take(distinct_blocks(3), [0, 1, 0, 2])
    assert feature_classes(blocks, 4).tolist() == [0, 1, 0, 2]

    other_item = take(blocks, [0, 0])
    other_item.candidate.ids[1, 0] += 1

    assert feature_classes(other_item, 2).tolist() == [0, 1]


def test_t35_equal_requests_of_two_ids_are_duplicates() -> None:
    blocks = distinct_blocks(1)
    twice = Blocks(
        request=RequestBlock(
            ids=blocks.request.ids[[0, 0]],
            dense=blocks.request.dense[[0, 0]],
            history=blocks.request.history[[0, 0]],
        ),
        candidate=CandidateBlock(
            ids=blocks.candidate.ids[[0, 0]], dense=blocks.candidate.dense[[0, 0]]
        ),
        request_of=np.array([0, 1], np.int64),
    )
    assert feature_classes(twice, 2).tolist() == [0, 0]

    twice.request.history[1, 0] += 1

    assert feature_classes(twice, 2).tolist() == [0, 1]


def test_t35_negative_zero_is_zero() -> None:
    blocks = take(distinct_blocks(1), [0, 0])
    blocks.candidate.dense[:, 0] = (0.0, -0.0)

    assert feature_classes(blocks, 2).tolist() == [0, 0]


@pytest.mark.parametrize("rows", [[0], [0, 0, 0]])
@pytest.mark.parametrize(
    ("mode", "negatives"),
    [*((mode, "batch") for mode in ("fixed", *LEARNED)), ("fixed", "one"), ("prior", "one")],
)
def test_t35_rows_without_negatives_give_no_loss_and_no_nan(
    mode: str, negatives: str, rows: list[int]
) -> None:
    net, blocks = make_net("tafe"), take(distinct_blocks(1), rows)
    alignment = make(net, mode=mode, negatives=negatives, prior_weight=0.0)

    term = alignment(net(NetInput.of(blocks)), blocks, progress=0.5)

    assert value(term) == 0.0
    assert all(not gradient.any() for gradient in gradients(term, net).values())


def test_t35_one_negative_is_the_logistic_loss() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.3, 0.2, -0.4], [0.0, 0.6, 0.7]])
    negatives = torch.tensor([[False, False, True], [True, False, False], [False, True, False]])

    losses = info_nce(similarity, torch.tensor([0.1, 0.2, 0.5]), negatives)

    # log(1 + e^-4), log(1 + e^0.5), log(1 + e^-0.2)
    expected = torch.tensor([0.01814993, 0.97407698, 0.59813887])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)


def test_one_random_negative_is_drawn_among_other_rows_by_the_seed() -> None:
    net, blocks = make_net("shared_bottom"), take(distinct_blocks(6), [0, 1, 2, 3, 4, 5, 0])
    alignment = make(net, negatives="one")

    torch.manual_seed(0)
    first = [alignment._negatives(blocks, 7, torch.device("cpu")) for _ in range(50)]
    torch.manual_seed(0)
    again = [alignment._negatives(blocks, 7, torch.device("cpu")) for _ in range(50)]

    drawn = torch.stack(first)
    assert torch.equal(drawn, torch.stack(again))
    assert torch.equal(drawn.sum(dim=2), torch.ones(50, 7, dtype=torch.int64))
    expected = others(7)
    expected[0, 6] = expected[6, 0] = False
    assert torch.equal(drawn.any(dim=0), expected)


def test_only_the_first_rows_of_a_large_batch_are_contrasted() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(12)
    output = net(NetInput.of(blocks))
    first = NetOutput(
        logits=output.logits[:5],
        representations=output.representations[:5],
        shared=output.shared[:5] if output.shared is not None else None,
    )

    term = make(net, rows=5)(output, blocks, progress=0.5)

    alone = make(net, rows=64)(first, take(blocks, [0, 1, 2, 3, 4]), progress=0.5)
    assert torch.equal(term, alone)


@pytest.mark.parametrize("mode", ["fixed", *LEARNED])
def test_t36_the_order_of_rows_does_not_matter(mode: str) -> None:
    net, blocks = make_net("tafe"), take(distinct_blocks(9), [0, 1, 2, 3, 4, 5, 6, 7, 8, 3])
    alignment = make(net, mode=mode, is_moved=True)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    permuted = take(blocks, order)

    one, other = (
        alignment(net(NetInput.of(given)), given, progress=0.5) for given in (blocks, permuted)
    )

    assert value(one) == pytest.approx(value(other), abs=1e-6)


@pytest.mark.parametrize("mode", ["fixed", *LEARNED])
def test_t36_half_precision_inputs_are_contrasted_in_float32(mode: str) -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(8)
    alignment = make(net, mode=mode, is_moved=True)
    torch.manual_seed(3)
    representations, shared = torch.randn(8, 2, 8).bfloat16(), torch.randn(8, 16).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = alignment(make_output(representations, shared=shared), blocks, progress=0.5)

    wide = make_output(representations.float(), shared=shared.float())
    assert term.dtype == torch.float32
    assert torch.equal(term, alignment(wide, blocks, progress=0.5))


@pytest.mark.parametrize("push", [-1e4, 1e4])
def test_t36_the_temperature_never_leaves_its_range(push: float) -> None:
    net = make_net("shared_bottom")
    alignment = make(net, min_temperature=0.07, max_temperature=0.9)
    assert alignment.relatedness is not None
    with torch.no_grad():
        alignment.relatedness.output.bias.fill_(push)

    temperatures = alignment.temperatures(make_output(torch.randn(4, 2, 8)))

    expected = torch.full((1, 4), 0.07 if push > 0 else 0.9)
    torch.testing.assert_close(temperatures, expected, rtol=0, atol=1e-6)
    assert bool((temperatures >= torch.tensor(0.07)).all())


# Pairs, directions, the start


@pytest.mark.parametrize("temperature", [0.06, 0.2, 0.9])
def test_the_temperature_starts_at_tau_0(temperature: float) -> None:
    alignment = make(make_net("tafe"), temperature=temperature)
    blocks = make_blocks([3, 2])

    temperatures = alignment.temperatures(make_net("tafe")(NetInput.of(blocks)))

    expected = torch.full((1, 5), temperature)
    torch.testing.assert_close(temperatures, expected, rtol=0, atol=1e-7)


def test_three_steps_align_neighbours_and_average() -> None:
    net, blocks = make_net("shared_bottom", num_steps=3), distinct_blocks(6)
    alignment = make(net, num_steps=3, mode="fixed", projection=0)
    torch.manual_seed(3)
    representations = torch.randn(6, 3, 8)

    term = alignment(make_output(representations), blocks, progress=0.5)

    pairs = make(net, mode="fixed", projection=0)
    first, second = (
        pairs(make_output(representations[:, part]), blocks, progress=0.5)
        for part in (slice(0, 2), slice(1, 3))
    )
    assert value(term) == pytest.approx(value(first + second) / 2, abs=1e-6)


def test_pairs_share_one_network_and_differ_by_their_embedding() -> None:
    net = make_net("shared_bottom", num_steps=3)
    alignment = make(net, num_steps=3, is_moved=True)
    same = make_output(torch.ones(4, 3, 8), shared=torch.ones(4, 16))

    temperatures = alignment.temperatures(same)

    assert temperatures.shape == (2, 4)
    assert value((temperatures[0] - temperatures[1]).abs().min()) > 1e-4


def test_one_way_teaches_the_later_step_only() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(6)
    representations = torch.randn(6, 2, 8, requires_grad=True)

    make(net, is_symmetric=False)(make_output(representations), blocks, progress=0.5).backward()

    assert representations.grad is not None
    assert not representations.grad[:, 0].any()
    assert representations.grad[:, 1].any()


@pytest.mark.parametrize(
    ("progress", "share", "expected"),
    [(0.0, 0.1, 0.0), (0.05, 0.1, 0.5), (0.1, 0.1, 1.0), (0.9, 0.1, 1.0), (0.0, 0.0, 1.0)],
)
def test_the_weight_rises_linearly(progress: float, share: float, expected: float) -> None:
    assert warm_up(progress, share=share) == pytest.approx(expected)


def test_the_term_is_scaled_by_weight_and_warm_up() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(6)
    output = net(NetInput.of(blocks))
    full = make(net)(output, blocks, progress=0.02)

    part = make(net, weight=0.5, warm_up_share=0.08)(output, blocks, progress=0.02)

    assert value(part) == pytest.approx(0.125 * value(full), rel=1e-6)


def test_prior_is_the_mean_square_of_log_ratios() -> None:
    temperature = torch.tensor([0.2 * math.e, 0.2, 0.2 / math.e, 0.2])

    assert float(prior_penalty(temperature, center=0.2)) == pytest.approx(0.5, abs=1e-6)


# What cannot be aligned


def test_networks_without_a_shared_part_are_refused() -> None:
    net = make_net("shared_bottom")
    net.shared_width = 0

    with pytest.raises(SpecError, match="single-task towers share nothing to align"):
        make(net)


def test_a_single_step_is_refused() -> None:
    with pytest.raises(SpecError, match="no neighbour"):
        make(make_net("shared_bottom", num_steps=1), num_steps=1)


def test_equal_representations_are_refused() -> None:
    with pytest.raises(SpecError, match="same representation"):
        make(make_net("tafe", selector="off"))


@each_net
@pytest.mark.parametrize("num_steps", [2, 3])
def test_widths_are_those_of_the_output(architecture: str, num_steps: int) -> None:
    net, blocks = make_net(architecture, num_steps=num_steps), make_blocks([3])

    output = net(NetInput.of(blocks))

    assert output.representations.shape == (3, num_steps, net.representation_width)
    assert output.shared is not None
    assert output.shared.shape == (3, net.shared_width)


# What is told and what is served


def test_parameter_groups_hold_every_parameter_once_with_its_rate() -> None:
    alignment = make(make_net("tafe"), network_rate_share=0.3)

    groups = alignment.parameter_groups()

    assert [group["rate_share"] for group in groups] == [1.0, 0.3]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in alignment.parameters())


def test_nothing_is_trained_beside_plain_cosines() -> None:
    assert make(make_net("tafe"), mode="fixed", projection=0).parameter_groups() == []


def test_statistics_before_the_first_step_are_empty() -> None:
    assert make(make_net("tafe")).statistics() == {}


def test_statistics_at_the_start() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(4)
    alignment = make(net, projection=0)
    aligned = torch.eye(4).unsqueeze(1).repeat(1, 2, 2)
    aligned[:, 1] *= 3.0

    alignment(make_output(aligned), blocks, progress=0.5)

    # Loss: log(1 + 3 e^-5) / log 4.
    assert alignment.statistics() == pytest.approx(
        {
            "steps": 1,
            "temperature_mean": 0.2,
            "temperature_std": 0.0,
            "temperature_min": 0.2,
            "temperature_max": 0.2,
            "log_temperature_std": 0.0,
            "at_bound_share": 0.0,
            "projected_cosine": 1.0,
            "representation_cosine": 1.0,
            "loss": 0.0144352,
        },
        abs=1e-6,
    )


def test_statistics_are_of_the_last_steps() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(2)
    alignment = make(net)
    assert alignment.relatedness is not None
    output = make_output(torch.randn(2, 2, 8))
    with torch.no_grad():
        for bias, num_steps in ((-100.0, 7), (100.0, WINDOW - 1), (0.0, 1)):
            alignment.relatedness.output.bias.fill_(bias)
            for _ in range(num_steps):
                alignment(output, blocks, progress=0.5)

    found = alignment.statistics()

    assert found["steps"] == WINDOW == 100
    assert found["temperature_min"] == pytest.approx(0.05)
    assert found["temperature_max"] == pytest.approx(0.525)
    assert found["temperature_mean"] == pytest.approx(0.05475)
    assert found["at_bound_share"] == pytest.approx(0.99)


def test_statistics_are_saved_with_the_parameters() -> None:
    net, blocks = make_net("shared_bottom"), distinct_blocks(4)
    alignment, restored = make(net), make(net)
    alignment(make_output(torch.randn(4, 2, 8)), blocks, progress=0.5)

    restored.load_state_dict(alignment.state_dict())

    assert restored.statistics() == alignment.statistics() != {}


def test_t37_nothing_of_it_is_in_the_graph() -> None:
    net, blocks = make_net("shared_bottom"), make_blocks([2, 3])
    criterion = Criterion(
        task_config("shared_bottom", mode="prior", projection=7, hidden=5),
        net,
        step_rates=(0.2, 0.1),
    )
    criterion(
        net(NetInput.of(blocks)),
        torch.zeros(5, 2),
        row_weight=torch.ones(5, 2),
        blocks=blocks,
        progress=0.5,
    ).backward()

    names = ENCODER.schema.output_names
    graph = ScoringGraph(net, [Calibrator(), Calibrator()]).eval()
    model = onnx.load_model_from_string(to_onnx(graph, blocks=blocks, outputs=names)).graph

    assert {entry.name for entry in model.input} == set(blocks.feeds())
    assert [entry.name for entry in model.output] == ["pctr", "pctcvr", "pcvr"]
    assert not any("alignment" in entry.name for entry in model.initializer)
    sizes = {math.prod(entry.dims) for entry in model.initializer if entry.data_type == 1}
    own = {parameter.numel() for parameter in criterion.parameters()}
    # 2 projections 8 -> 7 and the network 32 -> 5 -> 1.
    assert own == {56, 7, 160, 5, 1}
    assert sizes.isdisjoint(own - {1})
