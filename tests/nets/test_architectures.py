"""A matrix: every architecture, every check. A new architecture joins by its entry in CASES."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.encode import Encoder
from model.contract.errors import SpecError
from model.contract.spec import PADDING_CODE, UNKNOWN_CODE
from model.golden import synthetic_requests
from model.nets import ARCHITECTURES, build_net
from model.nets.layers import FieldEmbedding, Net, NetInput, NetOutput, NetSpec

SMALL = {"embedding": 4, "dropout": 0.0}
SMALL_TAFE = {**SMALL, "width": 8, "pattern_hidden": 16, "pattern": 12, "head": 8, "indicator": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_bottom": ("shared_bottom", {**SMALL, "widths": (32, 16), "head": 8}),
    "single_task": ("single_task", {**SMALL, "widths": (32, 16), "head": 8}),
    "single_task on one embedding": (
        "single_task",
        {**SMALL, "widths": (32,), "head": 8, "shares_embedding": True},
    ),
    "cross_stitch": ("cross_stitch", {**SMALL, "widths": (32, 16), "head": 8}),
    "mmoe": ("mmoe", {**SMALL, "experts": 3, "widths": (16, 12), "head": 8}),
    "ple": ("ple", {**SMALL, "widths": (16, 12), "head": 8}),
    "ple of one level": ("ple", {**SMALL, "levels": 1, "own_experts": 2, "widths": (16, 12)}),
    "ple of three levels": (
        "ple",
        {**SMALL, "levels": 3, "own_experts": 0, "shared_experts": 3, "widths": (16, 12)},
    ),
    "aitm": ("aitm", {**SMALL, "bottom": (24,), "widths": (16, 12), "head": 8}),
    "aitm without a bottom": (
        "aitm",
        {**SMALL, "bottom": (), "widths": (16, 12), "head": 8, "outputs": "conditional"},
    ),
    "tafe grouped": ("tafe", SMALL_TAFE),
    "tafe fields": ("tafe", {**SMALL_TAFE, "tokens": "fields"}),
    "tafe sparsemax, its own points": (
        "tafe",
        {**SMALL_TAFE, "selector": "sparsemax", "samples_inducing": True},
    ),
    "tafe gate, transfer": ("tafe", {**SMALL_TAFE, "selector": "gate", "use_transfer": True}),
    "tafe hard": ("tafe", {**SMALL_TAFE, "selector": "hard"}),
    "tafe of free heads": ("tafe", {**SMALL_TAFE, "selector": "off", "outputs": "marginal"}),
    "linear head": ("linear_head", {**SMALL, "widths": (32, 16)}),
}
ENCODER = Encoder(tiny.fitted_schema())
SPEC = NetSpec.of(ENCODER)
NO_REQUEST = replace(SPEC, request_tables={}, request_dense=0, histories=())

each_net = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(case: str, *, spec: NetSpec = SPEC, seed: int = 0, **options: Any) -> Net:
    """A small network, moved off its start: what starts at zero would hide faults."""
    name, small = CASES[case]
    torch.manual_seed(seed)
    net = build_net(name, spec=spec, options={**small, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def blocks(sizes: list[int], seed: int = 0) -> Blocks:
    """Random requests of the tiny schema, with so many candidates each."""
    requests = synthetic_requests(
        ENCODER, sizes=sizes, last_time=tiny.NOON, rng=np.random.default_rng(seed)
    )
    return requests.encode(ENCODER)


def run(net: Net, given: Blocks) -> NetOutput:
    with torch.inference_mode():
        return net(NetInput.of(given))


def head_logits(output: NetOutput) -> Tensor:
    """What the heads made: `NetOutput.logits` may be bounded where the order is not kept."""
    return output.logits if output.marginal is None else output.marginal


def probabilities(net: Net, given: Blocks) -> Tensor:
    return torch.sigmoid(run(net, given).logits)


def taken(given: Blocks, rows: list[int]) -> Blocks:
    """Some candidates, each with a request row of its own."""
    request = given.request_of[rows]
    return Blocks(
        request=RequestBlock(
            ids=given.request.ids[request],
            dense=given.request.dense[request],
            history=given.request.history[request],
        ),
        candidate=CandidateBlock(ids=given.candidate.ids[rows], dense=given.candidate.dense[rows]),
        request_of=np.arange(len(rows), dtype=np.int64),
    )


def with_ids(given: Blocks, value: int) -> Blocks:
    return Blocks(
        request=replace(given.request, ids=np.full_like(given.request.ids, value)),
        candidate=replace(given.candidate, ids=np.full_like(given.candidate.ids, value)),
        request_of=given.request_of,
    )


def test_every_architecture_is_in_the_matrix() -> None:
    assert {name for name, _ in CASES.values()} == set(ARCHITECTURES)
    assert len(CASES) == 17


@each_net
@pytest.mark.parametrize("num_steps", [2, 3])
def test_shapes(case: str, num_steps: int) -> None:
    net = make(case, spec=replace(SPEC, num_steps=num_steps))

    output = run(net, blocks([3, 1, 4]))

    assert output.logits.shape == (8, num_steps)
    assert output.representations.shape[:2] == (8, num_steps)
    assert output.representations.shape[2] == net.representation_width
    assert output.logits.dtype == output.representations.dtype == torch.float32
    if output.shared is None:
        assert net.shared_width == 0
    else:
        assert output.shared.shape == (8, net.shared_width)


@each_net
def test_free_heads_are_told_beside_the_conditional_logits(case: str) -> None:
    net, given = make(case, outputs="marginal"), blocks([3, 1, 4])

    output = run(net, given)

    assert output.marginal is not None
    free, conditional = torch.sigmoid(output.marginal), torch.sigmoid(output.logits)
    bounded = torch.minimum(free[:, 1] / free[:, 0], torch.ones(8))
    torch.testing.assert_close(conditional[:, 0], free[:, 0])
    torch.testing.assert_close(conditional[:, 1], bounded, rtol=0, atol=2e-6)
    assert run(make(case, outputs="conditional"), given).marginal is None


@each_net
@pytest.mark.parametrize(
    "spec",
    [
        NO_REQUEST,
        replace(SPEC, candidate_tables={}),
        replace(SPEC, candidate_dense=0),
        replace(SPEC, request_dense=0),
        replace(SPEC, request_tables={}, candidate_tables={}, histories=()),
    ],
    ids=[
        "no request side",
        "no candidate ids",
        "no candidate numbers",
        "no request numbers",
        "no ids",
    ],
)
def test_inputs_of_no_width_are_no_obstacle(case: str, spec: NetSpec) -> None:
    if spec.histories:  # the tiny schema's history shares a table of the candidate side
        spec = replace(spec, histories=((next(iter(spec.request_tables)), 2),))
    rows = 5
    given = Blocks(
        request=RequestBlock(
            ids=np.full((2, len(spec.request_tables)), 3, np.int64),
            dense=np.ones((2, spec.request_dense), np.float32),
            history=np.ones((2, sum(length for _, length in spec.histories)), np.int64),
        ),
        candidate=CandidateBlock(
            ids=np.full((rows, len(spec.candidate_tables)), 3, np.int64),
            dense=np.ones((rows, spec.candidate_dense), np.float32),
        ),
        request_of=np.array([0, 0, 1, 1, 1], np.int64),
    )

    logits = run(make(case, spec=spec), given).logits

    assert logits.shape == (rows, 2)
    assert torch.isfinite(logits).all()


@each_net
def test_gradients_reach_every_parameter(case: str) -> None:
    net = make(case)
    given = NetInput.of(blocks([4] * 16))

    head_logits(net(given)).square().sum().backward()

    missed = [
        name
        for name, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert missed == []


# The linear head's conversion step cannot follow any 64 rows: that is its purpose.
@pytest.mark.parametrize("case", [case for case in CASES if case != "linear head"])
def test_over_fits_64_rows(case: str) -> None:
    rng = np.random.default_rng(0)
    clicks = rng.random(64) < 0.4
    labels = torch.from_numpy(
        np.stack([clicks, clicks & (rng.random(64) < 0.5)], axis=1).astype(np.float32)
    )
    given = NetInput.of(blocks([4] * 16))
    net = make(case, head=32).train()  # of few units all may be dead from the start
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    for _ in range(200):
        logits = head_logits(net(given))
        loss = 2 * functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        optimizer.step()
        if float(loss.detach()) < 0.02:
            break

    assert float(loss.detach()) < 0.02


@each_net
def test_alone_is_as_in_a_batch(case: str) -> None:
    net, given = make(case), blocks([7, 1, 5, 12])

    together = probabilities(net, given)

    alone = torch.cat([probabilities(net, taken(given, [i])) for i in range(len(given))])
    # Batching changes the last bits.
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


@each_net
def test_shared_request_rows_are_as_repeated(case: str) -> None:
    net, given = make(case), blocks([7, 1, 5, 12])

    repeated = probabilities(net, taken(given, list(range(len(given)))))

    torch.testing.assert_close(repeated, probabilities(net, given), rtol=0, atol=1e-6)


@each_net
def test_order_of_candidates_is_kept(case: str) -> None:
    net, given = make(case), blocks([7, 1, 5, 12])
    order = np.random.default_rng(0).permutation(len(given)).tolist()

    shuffled = probabilities(net, taken(given, order))

    torch.testing.assert_close(shuffled, probabilities(net, given)[order], rtol=0, atol=1e-6)


@each_net
def test_request_side_and_candidate_side_both_matter(case: str) -> None:
    net, given = make(case), blocks([2, 2])

    logits = run(net, given).logits

    assert not torch.allclose(logits[0], logits[1])
    swapped = replace(given, request_of=1 - given.request_of)
    assert not torch.allclose(run(net, swapped).logits, logits)


@each_net
@pytest.mark.parametrize("value", [-1, -(2**62), 2**40, max(SPEC.candidate_tables.values())])
def test_ids_outside_a_table_are_unknown_ids(case: str, value: int) -> None:
    net, given = make(case), blocks([3, 2])

    outside = run(net, with_ids(given, value)).logits

    assert torch.equal(outside, run(net, with_ids(given, UNKNOWN_CODE)).logits)


@each_net
def test_heads_start_at_the_base_rates(case: str) -> None:
    name, options = CASES[case]
    torch.manual_seed(0)
    net = build_net(name, spec=SPEC, options=options).eval()

    net.set_base_rates([0.04, 0.005])

    output = run(net, blocks([50]))
    # Untrained weights move it a little.
    rates = torch.tensor([0.04, 0.005])
    mean = torch.sigmoid(output.logits).mean(dim=0)
    torch.testing.assert_close(mean, rates, rtol=0.25, atol=0)
    if output.marginal is not None:
        free = torch.sigmoid(output.marginal).mean(dim=0)
        torch.testing.assert_close(free, torch.tensor([0.04, 0.0002]), rtol=0.25, atol=0)


@each_net
def test_equal_seeds_give_equal_networks(case: str) -> None:
    first, second, other = (make(case, seed=seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@each_net
def test_dropout_is_of_training_only(case: str) -> None:
    net, given = make(case, dropout=0.5), blocks([5])

    assert torch.equal(run(net, given).logits, run(net, given).logits)
    net.train()
    assert not torch.equal(run(net, given).logits, run(net, given).logits)


@each_net
def test_embedding_parameters_are_the_id_tables(case: str) -> None:
    net = make(case)

    tables = net.embedding_parameters()

    rows = sum({**SPEC.request_tables, **SPEC.candidate_tables}.values())
    num_tables = 2 if case == "single_task" else 1  # there each step has its own
    assert [table.shape for table in tables] == [(rows, 4)] * num_tables


def test_unknown_architecture_is_named_beside_those_there_are() -> None:
    there_are = "single_task, shared_bottom, cross_stitch, mmoe, ple, aitm, tafe"
    with pytest.raises(SpecError, match=f"no architecture 'esmm'; there are {there_are}"):
        build_net("esmm", spec=SPEC, options={})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"depth": 3}, r"net\.options: depth: Extra inputs"),
        ({"patterns": 0}, r"net\.options: patterns: "),
        ({"tokens": "words"}, r"net\.options: tokens: "),
        ({"width": 10, "heads": 4}, r"net\.options: .*width 10 is not a multiple of 4 heads"),
        ({"selector": "best"}, r"net\.options: selector: "),
        ({"outputs": "joint"}, r"net\.options: outputs: "),
        ({"embedding": 0}, r"net\.options: embedding: "),
        ({"dropout": 1.0}, r"net\.options: dropout: "),
    ],
)
def test_wrong_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        build_net("tafe", spec=SPEC, options=options)


def history(*codes: int) -> NetInput:
    """One request with a history, of which everything else is zero."""
    return NetInput(
        request_ids=torch.zeros(1, len(SPEC.request_tables), dtype=torch.int64),
        request_dense=torch.zeros(1, SPEC.request_dense),
        request_history=torch.tensor([codes]),
        candidate_ids=torch.zeros(1, len(SPEC.candidate_tables), dtype=torch.int64),
        candidate_dense=torch.zeros(1, SPEC.candidate_dense),
        request_of=torch.zeros(1, dtype=torch.int64),
    )


def test_history_is_the_mean_of_its_present_ids_in_the_shared_table() -> None:
    embedding = FieldEmbedding(SPEC, width=4)
    before = sum(SPEC.request_tables.values())  # item_id is the first candidate table

    pooled = embedding.request(history(5, 7, PADDING_CODE, PADDING_CODE))[0, -1]

    rows = embedding.table.weight[[before + 5, before + 7]]
    torch.testing.assert_close(pooled, rows.mean(dim=0))


def test_order_and_padding_of_a_history_do_not_matter() -> None:
    embedding = FieldEmbedding(SPEC, width=4)

    padded = embedding.request(history(PADDING_CODE, 7, PADDING_CODE, 5))

    torch.testing.assert_close(padded, embedding.request(history(5, 7, 0, 0)))


def test_empty_history_is_zero() -> None:
    embedding = FieldEmbedding(SPEC, width=4)

    assert not embedding.request(history(0, 0, 0, 0))[0, -1].any()


def test_padding_missing_and_unknown_are_three_embeddings() -> None:
    embedding = FieldEmbedding(SPEC, width=4)
    missing, unknown, padding = (
        embedding.request(history(code, 0, 0, 0))[0, -1] for code in (1, 2, 0)
    )

    assert not torch.equal(missing, unknown)
    assert not torch.equal(missing, padding)
    assert not torch.equal(unknown, padding)
