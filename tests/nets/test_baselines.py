"""The baselines' exact limits, papers.md section 9, T39 to T41, and the sizes of all defaults."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import model
from model.contract.encode import Encoder
from model.contract.spec import Categorical, FittedSchema, load_schema
from model.golden import synthetic_requests
from model.nets import ARCHITECTURES, build_net
from model.nets.aitm import Aitm, Transfer, TransferChain
from model.nets.experts import Mmoe, Ple
from model.nets.layers import BatchedLinear, Net, NetInput, NetSpec
from model.nets.shared_bottom import SharedBottom
from model.nets.towers import CrossStitch, SingleTask, Stitch

SMALL: dict[str, Any] = {"embedding": 4, "dropout": 0.0, "head": 8}
ENCODER = Encoder(tiny.fitted_schema())
SPEC = NetSpec.of(ENCODER)
ROWS = 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, **options: Any) -> Net:
    """Moved off its start: what starts at zero would hide faults."""
    torch.manual_seed(0)
    net = build_net(name, spec=SPEC, options={**SMALL, **options})
    moved(net)
    return net.eval()


def moved(module: nn.Module) -> None:
    """Away from the start, by a seed of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def inputs() -> NetInput:
    requests = synthetic_requests(
        ENCODER, sizes=[1] * ROWS, last_time=tiny.NOON, rng=np.random.default_rng(0)
    )
    return NetInput.of(requests.encode(ENCODER))


def take_linear(batched: BatchedLinear, linear: nn.Linear) -> None:
    """A plain layer's weights for a BatchedLinear of one copy."""
    assert batched.bias is not None
    batched.weight[0].copy_(linear.weight.T)
    batched.bias[0, 0].copy_(linear.bias)


def take_columns(target: nn.Linear, source: nn.Linear) -> None:
    """The first outputs of a layer become all of another's, which has no more of them."""
    target.weight[: len(source.weight)].copy_(source.weight)
    if source.bias is not None:
        target.bias[: len(source.bias)].copy_(source.bias)


@torch.no_grad()
def test_t39_mmoe_of_one_expert_is_a_shared_bottom() -> None:
    bottom = make("shared_bottom", widths=(16, 12))
    mmoe = make("mmoe", experts=1, widths=(16, 12))
    assert isinstance(bottom, SharedBottom)
    assert isinstance(mmoe, Mmoe)
    mmoe.input.embedding.load_state_dict(bottom.input.embedding.state_dict())
    mmoe.heads.load_state_dict(bottom.heads.state_dict())
    assert mmoe.input.request is not None
    assert bottom.input.request is not None
    take_columns(mmoe.input.request, bottom.input.request)
    take_columns(mmoe.input.candidate, bottom.input.candidate)
    layer = bottom.bottom[0]
    assert isinstance(layer, nn.Linear)
    take_linear(mmoe.experts.layers[0], layer)  # type: ignore[arg-type]  # a BatchedLinear

    mixed, shared = mmoe(inputs()), bottom(inputs())

    torch.testing.assert_close(mixed.logits, shared.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.shared, shared.shared, rtol=0, atol=1e-6)
    for t in range(2):  # the experts' mixture, below the towers
        torch.testing.assert_close(mixed.representations[:, t], shared.shared, rtol=0, atol=1e-6)


def test_t39_ple_of_shared_experts_only_and_one_level_is_mmoe() -> None:
    ple = make("ple", shared_experts=3, own_experts=0, levels=1, widths=(16, 12))
    mmoe = make("mmoe", experts=3, widths=(16, 12))
    state = {k.replace("experts.0.", "experts."): v for k, v in ple.state_dict().items()}
    mmoe.load_state_dict(state)

    levelled, mixed = ple(inputs()), mmoe(inputs())

    assert torch.equal(levelled.logits, mixed.logits)
    assert torch.equal(levelled.representations, mixed.representations)
    assert torch.equal(levelled.shared, mixed.shared)


