"""The TAFE-style network's exact limits: papers.md section 9, T17 to T24."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from model.contract.encode import Encoder
from model.contract.spec import PADDING_CODE
from model.golden import synthetic_requests
from model.nets import build_net
from model.nets.layers import NetInput, NetSpec
from model.nets.selector import PatternGate, PatternSelector, sparsemax, straight_through
from model.nets.tafe import GroupedSetAttention, Tafe

SMALL: dict[str, Any] = {
    "embedding": 4,
    "dropout": 0.0,
    "width": 8,
    "patterns": 3,
    "pattern_hidden": 16,
    "pattern": 12,
    "head": 8,
    "indicator": 4,
}
ENCODER = Encoder(tiny.fitted_schema())
SPEC = NetSpec.of(ENCODER)

each_selector = pytest.mark.parametrize("selector", ["softmax", "sparsemax", "gate", "hard"])
both_tokens = pytest.mark.parametrize("tokens", ["grouped", "fields"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(tokens: str, **options: Any) -> Tafe:
    """Moved off its start: what starts at zero would hide faults."""
    torch.manual_seed(0)
    net = build_net("tafe", spec=SPEC, options={**SMALL, "tokens": tokens, **options})
    assert isinstance(net, Tafe)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def inputs(num_rows: int = 12) -> NetInput:
    requests = synthetic_requests(
        ENCODER, sizes=[1] * num_rows, last_time=tiny.NOON, rng=np.random.default_rng(0)
    )
    return NetInput.of(requests.encode(ENCODER))


def indicators(net: Tafe) -> Tensor:
    assert isinstance(net.selector, PatternSelector | PatternGate)
    return net.selector.indicators


def linear(copy: Any, values: Tensor, index: int = 0) -> Tensor:
    """Layer `index` of a BatchedLinear, by hand."""
    return values @ copy.weight[index] + copy.bias[index]


@both_tokens
def test_t17_selector_off_gives_every_step_the_same_representation(tokens: str) -> None:
    representations = make(tokens, selector="off")(inputs()).representations

    assert torch.equal(representations[:, 0], representations[:, 1])


@both_tokens
def test_t17_selector_off_is_the_mean_of_the_patterns(tokens: str) -> None:
    net, given = make(tokens, selector="off"), inputs()

    output = net(given)

    mean = net.patterns(net.tokens(given)).mean(dim=0)
    torch.testing.assert_close(output.representations[:, 0], mean, rtol=0, atol=1e-6)
    shared = net.heads(mean.unsqueeze(1).expand(-1, 2, -1))
    torch.testing.assert_close(output.logits, shared, rtol=0, atol=1e-6)


def test_t17_selector_off_selects_all_alike_and_has_no_parameters() -> None:
    net = make("grouped", selector="off")

    torch.testing.assert_close(net.selection(inputs()), torch.full((12, 2, 3), 1 / 3))
    assert list(net.selector.parameters()) == []


@both_tokens
@pytest.mark.parametrize("selector", ["softmax", "sparsemax", "hard"])
def test_t18_one_pattern_is_always_selected(tokens: str, selector: str) -> None:
    net, given = make(tokens, patterns=1, selector=selector), inputs()
    patterns = net.patterns(net.tokens(given))

    weights = net.selection(given)

    torch.testing.assert_close(weights, torch.ones(12, 2, 1), rtol=0, atol=1e-6)
    representations = net(given).representations
    torch.testing.assert_close(representations[:, 0], patterns[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(representations[:, 1], patterns[0], rtol=1e-6, atol=0)


@both_tokens
@pytest.mark.parametrize("selector", ["softmax", "sparsemax", "hard"])
def test_t18_one_pattern_gives_the_indicators_no_gradient(tokens: str, selector: str) -> None:
    net = make(tokens, patterns=1, selector=selector)

    net(inputs()).logits.sum().backward()

    gradient = indicators(net).grad
    assert gradient is not None
    assert not gradient.any()


@both_tokens
def test_t19_zero_excitation_is_no_excitation(tokens: str) -> None:
    given, net = inputs(), make(tokens)
    assert net.excitation is not None
    with torch.no_grad():
        net.excitation.excite.weight.zero_()
    without = make(tokens, use_excitation=False)
    kept = {k: v for k, v in net.state_dict().items() if not k.startswith("excitation")}
    without.load_state_dict(kept)

    assert torch.equal(net(given).logits, without(given).logits)


def test_t19_gate_starts_at_exactly_one() -> None:
    net = build_net("tafe", spec=SPEC, options=SMALL)
    assert isinstance(net, Tafe)
    assert net.excitation is not None
    assert net.attention is not None

    gate = net.excitation(net.attention(net.tokens(inputs())))

    assert torch.equal(gate, torch.ones_like(gate))


def test_t19_gate_is_between_zero_and_two_per_row_and_token() -> None:
    net = make("fields")
    assert net.excitation is not None
    assert net.attention is not None

    gate = net.excitation(net.attention(net.tokens(inputs())))

    assert gate.shape == (3, 12, net.tokens.num_tokens, 1)
    assert (gate > 0).all()
    assert (gate < 2).all()
    assert not torch.allclose(gate[:, 0], gate[:, 1])


@both_tokens
def test_t20_all_switches_off_is_a_shared_bottom_by_hand(tokens: str) -> None:
    given = inputs()
    net = make(tokens, patterns=1, use_attention=False, selector="off")

    output = net(given)

    flat = net.tokens(given).flatten(1)
    hidden = torch.relu(linear(net.pattern_hidden, flat))
    shared = torch.relu(linear(net.pattern_output, hidden))
    logits = [
        linear(net.heads.output, torch.relu(linear(net.heads.hidden, shared, t)), t)
        for t in range(2)
    ]
    torch.testing.assert_close(output.logits, torch.cat(logits, dim=1), rtol=0, atol=1e-6)


def test_t20_field_tokens_are_linear_projections_of_each_field() -> None:
    net, given = make("fields"), inputs()
    embedding = net.tokens.embedding

    tokens = net.tokens(given)

    project = net.tokens.project
    request, candidate = embedding.request(given), embedding.candidate(given)
    dense = net.tokens.request_dense(given.request_dense)  # type: ignore[misc, operator]  # a layer
    by_hand = [
        *(project(request[:, j]) for j in range(request.shape[1])),
        project(dense),
        *(project(candidate[:, j]) for j in range(candidate.shape[1])),
        project(net.tokens.candidate_dense(given.candidate_dense)),  # type: ignore[misc, operator]  # a layer
    ]
    # 5 request ids and a history, 3 candidate ids, one token for each side's numbers.
    assert tokens.shape == (12, 11, 8)
    torch.testing.assert_close(tokens, torch.stack(by_hand, dim=1), rtol=0, atol=1e-6)


def test_t20_grouped_tokens_are_two_per_group() -> None:
    tokens = make("grouped").tokens(inputs())

    assert tokens.shape == (12, 6, 8)


def attention(
    *, heads: int = 2, num_inducing: int = 2, width: int = 8, samples_inducing: bool = False
) -> GroupedSetAttention:
    torch.manual_seed(0)
    module = GroupedSetAttention(
        3, width, heads=heads, num_inducing=num_inducing, samples_inducing=samples_inducing
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_t21_permuting_tokens_permutes_the_result() -> None:
    module, tokens = attention().double(), torch.randn(5, 7, 8, dtype=torch.float64)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])

    permuted = module(tokens[:, order])

    torch.testing.assert_close(permuted, module(tokens)[:, :, order], rtol=0, atol=1e-6)


def test_t21_one_head_one_token_one_point_by_hand() -> None:
    """With one key every softmax is 1, and attention returns the value itself."""
    module = attention(heads=1, num_inducing=1, width=3)
    x = torch.tensor([[[0.5, -1.0, 2.0]]])
    weights = {
        name: value.detach().numpy().astype(np.float64) for name, value in module.named_parameters()
    }

    result = module(x).detach().numpy()

    def layer(name: str, values: npt.NDArray[np.float64], g: int) -> npt.NDArray[np.float64]:
        out: npt.NDArray[np.float64] = values @ weights[f"{name}.weight"][g]
        return out + weights[f"{name}.bias"][g, 0]

    def norm(index: int, values: npt.NDArray[np.float64], g: int) -> npt.NDArray[np.float64]:
        normal = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
        out: npt.NDArray[np.float64] = normal * weights[f"norms.{index}.scale"][g, 0]
        return out + weights[f"norms.{index}.shift"][g, 0]

    def block(first: int, joined: npt.NDArray[np.float64], g: int) -> npt.NDArray[np.float64]:
        o = norm(first, joined, g)
        return norm(first + 1, o + np.maximum(layer(f"outputs.{first // 2}", o, g), 0.0), g)

    projected = x[0, 0].numpy() @ weights["from_tokens.weight"].T + weights["from_tokens.bias"]
    _, value, query = projected.reshape(3, 3, 3)  # key, value, query, each [G, width]
    for g in range(3):
        point = layer("inducing_query", weights["inducing"][g, 0], g)
        summary = block(0, point + value[g], g)
        second = layer("from_inducing", summary, g)[3:]
        expected = block(2, query[g] + second, g)
        np.testing.assert_allclose(result[g, 0, 0], expected, rtol=0, atol=1e-5)


def test_t21_scores_are_scaled_per_head() -> None:
    """torch's own attention scales by the width it is given, here that of one head."""
    module = attention(heads=2)
    query, key, value = torch.randn(3, 3, 4, 5, 8)  # each [G, B, F, D]

    result = module._block(0, query, key, value)

    def split(part: Tensor) -> Tensor:
        return part.unflatten(-1, (2, 4)).transpose(-2, -3)  # [G, B, heads, F, 4]

    attended = functional.scaled_dot_product_attention(split(query), split(key), split(value))
    joined = query + attended.transpose(-2, -3).flatten(-2)
    normal = module.norms[0](joined.flatten(1, 2))
    expected = module.norms[1](normal + torch.relu(module.outputs[0](normal)))
    torch.testing.assert_close(result, expected.reshape(query.shape), rtol=0, atol=1e-5)


