"""What a service makes of a bundle in two parts: the scores are those of the whole model."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
import tiny
import torch

from model.calibrate import Calibrator
from model.contract.blocks import Blocks
from model.contract.bundle import (
    ITEM_SIDE,
    MANIFEST,
    MODEL,
    MODEL_BY_ITEM,
    Bundle,
    read_bundle,
    write_bundle,
)
from model.contract.encode import Encoder
from model.contract.errors import BundleCorrupt, BundleRejected
from model.cost import run_cost
from model.export import optimised, parts_to_onnx, to_onnx
from model.nets import build_net
from model.nets.layers import NetSpec
from model.serving_graph import ServingGraph
from service.explain import Explainer
from service.features import Candidates, GivenColumn
from service.item_files import ItemFiles
from service.item_sums import ItemSums
from service.runtime import combine, cut
from service.settings import BatchSettings
from service.state import ServingState, load_serving_state, open_serving_state, with_items

KNOWN, UNKNOWN = ["1", "2", "3", "4"], ["7", "no such item"]
BATCH = BatchSettings(max_batch_rows=64)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the shipped sizes, in two parts."""
    encoder = Encoder(tiny.fitted_schema())
    torch.manual_seed(1)
    net = build_net("shared_bottom", spec=NetSpec.of(encoder), options={}).eval()
    graph = ServingGraph(net, [Calibrator(), Calibrator()]).eval()
    blocks = tiny.golden(encoder, tiny.graph(encoder)).blocks
    model = optimised(to_onnx(graph, blocks=blocks, outputs=encoder.schema.output_names))
    parts = parts_to_onnx(graph, blocks, encoder)
    assert parts is not None
    parent = tmp_path_factory.mktemp("in_parts")
    whole = tiny.write(parent, true_model=model)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    manifest = json.loads(files.pop(MANIFEST))
    added = {ITEM_SIDE: parts.item_side, MODEL_BY_ITEM: parts.model}
    manifest["item_features"] = list(parts.features)
    del manifest["bundle_id"]
    return write_bundle(parent, manifest=manifest, files={**files, **added})


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    return read_bundle(bundle_path)


@pytest.fixture(scope="module")
def sums(bundle: Bundle) -> ItemSums:
    assert bundle.parts is not None
    return ItemSums(bundle.parts)


@pytest.fixture(scope="module")
def state(bundle_path: Path, tiny_items: Path) -> Iterator[ServingState]:
    state = load_serving_state(bundle_path, tiny_items, batch=BATCH)
    yield state
    state.runtime.close()


@pytest.fixture(scope="module")
def whole(bundle_path: Path, tiny_items: Path) -> Iterator[ServingState]:
    """The same without sums."""
    state = load_serving_state(bundle_path, tiny_items, batch=BATCH, with_item_sums=False)
    yield state
    state.runtime.close()


def encode(state: ServingState, item_ids: list[str], **given: GivenColumn) -> Blocks:
    return state.features.encode(
        user_id=7,
        time=tiny.NOON,
        context={"store_id": "31"},
        user_features={},
        candidates=Candidates(item_ids=item_ids, columns=given, is_columnar=True),
        record=tiny.record(),
    ).blocks


def scores(state: ServingState, blocks: Blocks) -> dict[str, np.ndarray]:
    (outputs,) = state.runtime.run_together([blocks])
    return dict(outputs)


def assert_scored_as_by(
    whole: ServingState, state: ServingState, item_ids: list[str], **given: GivenColumn
) -> None:
    expected = scores(whole, encode(whole, item_ids, **given))
    for name, values in scores(state, encode(state, item_ids, **given)).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-7)


def test_items_of_the_table_score_as_by_the_whole_model(
    state: ServingState, whole: ServingState
) -> None:
    assert_scored_as_by(whole, state, KNOWN)