def test_t39_mmoe_by_hand() -> None:
    """sum_i softmax(W_t x)_i e_i(x), the products of both sides written out."""
    net, given = make("mmoe", experts=3, widths=(5,)), inputs()
    assert isinstance(net, Mmoe)
    x_request = torch.cat([net.input.embedding.request(given).flatten(1), given.request_dense], 1)
    x_candidate = torch.cat(
        [net.input.embedding.candidate(given).flatten(1), given.candidate_dense], 1
    )

    representations = net(given).representations

    assert net.input.request is not None
    first = net.input.request(x_request) + net.input.candidate(x_candidate)
    experts = [torch.relu(first[:, 5 * i : 5 * i + 5]) for i in range(3)]
    for t in range(2):
        odds = torch.exp(first[:, 15 + 3 * t : 18 + 3 * t])
        expected = sum(odds[:, i : i + 1] * experts[i] for i in range(3)) / odds.sum(1, True)
        torch.testing.assert_close(representations[:, t], expected, rtol=0, atol=1e-6)


def test_t39_ple_by_hand() -> None:
    """One level, two own experts per step and one shared: a gate sees three of the five."""
    net, given = make("ple", shared_experts=1, own_experts=2, levels=1, widths=(4,)), inputs()
    assert isinstance(net, Ple)
    first = net.input(given)

    representations = net(given).representations

    experts = [torch.relu(first[:, 4 * i : 4 * i + 4]) for i in range(5)]
    for t, seen in enumerate([(0, 1, 4), (2, 3, 4)]):
        weights = torch.softmax(first[:, 20 + 3 * t : 23 + 3 * t], dim=1)
        expected = sum(weights[:, j : j + 1] * experts[i] for j, i in enumerate(seen))
        torch.testing.assert_close(representations[:, t], expected, rtol=0, atol=1e-6)


def test_t39_second_level_of_ple_by_hand() -> None:
    """One own expert per step and one shared; what is for all was mixed from all three."""
    net, given = make("ple", shared_experts=1, own_experts=1, levels=2, widths=(4,)), inputs()
    assert isinstance(net, Ple)
    first = net.input(given)

    representations = net(given).representations

    experts = [torch.relu(first[:, 4 * i : 4 * i + 4]) for i in range(3)]
    below = [mixed(first[:, 12 + 2 * t : 14 + 2 * t], [experts[t], experts[2]]) for t in range(2)]
    below.append(mixed(first[:, 16:19], experts))
    layer, gates = net.experts[1].layers[0], net.step_gates[0]  # type: ignore[index]  # modules
    above = [torch.relu(one(layer, below[i], i)) for i in range(3)]
    for t in range(2):
        expected = mixed(one(gates, below[t], t), [above[t], above[2]])
        torch.testing.assert_close(representations[:, t], expected, rtol=0, atol=1e-6)


def mixed(scores: Tensor, experts: list[Tensor]) -> Tensor:
    weights = torch.softmax(scores, dim=1)
    return torch.stack([weights[:, i : i + 1] * e for i, e in enumerate(experts)]).sum(dim=0)


def one(layer: Any, values: Tensor, index: int) -> Tensor:
    """Layer `index` of a BatchedLinear, by hand."""
    return values @ layer.weight[index] + layer.bias[index]


def test_t40_transfer_of_equal_tokens_is_their_value() -> None:
    transfer = Transfer(6)
    moved(transfer)
    tokens = torch.randn(5, 6)

    given = transfer.attend(tokens, tokens)

    value = tokens @ transfer.projections.weight[:6].T + transfer.projections.bias[:6]
    torch.testing.assert_close(given, value, rtol=0, atol=1e-6)


def test_t40_transfer_by_hand() -> None:
    """k=1, h_1(u)=10u, h_2(u)=u, h_3(u)=1, tokens 0 and ln 3: weights 1/4 and 3/4."""
    transfer = Transfer(1)
    with torch.no_grad():
        transfer.projections.weight.copy_(torch.tensor([[10.0], [1.0], [0.0]]))
        transfer.projections.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))

    given = transfer.attend(torch.zeros(1, 1), torch.full((1, 1), 1.0986123))

    torch.testing.assert_close(given, torch.tensor([[8.2395922]]))


def test_t40_scores_are_scaled_by_the_root_of_the_width() -> None:
    """k=4, keys and queries 1 and 0: a score of 4 / sqrt(4), weights e^2 to 1."""
    transfer = Transfer(4)
    with torch.no_grad():
        transfer.projections.weight.copy_(torch.eye(4).repeat(3, 1))
        transfer.projections.bias.zero_()

    given = transfer.attend(torch.ones(1, 4), torch.zeros(1, 4))

    torch.testing.assert_close(given, torch.full((1, 4), 0.8807971))


