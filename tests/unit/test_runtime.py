from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper

from model.contract.blocks import Blocks
from model.contract.bundle import Bundle, parity_excess, read_bundle
from model.contract.encode import Encoder
from model.contract.errors import BundleCorrupt, BundleRejected
from service.runtime import Outputs, Runtime, combine, cut, join, load_runtime, split

ENCODER = Encoder(tiny.fitted_schema())


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


@pytest.fixture
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    runtime = load(bundle)
    yield runtime
    runtime.close()


def load(bundle: Bundle) -> Runtime:
    runtime, _ = load_runtime(bundle, ENCODER, num_runners=1, intra_op_threads=1, max_batch_rows=50)
    return runtime


def changed_weight(model: bytes, name: str, value: float) -> bytes:
    graph = onnx.load_from_string(model)
    for tensor in graph.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            array.flat[0] += value
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            return bytes(graph.SerializeToString())
    raise AssertionError(name)


def part(blocks: Blocks, request: int) -> Blocks:
    rows = np.flatnonzero(blocks.request_of == request)
    return Blocks(
        request=replace(
            blocks.request,
            ids=blocks.request.ids[[request]],
            dense=blocks.request.dense[[request]],
            history=blocks.request.history[[request]],
        ),
        candidate=replace(
            blocks.candidate, ids=blocks.candidate.ids[rows], dense=blocks.candidate.dense[rows]
        ),
        request_of=np.zeros(len(rows), np.int64),
    )


def test_golden_rows_score_as_expected(bundle: Bundle, runtime: Runtime) -> None:
    outputs = runtime.run(bundle.golden.blocks)

    assert set(outputs) == {"pctr", "pcvr", "pctcvr"}
    for name, expected in bundle.golden.expected.items():
        assert outputs[name].dtype == np.float32
        assert parity_excess(expected, outputs[name])[2]


def test_combined_requests_get_their_own_answers(bundle: Bundle, runtime: Runtime) -> None:
    requests = [part(bundle.golden.blocks, request) for request in (4, 0, 2)]

    together = runtime.run_together(requests)

    assert [len(outputs["pctr"]) for outputs in together] == [20, 1, 10]
    for request, outputs in zip(requests, together, strict=True):
        for name, alone in runtime.run(request).items():
            # Run in another number of rows.
            np.testing.assert_allclose(outputs[name], alone, rtol=0, atol=1e-6)


def rows_of(blocks: Blocks, number: int) -> Blocks:
    rows = np.arange(number) % len(blocks)
    return replace(
        blocks,
        candidate=replace(
            blocks.candidate, ids=blocks.candidate.ids[rows], dense=blocks.candidate.dense[rows]
        ),
        request_of=blocks.request_of[rows],
    )


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 50, 101, 255])
def test_company_does_not_change_a_bit(bundle: Bundle, runtime: Runtime, number: int) -> None:
    request = rows_of(part(bundle.golden.blocks, 4), number)
    mate = part(bundle.golden.blocks, 2)

    (alone,) = runtime.run_together([request])

    for company in ([mate, request], [mate, request, mate], [rows_of(mate, 1), request]):
        together = runtime.run_together(company)[1]
        for name, values in alone.items():
            np.testing.assert_array_equal(together[name], values)