def test_features_add_what_they_add_to_the_whole_model(
    state: ServingState, whole: ServingState
) -> None:
    found = []
    for one in (state, whole):
        explainer = Explainer(one.encoder, one.items)
        questions = explainer.questions(encode(one, [*UNKNOWN, *KNOWN]), time=tiny.NOON)
        found.append(explainer.contributions(scores(one, questions)))

    for name, values in found[0].items():
        # A network that has not learnt yet: an item adds little, of which float32 keeps 1e-6.
        np.testing.assert_allclose(values, found[1][name], rtol=0, atol=4e-6)
        item_id = explainer.features.index("item_id")
        assert np.abs(values[:, item_id]).max() > 1.2e-5


def test_unknown_items_score_as_by_the_whole_model(
    state: ServingState, whole: ServingState
) -> None:
    assert_scored_as_by(whole, state, [*UNKNOWN, *KNOWN])


def test_an_item_s_feature_written_over_for_some_scores_as_by_the_whole_model(
    state: ServingState, whole: ServingState
) -> None:
    price = GivenColumn(values=[500.0, None], rows=[1, 4])

    assert_scored_as_by(whole, state, [*KNOWN, *UNKNOWN], price=price)


def test_an_item_s_features_written_over_for_all_score_as_by_the_whole_model(
    state: ServingState, whole: ServingState
) -> None:
    brand = GivenColumn(values=["bolt", None, "acme", "unheard"])
    price = GivenColumn(values=[1.0, 2.0, 3.0, None])

    assert_scored_as_by(whole, state, KNOWN, brand=brand, price=price)


def test_a_request_s_feature_leaves_the_sums_as_they_are(state: ServingState) -> None:
    discount = GivenColumn(values=[0.1, 0.2, 0.3, 0.4])

    given = encode(state, KNOWN, discount=discount).candidate.item_sum

    np.testing.assert_array_equal(given, encode(state, KNOWN).candidate.item_sum)


def test_sums_of_a_request_are_the_bits_of_the_table(state: ServingState) -> None:
    """Item 1 with its own brand given, and so made anew, is item 1."""
    brand = GivenColumn(values=["acme"], rows=[0])

    given = encode(state, KNOWN, brand=brand).candidate.item_sum

    np.testing.assert_array_equal(given, encode(state, KNOWN).candidate.item_sum)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 9, 4099])
def test_company_does_not_change_a_bit_of_a_sum(
    bundle: Bundle, sums: ItemSums, number: int
) -> None:
    block = bundle.golden.blocks.candidate
    every = sums.of(block)
    rows = np.arange(number) % len(block)

    np.testing.assert_array_equal(sums.of(block.take(rows)), every[rows])


def test_company_does_not_change_a_bit_of_a_score(state: ServingState) -> None:
    request, mate = encode(state, [*KNOWN, *UNKNOWN]), encode(state, ["3"])

    alone = scores(state, request)

    for index, company in ((1, [mate, request]), (0, [request, mate]), (2, [mate, mate, request])):
        for name, values in state.runtime.run_together(company)[index].items():
            np.testing.assert_array_equal(values, alone[name])


def test_parts_of_a_request_have_their_own_sums(state: ServingState) -> None:
    request = encode(state, [*KNOWN, *UNKNOWN])

    joined = combine(cut(request, 3))

    np.testing.assert_array_equal(joined.candidate.item_sum, request.candidate.item_sum)


def test_table_in_a_file_has_the_sums_of_the_one_in_memory(
    state: ServingState, bundle_path: Path, tiny_items: Path, tmp_path: Path
) -> None:
    mapped = asyncio.run(
        open_serving_state(
            bundle_path,
            tiny_items,
            batch=BATCH,
            open_items=ItemFiles(tmp_path, log_level="warning"),
        )
    )
    try:
        expected, found = (encode(s, [*KNOWN, *UNKNOWN]) for s in (state, mapped))

        np.testing.assert_array_equal(found.candidate.item_sum, expected.candidate.item_sum)
        assert mapped.items.num_sum_bytes == 5 * 192 * 4
    finally:
        mapped.runtime.close()


