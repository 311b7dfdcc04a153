"""The comparison with general model servers: encoded requests, the graph inside a peer, ratios."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx
import polars as pl
import pytest
import tiny
from conftest import StartApp
from onnx import TensorProto, helper, numpy_helper

from loadtest.peers.__main__ import _problems
from loadtest.peers.compare import OURS, Comparison, Row, _read_ours
from loadtest.peers.encoded import (
    arrays_of,
    as_base64,
    as_object,
    encode_bodies,
    triton_binary,
    triton_json,
)
from loadtest.peers.model_cpu import model_cpu_us
from loadtest.peers.peer import PEERS, REQUIREMENTS, Launch, running_peer
from loadtest.peers.servers.graph import Graph
from loadtest.rig import free_port
from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.record import pack_record
from service.settings import Settings
from service.state import ServingState

pytestmark = pytest.mark.anyio

WIDTHS = {"request_ids": 2, "request_dense": 3, "candidate_ids": 1, "candidate_dense": 2}


def _blocks(num_candidates: int, *, seed: int) -> Blocks:
    rng = np.random.default_rng(seed)
    return Blocks(
        request=RequestBlock(
            ids=rng.integers(9, size=(1, 2)),
            dense=rng.random((1, 3), np.float32),
            history=np.zeros((1, 0), np.int64),
        ),
        candidate=CandidateBlock(
            ids=rng.integers(9, size=(num_candidates, 1)),
            dense=rng.random((num_candidates, 2), np.float32),
        ),
        request_of=np.zeros(num_candidates, np.int64),
    )


def _expected(blocks: Blocks) -> list[float]:
    """What the graph below computes: the sum of everything that belongs to a candidate."""
    request = blocks.request.ids.sum() + blocks.request.dense.sum()
    own = blocks.candidate.ids.sum(axis=1) + blocks.candidate.dense.sum(axis=1)
    return (own + request).tolist()  # type: ignore[no-any-return]  # an array's list


def _model(path: Path, *, is_plain: bool) -> Path:
    kinds = {name: TensorProto.INT64 if "ids" in name else TensorProto.FLOAT for name in WIDTHS}
    rows = {
        name: "candidates" if is_plain or "candidate" in name else "requests" for name in WIDTHS
    }
    inputs = [
        helper.make_tensor_value_info(name, kinds[name], [rows[name], width])
        for name, width in WIDTHS.items()
    ]
    nodes, sums = [], []
    for name in WIDTHS:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT))
        nodes.append(
            helper.make_node("ReduceSum", [f"{name}_f", "axis"], [f"{name}_s"], keepdims=0)
        )
        gathered = f"{name}_s"
        if name.startswith("request_") and not is_plain:
            nodes.append(helper.make_node("Gather", [f"{name}_s", "request_of"], [f"{name}_g"]))
            gathered = f"{name}_g"
        sums.append(gathered)
    nodes.append(helper.make_node("Sum", sums, ["pctr"]))
    if not is_plain:
        inputs.append(
            helper.make_tensor_value_info("request_of", TensorProto.INT64, ["candidates"])
        )
    graph = helper.make_graph(
        nodes,
        "sum",
        inputs,
        [helper.make_tensor_value_info("pctr", TensorProto.FLOAT, ["candidates"])],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    return path


@pytest.mark.parametrize(
    ("is_plain", "gather"),
    [(False, "0"), (False, "1"), (True, "0")],
    ids=["served", "plain, with request_of", "plain, without"],
)
def test_graph_gives_each_request_its_own_answers(
    is_plain: bool, gather: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path / "model.onnx", is_plain=is_plain)
    monkeypatch.setenv("PEER_MODEL", str(model))
    monkeypatch.setenv("PEER_GATHER", gather)
    graph = Graph()
    requests = [_blocks(3, seed=1), _blocks(1, seed=2), _blocks(5, seed=3)]
    given = [as_object(requests[0]), as_base64(requests[1]), as_object(requests[2])]
    answers = graph.run([graph.parse(json.loads(json.dumps(one))) for one in given])
    for answer, blocks in zip(answers, requests, strict=True):
        assert answer["pctr"].tolist() == pytest.approx(_expected(blocks), rel=1e-5)


def test_triton_bodies_hold_all_tensors_in_the_protocols_two_forms() -> None:
    blocks = _blocks(4, seed=1)
    body, headers = triton_binary(blocks)
    length = int(dict(headers)["inference-header-content-length"])
    described = json.loads(body[:length])["inputs"]
    sizes = [entry["parameters"]["binary_data_size"] for entry in described]
    assert len(body) == length + sum(sizes)
    in_text = json.loads(triton_json(blocks)[0])["inputs"]
    assert [e["shape"] for e in described] == [[1, 2], [1, 3], [1, 4, 1], [1, 4, 2]]
    assert [(e["name"], e["datatype"], e["shape"]) for e in in_text] == [
        (e["name"], e["datatype"], e["shape"]) for e in described
    ]
    start = length + sum(sizes[:3])
    assert np.array_equal(
        np.frombuffer(body[start:], np.float32).reshape(4, 2), blocks.candidate.dense
    )


async def test_encoded_bodies_score_as_the_service_scores_them(
    start_app: StartApp, settings: Settings, tiny_state: ServingState, tmp_path: Path
) -> None:
    records = tmp_path / "records.parquet"
    data = pack_record(tiny.record())
    pl.DataFrame({"user_id": ["7"], "record": [data]}).write_parquet(records)
    body = {"user_id": 7, "time": tiny.NOON_TEXT, "context": {}, "candidates": [1, 2, 3, 99]}
    (blocks,) = encode_bodies(tiny_state, [msgspec.json.encode(body)], records)
    outputs = tiny_state.runtime.run(blocks)
    async with start_app(settings) as app:
        await app.put_record("7", data)
        answer = await app.client.post("/score", json=body)
    for name, values in _read_ours(answer.content).items():
        assert values.tolist() == pytest.approx(outputs[name].tolist(), rel=1e-5)


def test_schema_with_histories_is_refused(tiny_state: ServingState, tmp_path: Path) -> None:
    records = tmp_path / "records.parquet"
    pl.DataFrame({"user_id": ["7"], "record": [pack_record(tiny.record())]}).write_parquet(records)
    body = {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1]}
    (blocks,) = encode_bodies(tiny_state, [msgspec.json.encode(body)], records)
    with pytest.raises(ValueError, match="histor"):
        arrays_of(blocks)


def test_columns_and_rows_of_our_answer_read_alike() -> None:
    rows = b'{"items":[{"item_id":1,"pctr":0.5,"status":"ok"},{"item_id":2,"pctr":0.25}]}'
    columns = b'{"columns":{"item_id":[1,2],"pctr":[0.5,0.25],"status":["ok","ok"]}}'
    assert _read_ours(rows)["pctr"].tolist() == _read_ours(columns)["pctr"].tolist() == [0.5, 0.25]


@pytest.mark.process
def test_yardstick_answers_as_a_process(tmp_path: Path) -> None:
    model = _model(tmp_path / "model.onnx", is_plain=False)
    launch = Launch(
        python=Path(sys.executable),
        port=free_port(),
        directory=tmp_path,
        environment={"PEER_MODEL": str(model), "PEER_MAX_REQUESTS": "4"},
        inputs={},
        outputs=("pctr",),
    )
    peer, blocks = PEERS["asgi"], _blocks(3, seed=1)
    (form,) = peer.formats
    assert form.read is not None
    with running_peer(peer, launch, cpu=None) as (url, _):
        answer = httpx.post(f"{url}{peer.path}", content=form.encode(blocks)[0])
    assert form.read(answer.content)["pctr"].tolist() == pytest.approx(_expected(blocks), rel=1e-5)
    for gather in (False, True):
        assert model_cpu_us(model, [blocks], cpu=None, gather=gather) > 0.0


def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    launch = Launch(
        python=Path(sys.executable),
        port=free_port(),
        directory=tmp_path,
        environment={"PEER_MODEL": str(tmp_path / "no.onnx"), "PEER_MAX_REQUESTS": "4"},
        inputs={},
        outputs=(),
    )
    with (
        pytest.raises(RuntimeError, match=r"no\.onnx"),
        running_peer(PEERS["asgi"], launch, cpu=None),
    ):
        pass


def test_every_requirement_of_a_peer_is_pinned() -> None:
    files = {peer.requirements for peer in PEERS.values() if peer.requirements is not None}
    assert files == {path.name for path in REQUIREMENTS.iterdir()}
    for name in files:
        lines = (REQUIREMENTS / name).read_text().split()
        assert len(lines) > 20
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def _row(server: str, form: str, outside_us: float, *, void: int = 0) -> Row:
    fields: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__, 1.0)
    given = {"server": server, "format": form, "outside_us": outside_us, "void": void, "each": []}
    return Row(**{**fields, **given})


def _comparison(*rows: Row, graph: str = "served") -> Comparison:
    return Comparison(graph=graph, model_us={}, rate=1.0, run_by_metrics_us=1.0, rows=list(rows))


def test_ratios_are_held_against_peers_asked_in_json_with_the_served_graph() -> None:
    ours, triton, bento = (
        _row(OURS, "JSON ids, rows", 100.0),
        _row("Triton, Python backend", "JSON", 190.0),
        _row("BentoML", "JSON", 401.0),
    )
    assert [p.split(",")[0] for p in _problems(_comparison(ours, triton, bento))] == ["Triton"]
    assert _problems(_comparison(ours, triton, bento, graph="plain")) == []
    binary = _row("Triton, Python backend", "binary", 50.0)
    assert _problems(_comparison(ours, binary)) == []
    assert len(_problems(_comparison(ours, _row("LitServe", "base64", 1.0, void=2)))) == 1