@both_tokens
def test_t21_sample_dependent_points_of_zero_weight_are_the_plain_points(tokens: str) -> None:
    net, given = make(tokens, samples_inducing=True), inputs()
    assert net.attention is not None
    assert net.attention.shift is not None
    with torch.no_grad():
        net.attention.shift.weight.zero_()
    without = make(tokens)
    kept = {k: v for k, v in net.state_dict().items() if not k.startswith("attention.shift")}
    without.load_state_dict(kept)

    logits = net(given).logits

    torch.testing.assert_close(logits, without(given).logits, rtol=0, atol=1e-6)


def test_t21_sample_dependent_points_by_hand() -> None:
    """I + W mean_f X of each row, then the query's projection."""
    module = attention(samples_inducing=True)
    tokens = torch.randn(4, 5, 8)
    assert module.shift is not None

    points = module._points(tokens)

    assert points.shape == (3, 4, 2, 8)
    shift = module.shift(tokens[2].mean(dim=0)).reshape(3, 2, 8)  # of row 2
    expected = linear(module.inducing_query, module.inducing[1] + shift[1], 1)  # in pattern 1
    torch.testing.assert_close(points[1, 2], expected, rtol=0, atol=1e-5)


def test_t21_permuting_tokens_permutes_the_result_of_sample_dependent_points() -> None:
    module, tokens = attention(samples_inducing=True).double(), torch.randn(5, 4, 8).double()
    order = torch.tensor([2, 0, 3, 1])

    permuted = module(tokens[:, order])

    torch.testing.assert_close(permuted, module(tokens)[:, :, order], rtol=0, atol=1e-6)