def test_another_snapshot_s_items_get_sums(
    state: ServingState, bundle_path: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "items.parquet"
    tiny.item_snapshot().filter(pl.col("item_id") != 2).write_parquet(snapshot)

    changed = asyncio.run(
        with_items(
            state,
            snapshot,
            bundle_path=bundle_path,
            open_items=ItemFiles(tmp_path, log_level="warning"),
        )
    )

    of_all, of_rest = (encode(s, ["1", "3", "4"]) for s in (state, changed))
    np.testing.assert_array_equal(of_rest.candidate.item_sum, of_all.candidate.item_sum)
    assert len(changed.items) == 3


def test_setting_off_runs_the_whole_model(whole: ServingState) -> None:
    assert "item_sum" not in whole.runtime.input_names
    assert whole.items.num_sum_bytes == 0
    assert encode(whole, KNOWN).candidate.item_sum is None


def test_without_items_the_whole_model_is_run(bundle_path: Path) -> None:
    state = load_serving_state(bundle_path, None, batch=BATCH)
    state.runtime.close()

    assert state.item_sums is None
    assert "item_sum" not in state.runtime.input_names


def test_a_bundle_without_parts_is_served_as_it_is(tiny_state: ServingState) -> None:
    assert tiny_state.item_sums is None
    assert "item_sum" not in tiny_state.runtime.input_names
    assert encode(tiny_state, KNOWN).candidate.item_sum is None


@pytest.mark.parametrize("name", [ITEM_SIDE, MODEL_BY_ITEM])
def test_a_damaged_part_is_refused(bundle_path: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / bundle_path.name))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)

    with pytest.raises(BundleCorrupt, match=f"{name} differs from its digest"):
        read_bundle(copy)


@pytest.mark.parametrize("name", [ITEM_SIDE, MODEL_BY_ITEM])
def test_one_part_alone_is_refused(bundle_path: Path, tmp_path: Path, name: str) -> None:
    files = {path.name: path.read_bytes() for path in bundle_path.iterdir()}
    manifest = json.loads(files.pop(MANIFEST))
    del manifest["bundle_id"], files[name]

    with pytest.raises(BundleCorrupt, match="together"):
        read_bundle(write_bundle(tmp_path, manifest=manifest, files=files))


def test_parts_that_score_otherwise_are_refused(
    bundle_path: Path, tmp_path: Path, tiny_items: Path
) -> None:
    files = {path.name: path.read_bytes() for path in bundle_path.iterdir()}
    manifest = json.loads(files.pop(MANIFEST))
    del manifest["bundle_id"]
    files[ITEM_SIDE] = doubled(files[ITEM_SIDE])
    altered = write_bundle(tmp_path, manifest=manifest, files=files)

    with pytest.raises(BundleRejected, match="golden rows score another"):
        load_serving_state(altered, tiny_items, batch=BATCH)


def doubled(model: bytes) -> bytes:
    """The graph with its matrix twice as large."""
    proto = onnx.load_model_from_string(model)
    (weight,) = (t for t in proto.graph.initializer if t.dims[-1:] == [192])
    values = onnx.numpy_helper.to_array(weight) * np.float32(2.0)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    content: bytes = proto.SerializeToString()
    return content


def test_an_item_side_that_is_another_model_is_refused(bundle: Bundle) -> None:
    assert bundle.parts is not None

    with pytest.raises(BundleRejected, match=ITEM_SIDE):
        ItemSums(replace(bundle.parts, item_side=bundle.model))


def test_a_bundle_without_parts_keeps_its_manifest_as_it_was(tiny_bundle: Path) -> None:
    assert "item_features" not in json.loads((tiny_bundle / MANIFEST).read_text())
    assert read_bundle(tiny_bundle).parts is None


def test_costs_are_those_of_the_graph_that_is_served(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.cost.REPEATS", 3)

    served = run_cost(bundle)
    whole = run_cost(replace(bundle, parts=None))

    apart = served["multiply-adds per candidate"] + served["multiply-adds per item, once"]
    assert apart == whole["multiply-adds per candidate"]
    assert served["bytes of memory per item"] == 192 * 4
    assert served["bytes of the model"] == bundle.manifest.files[MODEL_BY_ITEM].bytes
    assert whole["bytes of the model"] == bundle.manifest.files[MODEL].bytes
