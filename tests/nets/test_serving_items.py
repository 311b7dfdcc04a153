"""The serving form in two parts: together they answer what the whole answers."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_architectures import CASES, ENCODER, NO_REQUEST, blocks, make
from test_serving_graph import LINES, OUTPUTS, outputs

from model import cost
from model.contract.blocks import Blocks, ItemColumns, RequestBlock
from model.contract.bundle import ItemParts, parity_excess
from model.contract.spec import parse_schema
from model.cost import are_parts_faster
from model.export import (
    INPUT_NAMES,
    make_session,
    optimised,
    parts_to_onnx,
    to_onnx,
    with_item_sum,
)
from model.nets import build_net
from model.nets.layers import NetInput, NetSpec
from model.serving_graph import ServingGraph
from model.serving_items import GraphByItem, ItemSide, item_parts

COLUMNS = ItemColumns.of(ENCODER.schema)
IN_PARTS = ["shared_bottom", "mmoe", "ple", "aitm"]


def parts_of(case: str, **kwargs: object) -> tuple[ServingGraph, ItemSide, GraphByItem]:
    whole = ServingGraph(make(case, **kwargs), LINES).eval()  # type: ignore[arg-type]
    parts = item_parts(whole, COLUMNS)
    assert parts is not None
    return whole, *parts


def by_item(
    item_side: ItemSide, rest: GraphByItem, given: Blocks, *, sums_of: Blocks | None = None
) -> list[np.ndarray]:
    own = NetInput.of(given if sums_of is None else sums_of)
    tensors = NetInput.of(given)
    with torch.inference_mode():
        item_sum = item_side(own.candidate_ids, own.candidate_dense)
        made = rest(*(getattr(tensors, name) for name in INPUT_NAMES), item_sum)
    return [value.numpy() for value in made]


def with_other_columns(given: Blocks, *, of_item: bool) -> Blocks:
    """Other values in the item's columns, or in all others."""
    ids, dense = given.candidate.ids.copy(), given.candidate.dense.copy()
    for array, places in ((ids, COLUMNS.ids), (dense, COLUMNS.dense)):
        chosen = [j for j in range(array.shape[1]) if (j in places) == of_item]
        array[:, chosen] = array[::-1, chosen] + array.dtype.type(1)
    return replace(given, candidate=replace(given.candidate, ids=ids, dense=dense))


def test_columns_of_the_item_are_those_of_the_snapshot_and_those_that_are_fixed() -> None:
    layout = ENCODER.candidate_layout

    assert COLUMNS.features == ("item_id", "brand", "price", "position")
    assert [layout.ids[j] for j in COLUMNS.ids] == ["item_id", "brand"]
    assert [layout.dense_columns[j] for j in COLUMNS.dense] == [
        *("price", "position", "price_missing", "position_missing")
    ]


@pytest.mark.parametrize("case", IN_PARTS)
def test_parts_score_as_the_whole(case: str) -> None:
    whole, item_side, rest = parts_of(case)
    given = blocks([7, 1, 5, 12])

    for theirs, ours in zip(outputs(whole, given), by_item(item_side, rest, given), strict=True):
        absolute, relative, fits = parity_excess(theirs, ours)
        assert fits, (absolute, relative)


def test_parts_score_as_the_whole_without_request_features() -> None:
    whole, item_side, rest = parts_of("shared_bottom", spec=NO_REQUEST)
    empty = np.zeros((2, 0), np.int64)
    request = RequestBlock(ids=empty, dense=empty.astype(np.float32), history=empty)
    given = replace(blocks([3, 2]), request=request)

    for theirs, ours in zip(outputs(whole, given), by_item(item_side, rest, given), strict=True):
        assert parity_excess(theirs, ours)[2]


def test_the_item_s_columns_are_read_by_its_side_only() -> None:
    _, item_side, rest = parts_of("shared_bottom")
    given = blocks([7, 1, 5, 12])
    others = with_other_columns(given, of_item=True)

    expected = by_item(item_side, rest, given)

    actual = by_item(item_side, rest, others, sums_of=given)
    assert all(np.array_equal(a, b) for a, b in zip(expected, actual, strict=True))
    changed = by_item(item_side, rest, others)
    assert not np.array_equal(expected[0], changed[0])


def test_the_request_s_columns_are_not_read_by_the_item_s_side() -> None:
    _, item_side, rest = parts_of("shared_bottom")
    given = blocks([7, 1, 5, 12])
    others = with_other_columns(given, of_item=False)

    expected = by_item(item_side, rest, others)

    actual = by_item(item_side, rest, others, sums_of=given)
    assert all(np.array_equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("tafe")])
def test_a_network_without_one_first_layer_has_no_parts(case: str) -> None:
    assert item_parts(ServingGraph(make(case), LINES).eval(), COLUMNS) is None


def test_a_schema_whose_items_have_no_columns_has_no_parts() -> None:
    content = {**tiny.SCHEMA_CONTENT}
    content["features"] = [
        {**feature, "source": "request", "scope": "cross"}
        if feature["name"] in ("brand", "price")
        else feature
        for feature in content["features"]
        if feature["name"] not in ("item_id", "recent", "bought_item", "bought_brand", "position")
    ]
    columns = ItemColumns.of(parse_schema(content))

    assert columns.features == ()
    assert item_parts(ServingGraph(make("shared_bottom"), LINES).eval(), columns) is None


@pytest.fixture(scope="module")
def exported() -> tuple[bytes, ItemParts]:
    """The whole and its parts, of the shipped sizes."""
    torch.manual_seed(0)
    net = build_net("shared_bottom", spec=NetSpec.of(ENCODER), options={}).eval()
    graph = ServingGraph(net, LINES).eval()
    given = blocks([7, 1, 5, 12])
    parts = parts_to_onnx(graph, given, ENCODER)
    assert parts is not None
    return optimised(to_onnx(graph, blocks=given, outputs=OUTPUTS)), parts


def test_exported_parts_score_as_the_exported_whole(exported: tuple[bytes, ItemParts]) -> None:
    model, parts = exported
    given = blocks([2, 30, 9])

    summed = with_item_sum(given, make_session(parts.item_side))
    actual = make_session(parts.model).run(list(OUTPUTS), summed.feeds())

    expected = make_session(model).run(list(OUTPUTS), given.feeds())
    for theirs, ours in zip(expected, actual, strict=True):
        assert parity_excess(theirs, ours)[2]


@pytest.mark.parametrize(("share", "is_worthwhile"), [(0.0, False), (1e9, True)])
def test_parts_are_worthwhile_by_their_share_of_the_whole_s_time(
    exported: tuple[bytes, ItemParts],
    share: float,
    is_worthwhile: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "WORTHWHILE_SHARE", share)
    monkeypatch.setattr(cost, "REPEATS", 3)

    assert are_parts_faster(*exported, blocks([7, 1])) == is_worthwhile
