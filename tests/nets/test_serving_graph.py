"""The serving form of every architecture: what it answers is what the training form answers."""

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tiny
import torch
from test_architectures import CASES, ENCODER, NO_REQUEST, SPEC, blocks, make, with_ids

from model.calibrate import Calibrator
from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.bundle import parity_excess
from model.contract.spec import UNKNOWN_CODE
from model.cost import gathered, multiply_adds
from model.export import (
    FORBIDDEN_OPERATORS,
    INPUT_NAMES,
    ScoringGraph,
    make_session,
    optimised,
    plain_onnx,
    to_onnx,
)
from model.golden import synthetic_requests
from model.nets import ARCHITECTURES, build_net
from model.nets.layers import Net, NetInput, NetSpec
from model.serving_graph import ServingGraph

OUTPUTS = ENCODER.schema.output_names
LINES = [
    Calibrator(method="platt", slope=1.3, offset=-0.4),
    Calibrator(method="temperature", slope=0.8),
]
KNOTS = [Calibrator(method="isotonic", x=(-2.0, 0.0, 1.0), y=(-1.5, -0.5, 2.0)), Calibrator()]

each_net = pytest.mark.parametrize("case", CASES)


def outputs(graph: torch.nn.Module, given: Blocks) -> list[npt.NDArray[np.float32]]:
    tensors = NetInput.of(given)
    with torch.inference_mode():
        made = graph(*(getattr(tensors, name) for name in INPUT_NAMES))
    return [value.numpy() for value in made]


def assert_same(net: Net, given: Blocks, calibrators: list[Calibrator]) -> None:
    expected = outputs(ScoringGraph(net, calibrators).eval(), given)
    actual = outputs(ServingGraph(net, calibrators).eval(), given)
    for theirs, ours in zip(expected, actual, strict=True):
        absolute, relative, fits = parity_excess(theirs, ours)
        assert fits, (absolute, relative)


def test_every_architecture_is_among_the_cases() -> None:
    assert {name for name, _ in CASES.values()} == set(ARCHITECTURES)


@each_net
@pytest.mark.parametrize("calibrators", [LINES, KNOTS], ids=["lines", "knots"])
def test_serving_form_scores_as_the_training_form(case: str, calibrators: list[Calibrator]) -> None:
    assert_same(make(case), blocks([7, 1, 5, 12]), calibrators)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_serving_form_scores_as_the_training_form_at_default_sizes(name: str) -> None:
    torch.manual_seed(0)
    net = build_net(name, spec=SPEC, options={}).eval()

    assert_same(net, blocks([7, 1, 5, 12]), LINES)


@pytest.mark.parametrize("case", ["shared_bottom", "tafe grouped", "mmoe"])
def test_no_request_side(case: str) -> None:
    given = blocks([3, 2])
    empty = np.zeros((2, 0), np.int64)
    request = RequestBlock(ids=empty, dense=empty.astype(np.float32), history=empty)
    given = replace(given, request=request)

    assert_same(make(case, spec=NO_REQUEST), given, LINES)


def test_request_fields_with_many_codes_are_not_folded() -> None:
    name = next(iter(SPEC.request_tables))
    spec = replace(SPEC, request_tables={**SPEC.request_tables, name: 5000})

    assert_same(make("shared_bottom", spec=spec), blocks([3, 2]), LINES)


@pytest.mark.parametrize("changes", [{"use_excitation": False}, {"inducing": 3}, {"patterns": 1}])
def test_other_tafe_options(changes: dict[str, object]) -> None:
    assert_same(make("tafe grouped", **changes), blocks([7, 1, 5, 12]), LINES)


@each_net
def test_training_form_is_left_as_it_is(case: str) -> None:
    net, given = make(case), blocks([3, 2])
    before = outputs(ScoringGraph(net, LINES).eval(), given)

    ServingGraph(net, LINES)

    after = outputs(ScoringGraph(net, LINES).eval(), given)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@each_net
@pytest.mark.parametrize("value", [-1, -(2**62), 2**40, max(SPEC.candidate_tables.values())])
def test_ids_outside_a_table_are_unknown_ids(case: str, value: int) -> None:
    graph, given = ServingGraph(make(case), LINES).eval(), blocks([3, 2])

    outside = outputs(graph, with_ids(given, value))

    unknown = outputs(graph, with_ids(given, UNKNOWN_CODE))
    assert all(np.array_equal(a, b) for a, b in zip(outside, unknown, strict=True))


@each_net
def test_cumulative_probabilities_fall_along_the_chain(case: str) -> None:
    first, second, _ = outputs(ServingGraph(make(case), LINES).eval(), blocks([7, 1, 5, 12]))

    assert (second <= first).all()