def test_t40_chain_passes_on_what_it_made_and_keeps_the_first() -> None:
    chain, own = TransferChain(3, 6), torch.randn(5, 3, 6)
    moved(chain)
    first, second = chain.pairs

    made = chain(own)

    assert torch.equal(made[:, 0], own[:, 0])
    # Columns of a larger array: the last bits of a product may differ.
    torch.testing.assert_close(made[:, 1], first(own[:, 0], own[:, 1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(made[:, 2], second(made[:, 1], own[:, 2]), rtol=0, atol=1e-6)


def test_t40_each_pair_of_steps_has_weights_of_its_own() -> None:
    chain = TransferChain(4, 6)

    shapes = [tuple(p.shape) for p in chain.parameters()]

    assert shapes == [(6, 6), (6,), (18, 6), (18,)] * 3


def test_t40_aitm_s_heads_are_free_by_default_and_a_later_step_does_not_reach_back() -> None:
    net, given = make("aitm", bottom=(10,), widths=(6,)), inputs()
    assert isinstance(net, Aitm)
    before = net(given).marginal
    with torch.no_grad():
        net.towers.layers[0].weight[1] += 1.0  # type: ignore[index, operator]  # of the second step

    after = net(given).marginal

    assert before is not None
    assert after is not None
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_t40_aitm_without_a_bottom_shares_nothing_above_the_embedding() -> None:
    net = make("aitm", bottom=(), widths=(6,))

    assert net(inputs()).shared is None
    assert net.shared_width == 0


def test_t41_cross_stitch_of_identities_is_independent_towers() -> None:
    stitched = make("cross_stitch", widths=(16, 12))
    towers = make("single_task", widths=(16, 12), shares_embedding=True)
    assert isinstance(stitched, CrossStitch)
    with torch.no_grad():
        for stitch in stitched.stitches:
            stitch.mixing.copy_(torch.eye(2))  # type: ignore[operator]  # a parameter
    state = {
        name.replace("input.", "inputs.0.").replace("layers.", "towers.layers."): value
        for name, value in stitched.state_dict().items()
        if not name.startswith("stitches.")
    }
    towers.load_state_dict(state)

    assert torch.equal(stitched(inputs()).logits, towers(inputs()).logits)


def test_t41_stitch_starts_near_the_identity() -> None:
    expected = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    torch.testing.assert_close(Stitch(2).mixing, nn.Parameter(expected))

    row = Stitch(3).mixing[1]
    torch.testing.assert_close(row, torch.tensor([0.05, 0.9, 0.05]))


def test_t41_stitch_by_hand() -> None:
    stitch = Stitch(2)
    with torch.no_grad():
        stitch.mixing.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))

    given = stitch(torch.tensor([[[1.0, 3.0]], [[10.0, 20.0]]]))

    torch.testing.assert_close(given, torch.tensor([[[21.0, 43.0]], [[-10.0, -20.0]]]))


@pytest.mark.parametrize("shares_embedding", [False, True])
def test_a_single_task_does_not_move_another_s_tower(shares_embedding: bool) -> None:
    net = make("single_task", widths=(16,), shares_embedding=shares_embedding)
    assert isinstance(net, SingleTask)

    net(inputs()).logits[:, 0].sum().backward()

    for parameter in (net.heads.hidden.weight, net.heads.output.weight):
        assert parameter.grad is not None
        assert parameter.grad[0].any()
        assert not parameter.grad[1].any()
    moved_tables = [p.grad is not None and bool(p.grad.any()) for p in net.embedding_parameters()]
    assert moved_tables == ([True] if shares_embedding else [True, False])


def shipped_spec() -> NetSpec:
    """Shapes of the shipped schema; vocabularies do not matter to the dense parameters."""
    schema = load_schema(Path(model.__file__).parent / "datasets" / "complete_journey_schema.toml")
    names = [feature.name for feature in schema.features if isinstance(feature, Categorical)]
    vocabularies = dict.fromkeys(names, ("a", "b"))
    fitted = FittedSchema(schema=schema, vocabularies=vocabularies, moments={})
    return NetSpec.of(Encoder(fitted))


# The restricted model of the simulation is no rival.
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"linear_head"}))
def test_default_sizes_are_alike_on_the_shipped_schema(name: str) -> None:
    """papers.md 2.4: every baseline's dense budget within 20 %; here of 105,000."""
    net = build_net(name, spec=shipped_spec(), options={})

    tables = {id(parameter) for parameter in net.embedding_parameters()}
    dense = sum(p.numel() for p in net.parameters() if id(p) not in tables)

    assert 84_000 <= dense <= 126_000
