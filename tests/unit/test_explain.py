"""Contributions of features, on a model of which they are known, and over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from conftest import RunningApp, StartApp
from onnx import TensorProto, helper, numpy_helper
from test_api import assert_problem, post_asgi

from model.contract.encode import Encoder
from model.contract.spec import TimePart
from service.api import MAX_EXPLAINED
from service.explain import Explainer
from service.features import Candidates, GivenColumn
from service.settings import BatchSettings, Settings
from service.state import ServingState, load_serving_state

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {
    "user_id": 7,
    "time": tiny.NOON_TEXT,
    "context": {"basket": 5},
    "candidates": [{"item_id": 1, "display": "5"}, {"item_id": 2}, {"item_id": 99}],
}


def linear_graph(encoder: Encoder) -> bytes:
    """pctr with logit price / 2 - trips + the matches' counts of an item, nothing else."""
    request, candidate = encoder.request_layout, encoder.candidate_layout
    weights = {
        "request": np.zeros((len(request.dense_columns), 1), np.float32),
        "candidate": np.zeros((len(candidate.dense_columns), 1), np.float32),
    }
    weights["request"][request.dense_columns.index("trips")] = -1.0
    weights["candidate"][candidate.dense_columns.index("price")] = 0.5
    weights["candidate"][candidate.dense_columns.index("bought_item_count")] = 1.0
    constants = {**weights, "zero": np.array([-0.5], np.float32), "axis": np.array([1])}
    nodes = [
        helper.make_node("MatMul", ["request_dense", "request"], ["by_request"]),
        helper.make_node("MatMul", ["candidate_dense", "candidate"], ["by_candidate"]),
        helper.make_node("Gather", ["by_request", "request_of"], ["gathered"], axis=0),
        helper.make_node("Sum", ["gathered", "by_candidate", "zero"], ["logits"]),
        helper.make_node("Squeeze", ["logits", "axis"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["pctr"]),
        helper.make_node("Identity", ["pctr"], ["pcvr"]),
        helper.make_node("Mul", ["pctr", "pcvr"], ["pctcvr"]),
    ]
    # A bundle's graph declares all inputs, read or not.
    widths = {
        "request_ids": len(request.ids),
        "request_dense": len(request.dense_columns),
        "request_history": request.history_width,
        "candidate_ids": len(candidate.ids),
        "candidate_dense": len(candidate.dense_columns),
    }
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT if name.endswith("dense") else TensorProto.INT64,
            [f"{name}_rows", width],
        )
        for name, width in widths.items()
    ]
    inputs.append(helper.make_tensor_value_info("request_of", TensorProto.INT64, ["N"]))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])
        for name in encoder.schema.output_names
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "linear", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, tiny_items: Path) -> Iterator[ServingState]:
    parent = tmp_path_factory.mktemp("linear")
    bundle = tiny.write(parent, true_model=linear_graph(Encoder(tiny.fitted_schema())))
    state = load_serving_state(bundle, tiny_items, batch=BatchSettings())
    yield state
    state.runtime.close()


def explained(
    state: ServingState, item_ids: list[int], **columns: list[object]
) -> dict[str, dict[str, list[float]]]:
    """By output and feature, one contribution per candidate."""
    encoded = state.features.encode(
        user_id=7,
        time=tiny.NOON,
        context={},
        user_features={},
        candidates=Candidates(
            item_ids=item_ids,
            columns={name: GivenColumn(values=values) for name, values in columns.items()},
            is_columnar=True,
        ),
        record=tiny.record(),
    )
    explainer = Explainer(state.encoder, state.items)
    questions = explainer.questions(encoded.blocks, time=tiny.NOON)
    (answers,) = state.runtime.run_together([questions])
    return {
        output: dict(zip(explainer.features, values.T.tolist(), strict=True))
        for output, values in explainer.contributions(answers).items()
    }