@cache
def exported(name: str) -> tuple[Net, bytes]:
    """A network of the shipped sizes, and its served graph."""
    torch.manual_seed(0)
    net = build_net(name, spec=SPEC, options={}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    graph = ServingGraph(net, LINES).eval()
    return net, optimised(to_onnx(graph, blocks=rows(1, 20), outputs=OUTPUTS))


@cache
def rows(num_requests: int, per_request: int) -> Blocks:
    sizes = [per_request] * num_requests
    rng = np.random.default_rng(3)
    return synthetic_requests(ENCODER, sizes=sizes, last_time=tiny.NOON, rng=rng).encode(ENCODER)


def some(whole: Blocks, take: slice) -> Blocks:
    return Blocks(
        request=whole.request,
        candidate=CandidateBlock(ids=whole.candidate.ids[take], dense=whole.candidate.dense[take]),
        request_of=whole.request_of[take],
    )


shipped = pytest.mark.parametrize("name", ["shared_bottom", "tafe"])


@shipped
def test_served_graph_is_the_plain_export_within_parity(name: str) -> None:
    net, model = exported(name)
    given = rows(3, 40)
    plain = make_session(plain_onnx(net, LINES, encoder=ENCODER, last_time=tiny.NOON))

    expected = plain.run(list(OUTPUTS), gathered(given).feeds())

    actual = make_session(model).run(list(OUTPUTS), given.feeds())
    for theirs, ours in zip(expected, actual, strict=True):
        assert parity_excess(theirs, ours)[2]


@shipped
def test_a_candidate_scores_the_same_bits_in_any_batch(name: str) -> None:
    session, whole = make_session(exported(name)[1]), rows(1, 400)
    of_all = session.run(list(OUTPUTS), whole.feeds())

    for first, count in [(0, 20), (0, 100), (37, 100), *((i, 1) for i in range(0, 400, 7))]:
        take = slice(first, first + count)
        alone = session.run(list(OUTPUTS), some(whole, take).feeds())
        for one, many in zip(alone, of_all, strict=True):
            np.testing.assert_array_equal(one, many[take])


@shipped
def test_a_poisoned_neighbour_changes_no_bit(name: str) -> None:
    session, whole = make_session(exported(name)[1]), rows(1, 400)
    clean = session.run(list(OUTPUTS), whole.feeds())
    candidate = CandidateBlock(ids=whole.candidate.ids.copy(), dense=whole.candidate.dense.copy())
    candidate.ids[5], candidate.dense[5] = 2**40, np.nan
    poisoned = replace(whole, candidate=candidate)

    made = session.run(list(OUTPUTS), poisoned.feeds())

    others = np.arange(400) != 5
    for one, other in zip(clean, made, strict=True):
        np.testing.assert_array_equal(one[others], other[others])


@shipped
def test_order_of_probabilities_is_exact_in_the_served_graph(name: str) -> None:
    first, second, _ = make_session(exported(name)[1]).run(list(OUTPUTS), rows(3, 40).feeds())

    assert (second <= first).all()


@shipped
def test_served_graph_computes_no_rows_one_by_one(name: str) -> None:
    nodes = {node.op_type for node in onnx.load_model_from_string(exported(name)[1]).graph.node}

    assert not nodes & FORBIDDEN_OPERATORS


def test_multiply_adds_by_hand() -> None:
    spec = NetSpec(
        request_tables={"age": 5},
        candidate_tables={"item": 9, "brand": 4},
        request_dense=3,
        candidate_dense=2,
        histories=(),
        num_steps=2,
    )
    options = {"embedding": 4, "widths": (8, 6), "head": 5, "dropout": 0.0}
    net = build_net("shared_bottom", spec=spec, options=options).eval()
    rng = np.random.default_rng(0)
    given = Blocks(
        request=RequestBlock(
            ids=rng.integers(0, 5, (2, 1)),
            dense=rng.standard_normal((2, 3)).astype(np.float32),
            history=np.zeros((2, 0), np.int64),
        ),
        candidate=CandidateBlock(
            ids=rng.integers(0, 4, (7, 2)), dense=rng.standard_normal((7, 2)).astype(np.float32)
        ),
        request_of=np.array([0, 0, 0, 0, 1, 1, 1]),
    )
    model = optimised(to_onnx(ServingGraph(net, LINES).eval(), blocks=given, outputs=OUTPUTS))

    # Request: its field is looked up, so 3 numbers x 8. Candidate: (2 x 4 + 2) x 8 + 8 x 6, two
    # heads of 5 as one product 6 x 10, and 10 x 2 for both logits, whose other halves are zeros.
    assert multiply_adds(model, given) == (24, 80 + 48 + 60 + 20)


def test_gathered_blocks_have_a_request_row_per_candidate() -> None:
    given = rows(3, 2)

    made = gathered(given)

    assert made.request_of.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(made.request.ids, np.repeat(given.request.ids, 2, axis=0))