def test_t21_padding_of_a_history_is_no_token() -> None:
    """The one kind of field with padding: its place among the ids changes nothing."""
    net, given = make("fields"), inputs()
    history = torch.tensor([[5, 7, PADDING_CODE, PADDING_CODE]] * 12)

    behind = net(replace(given, request_history=history)).logits
    before = net(replace(given, request_history=history.flip(1))).logits

    torch.testing.assert_close(before, behind, rtol=0, atol=1e-6)


def test_t21_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 8 is not a multiple of 3 heads"):
        GroupedSetAttention(1, 8, heads=3, num_inducing=1)


def test_t21_patterns_do_not_touch_each_other() -> None:
    module, tokens = attention(), torch.randn(4, 5, 8)
    before = module(tokens)
    with torch.no_grad():
        module.inducing[1] += 1.0

    after = module(tokens)

    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.allclose(after[1], before[1])


@both_tokens
@each_selector
def test_t22_selection_adds_up_to_one(tokens: str, selector: str) -> None:
    weights = make(tokens, selector=selector).selection(inputs())

    assert weights.shape == (12, 2, 3)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(12, 2), rtol=0, atol=1e-6)


@both_tokens
@each_selector
def test_t22_swapping_indicators_swaps_representations(tokens: str, selector: str) -> None:
    net, given = make(tokens, selector=selector), inputs()
    with torch.no_grad():
        indicators(net).mul_(3.0)  # far enough apart that the choices differ
    before = net(given).representations
    with torch.no_grad():
        indicators(net).copy_(indicators(net).flip(0))

    after = net(given).representations

    torch.testing.assert_close(after, before.flip(1), rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 0], before[:, 1])