def test_of_a_linear_model_each_contribution_is_weight_times_distance_from_missing(
    linear: ServingState,
) -> None:
    encoder = linear.encoder
    layout = encoder.candidate_layout
    default = encoder.candidate_block({}, time=np.array([tiny.NOON])).dense[0]
    given = linear.features.encode(
        user_id=7, time=tiny.NOON, context={}, user_features={},
        candidates=Candidates(item_ids=[1, 2, 99]), record=tiny.record(),
    ).blocks  # fmt: skip
    unknown_user = encoder.row.encode({}, time=tiny.NOON).dense[0]
    price, count = (layout.dense_columns.index(n) for n in ("price", "bought_item_count"))
    trips = encoder.request_layout.dense_columns.index("trips")

    found = explained(linear, [1, 2, 99])["pctr"]

    assert found["price"] == pytest.approx(
        (0.5 * (given.candidate.dense[:, price] - default[price])).tolist(), abs=1e-5
    )
    assert found["bought_item"] == pytest.approx(
        (given.candidate.dense[:, count] - default[count]).tolist(), abs=1e-5
    )
    by_trips = -float(given.request.dense[0, trips] - unknown_user[trips])
    assert found["trips"] == pytest.approx([by_trips] * 3, abs=1e-5)
    assert abs(by_trips) > 0.1
    assert abs(found["price"][0]) > 0.01
    others = set(found) - {"price", "bought_item", "trips"}
    assert {name: found[name] for name in others} == {name: [0.0] * 3 for name in others}


def test_unknown_item_has_nothing_of_its_own(linear: ServingState) -> None:
    assert explained(linear, [99])["pctr"]["price"] == [0.0]


def test_value_of_the_request_counts_in_place_of_the_items(linear: ServingState) -> None:
    plain = explained(linear, [1])["pctr"]["price"]
    given = explained(linear, [1], price=[900.0])["pctr"]["price"]

    assert given[0] > plain[0]


def test_every_feature_that_can_be_missing_is_explained(tiny_state: ServingState) -> None:
    found = explained(tiny_state, [1, 2])["pctcvr"]

    schema = tiny_state.encoder.schema
    assert set(found) == {
        f.name for f in schema.features if not isinstance(f, TimePart) and f.source != "log_only"
    }
    # This model reads every column of every feature.
    told = {name for name, values in found.items() if any(values)}
    given = {
        "age_band", "trips", "last_trip", "recent", "item_id", "brand", "price", "bought_item",
        "bought_brand",
    }  # fmt: skip
    assert given <= told


async def test_answer_has_scores_and_contributions_largest_first(running: RunningApp) -> None:
    scored = (await running.client.post("/score", json=BODY)).json()
    response = await running.client.post("/explain", json=BODY)

    assert response.status_code == 200
    explanation = response.json()
    assert explanation["bundle"] == scored["bundle"]
    assert explanation["request_id"] == response.headers["x-request-id"]
    for item, plain in zip(explanation["items"], scored["items"], strict=True):
        contributions = item.pop("contributions")
        assert item == plain
        assert set(contributions) == {"pctr", "pctcvr", "pcvr"}
        for by_feature in contributions.values():
            sizes = [abs(value) for value in by_feature.values()]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] > 0


async def test_too_many_candidates_are_refused(running: RunningApp) -> None:
    body = {**BODY, "candidates": list(range(1, MAX_EXPLAINED + 2))}

    assert_problem(
        await running.client.post("/explain", json=body), 413, "too_many_candidates",
        field=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "field"),
    [(b"{", "body"), (b'{"user_id": 1, "candidates": [1], "context": {"basket": "x"}}', None)],
    ids=["no JSON", "a value that does not fit"],
)
async def test_bad_request_is_a_problem(
    running: RunningApp, content: bytes, field: str | None
) -> None:
    response = await running.client.post("/explain", content=content)

    assert_problem(response, 422, "invalid_request", field=field or "context.basket")


async def test_service_under_load_refuses_to_explain(
    settings: Settings, start_app: StartApp
) -> None:
    async with start_app(settings) as running:
        for _ in range(100_000):
            running.app.state.scoring.gate.admission.enter(body_bytes=1000)
        response = await running.client.post("/explain", json=BODY)

    assert_problem(response, 503, "overloaded")


async def test_caller_that_hangs_up_is_no_bug(
    running: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    await post_asgi(running, [{"type": "http.disconnect"}], path="/explain")

    assert not [record for record in caplog.records if record.levelname == "ERROR"]