@pytest.mark.parametrize("number", [3, 20])
def test_one_request_is_run_as_two(
    bundle: Bundle, runtime: Runtime, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real networks' request sides are wide enough for a row alone to come out otherwise."""
    run, seen = runtime.run, []

    def watched(blocks: Blocks) -> Outputs:
        seen.append(len(blocks.request))
        return run(blocks)

    monkeypatch.setattr(runtime, "run", watched)
    request = rows_of(part(bundle.golden.blocks, 4), number)

    (outputs,) = runtime.run_together([request])

    assert seen == [2]
    for name, values in run(request).items():
        np.testing.assert_allclose(outputs[name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_parts_give_the_bits_of_the_whole(bundle: Bundle, runtime: Runtime, num_parts: int) -> None:
    request = rows_of(part(bundle.golden.blocks, 4), 1000)

    parts = [runtime.run_together([one])[0] for one in cut(request, num_parts)]

    (whole,) = runtime.run_together([request])
    for name, values in join(parts).items():
        np.testing.assert_array_equal(values, whole[name])


def test_cut_gives_parts_of_about_equal_size(bundle: Bundle) -> None:
    parts = cut(rows_of(part(bundle.golden.blocks, 4), 10), 3)

    assert [len(one) for one in parts] == [3, 3, 4]


def test_combine_fills_up_rows(bundle: Bundle) -> None:
    request = part(bundle.golden.blocks, 2)

    combined = combine([request, request, request], row_multiple=4)

    assert len(combined) == 32
    np.testing.assert_array_equal(combined.candidate.ids[30:], request.candidate.ids[[0, 0]])


def test_combine_offsets_request_rows(bundle: Bundle) -> None:
    whole = bundle.golden.blocks

    combined = combine([part(whole, request) for request in range(6)])

    for name, array in combined.feeds().items():
        np.testing.assert_array_equal(array, whole.feeds()[name])
    assert combined.request_of.dtype == np.int64


def test_combine_takes_requests_of_several_rows(bundle: Bundle) -> None:
    whole = bundle.golden.blocks

    combined = combine([whole, whole])

    assert combined.request_of.max() == 11
    outputs = {"p": np.arange(len(combined), dtype=np.float32)}
    assert [one["p"][0] for one in split(outputs, [whole, whole])] == [0, len(whole)]


def test_other_answers_than_the_trainer_s_are_refused(bundle: Bundle) -> None:
    altered = replace(bundle, model=changed_weight(bundle.model, "bias", 1e-3))

    with pytest.raises(BundleRejected, match="golden rows score another pctr here"):
        load(altered)


def test_difference_within_parity_is_accepted(bundle: Bundle) -> None:
    load(replace(bundle, model=changed_weight(bundle.model, "bias", 1e-6))).close()


def test_nan_answers_are_refused(bundle: Bundle) -> None:
    altered = replace(bundle, model=changed_weight(bundle.model, "bias", float("nan")))

    with pytest.raises(BundleRejected, match="golden rows"):
        load(altered)


def test_golden_rows_that_encode_otherwise_are_refused(bundle: Bundle) -> None:
    vocabularies = {**tiny.VOCABULARIES, "brand": ("bolt", "acme", "7")}
    other = Encoder(tiny.fitted_schema().model_copy(update={"vocabularies": vocabularies}))

    with pytest.raises(BundleRejected, match="encode to another candidate_ids"):
        load_runtime(bundle, other, num_runners=1, intra_op_threads=1, max_batch_rows=50)


@pytest.mark.parametrize("model", [b"", b"no model", bytes(1000)])
def test_model_that_does_not_load_is_refused(bundle: Bundle, model: bytes) -> None:
    with pytest.raises(BundleCorrupt, match=r"model\.onnx"):
        load(replace(bundle, model=model))


def test_bundle_without_golden_rows_is_refused(bundle: Bundle) -> None:
    empty = Encoder(bundle.fitted)
    blocks = Blocks(
        request=empty.request_block({}, time=np.zeros(0)),
        candidate=empty.candidate_block({}, time=np.zeros(0)),
        request_of=np.zeros(0, np.int64),
    )
    golden = replace(
        bundle.golden,
        time=np.zeros(0),
        request_columns={},
        candidate_columns={},
        blocks=blocks,
        expected={name: np.zeros(0, np.float32) for name in bundle.golden.expected},
    )

    with pytest.raises(BundleRejected, match="no golden rows"):
        load(replace(bundle, golden=golden))


def test_outputs_of_other_names_are_refused(bundle: Bundle) -> None:
    manifest = bundle.manifest.model_copy(update={"outputs": ("p_view", "p_click")})

    with pytest.raises(BundleRejected, match="outputs are pctcvr, pctr, pcvr, expected p_click"):
        load(replace(bundle, manifest=manifest))


def test_inputs_of_other_names_are_refused(bundle: Bundle) -> None:
    manifest = bundle.manifest.model_copy(update={"inputs": {"request_ids": "int64"}})

    with pytest.raises(BundleRejected, match="inputs are"):
        load(replace(bundle, manifest=manifest))


@pytest.mark.parametrize(("max_batch_rows", "expected"), [(50, {50}), (None, set(range(1, 2049)))])
def test_cap_is_found_unless_it_is_set(
    bundle: Bundle, max_batch_rows: int | None, expected: set[int]
) -> None:
    runtime, cost = load_runtime(
        bundle, ENCODER, num_runners=1, intra_op_threads=1, max_batch_rows=max_batch_rows
    )
    runtime.close()

    assert cost.max_rows in expected
    assert cost.row_s > 0