@both_tokens
@each_selector
def test_t22_gradient_reaches_every_indicator_and_inducing_point(
    tokens: str, selector: str
) -> None:
    net = make(tokens, selector=selector)

    net(inputs()).logits.square().sum().backward()

    assert net.attention is not None
    for parameter in (indicators(net), net.attention.inducing):
        assert parameter.grad is not None
        assert parameter.grad.flatten(0, -2).abs().amax(dim=-1).min() > 0


def test_t22_selection_by_hand() -> None:
    """Two patterns of width 1, keys 1 and 3, indicators 0 and ln 3 / 2: odds 1 and 3."""
    selector = PatternSelector(2, 1, 1)
    with torch.no_grad():
        selector.key.weight.fill_(1.0)
        selector.indicators.copy_(torch.tensor([[0.0], [np.log(3.0) / 2]]))

    patterns = torch.tensor([[[1.0]], [[3.0]]])

    torch.testing.assert_close(
        selector.weights(patterns), torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    )
    torch.testing.assert_close(selector(patterns), torch.tensor([[[2.0], [2.5]]]))


def test_t22_sparsemax_by_hand() -> None:
    """z = (1, .8, .1): two stay, tau = (1.8 - 1) / 2; equal scores share; far below is left out."""
    scores = torch.tensor([[1.0, 0.8, 0.1], [0.3, 0.3, 0.3], [0.0, 5.0, 3.9], [0.2, 0.1, 0.0]])

    weights = sparsemax(scores)

    third = 1 / 3
    expected = [[0.6, 0.4, 0.0], [third] * 3, [0.0, 1.0, 0.0], [third + 0.1, third, third - 0.1]]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=1e-6)


def test_t22_sparsemax_gradient_stays_among_the_chosen() -> None:
    """On the support S the Jacobian is I - 1/|S|. At z = (1, .8, .1), of the first weight."""
    scores = torch.tensor([1.0, 0.8, 0.1], requires_grad=True)

    sparsemax(scores)[0].backward()

    torch.testing.assert_close(scores.grad, torch.tensor([0.5, -0.5, 0.0]))


def test_t22_hard_choice_is_one_pattern_with_the_gradient_of_the_soft() -> None:
    soft = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], requires_grad=True)

    chosen = straight_through(soft)
    (chosen * torch.tensor([1.0, 2.0, 3.0])).sum().backward()

    assert torch.equal(chosen, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(soft.grad, torch.tensor([[1.0, 2.0, 3.0]] * 2))  # type: ignore[arg-type]  # it is there


def test_t22_gate_by_hand() -> None:
    """Two patterns of width 1: gates sigmoid(0) of 4 and sigmoid(ln 3) of 8, then the mean."""
    gate = PatternGate(2, 1, 1)
    with torch.no_grad():
        gate.from_pattern.weight.zero_()
        gate.from_indicator.weight.fill_(1.0)
        gate.from_indicator.bias.zero_()
        gate.indicators.copy_(torch.tensor([[0.0], [np.log(3.0)]]))

    given = gate(torch.tensor([[[4.0]], [[8.0]]]))

    torch.testing.assert_close(given, torch.tensor([[[3.0], [4.5]]]))


def test_t22_gate_opens_each_element_by_itself() -> None:
    """One pattern: papers.md's sigmoid(W [u; h]) * h itself."""
    gate, patterns = PatternGate(2, 3, 2), torch.tensor([[[1.0, -2.0, 4.0]]])

    given = gate(patterns)[0, 1]

    weight = torch.cat([gate.from_indicator.weight, gate.from_pattern.weight], dim=1)
    joined = torch.cat([gate.indicators[1], patterns[0, 0]])
    expected = torch.sigmoid(weight @ joined + gate.from_indicator.bias) * patterns[0, 0]
    torch.testing.assert_close(given, expected)


@both_tokens
def test_transfer_is_applied_to_what_was_selected(tokens: str) -> None:
    net, given = make(tokens, use_transfer=True), inputs()
    assert net.transfer is not None
    selected = net.selection(given) @ net.patterns(net.tokens(given)).transpose(0, 1)

    representations = net(given).representations

    torch.testing.assert_close(representations, net.transfer(selected), rtol=0, atol=1e-5)
    assert not torch.allclose(representations[:, 1], selected[:, 1])


@both_tokens
@pytest.mark.parametrize("selector", ["softmax", "gate"])
def test_t23_selection_depends_on_the_row(tokens: str, selector: str) -> None:
    weights = make(tokens, selector=selector).selection(inputs())

    assert (weights - weights[:1]).abs().amax(dim=(1, 2))[1:].min() > 1e-5


@both_tokens
@pytest.mark.parametrize("selector", ["sparsemax", "hard"])
def test_t23_sparse_selection_is_no_constant(tokens: str, selector: str) -> None:
    """Two rows may well choose alike, all of them not."""
    weights = make(tokens, selector=selector).selection(inputs(64))

    assert (weights != weights[:1]).any()


@each_selector
def test_t24_over_fits_256_separable_rows(selector: str) -> None:
    """A toy a plane separates: click where a number is positive, conversion where two are."""
    torch.manual_seed(0)
    numbers = torch.randn(256, 2)
    numbers += 0.1 * numbers.sign()
    labels = torch.stack([numbers[:, 0] > 0, (numbers > 0).all(dim=1)], dim=1).float()
    spec = replace(SPEC, request_tables={}, request_dense=0, histories=(), candidate_dense=2)
    net = build_net("tafe", spec=spec, options={**SMALL, "selector": selector, "pattern": 24})
    given = NetInput(
        request_ids=torch.zeros(1, 0, dtype=torch.int64),
        request_dense=torch.zeros(1, 0),
        request_history=torch.zeros(1, 0, dtype=torch.int64),
        candidate_ids=torch.ones(256, len(spec.candidate_tables), dtype=torch.int64),
        candidate_dense=numbers,
        request_of=torch.zeros(256, dtype=torch.int64),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    for _ in range(200):
        c1, c2 = torch.sigmoid(net(given).logits).clamp(1e-7, 1 - 1e-7).unbind(dim=1)
        loss = functional.binary_cross_entropy(torch.stack([c1, c1 * c2], dim=1), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break

    assert float(loss.detach()) < 0.01


def test_t24_full_size_has_the_parameters_of_the_closed_formula() -> None:
    """papers.md 2.4: F=18, d=16, d_h=32, m=4, G=4, k=80, T=2: 466,722 without tables."""
    spec = NetSpec(
        request_tables={f"r{i}": 10 for i in range(8)},
        candidate_tables={f"c{i}": 10 for i in range(10)},
        request_dense=0,
        candidate_dense=0,
        histories=(),
        num_steps=2,
    )
    net = build_net(
        "tafe",
        spec=spec,
        options={
            "tokens": "fields",
            "embedding": 16,
            "width": 32,
            "heads": 2,
            "inducing": 4,
            "patterns": 4,
            "pattern_hidden": 160,
            "pattern": 80,
            "head": 40,
            "indicator": 32,
        },
    )

    tables = {id(parameter) for parameter in net.embedding_parameters()}
    dense = sum(p.numel() for p in net.parameters() if id(p) not in tables)
    assert dense == 466_722
