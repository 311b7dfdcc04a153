"""A tiny schema with every feature kind, a hand-built graph for it, and the bundle around them.

The graph is no network: every code and number of a row is bent by a sine and summed, so that each
column of the blocks moves each output.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import polars as pl
from onnx import TensorProto, helper, numpy_helper

from model.contract.blocks import BlockLayout, Blocks
from model.contract.bundle import (
    HISTOGRAMS,
    MODEL,
    SCHEMA,
    Golden,
    golden_files,
    write_bundle,
)
from model.contract.encode import Encoder
from model.contract.ids import hash_ids
from model.contract.record import HistoryEntries, MatchEntries, RecentEntries, UserRecord
from model.contract.spec import Feature, FittedSchema, Moments, Schema, parse_schema
from model.dataset import EncodedSplit

NOON = 1_700_049_600.0  # 2023-11-15T12:00:00Z, a Wednesday
NOON_TEXT = "2023-11-15T12:00:00Z"
DAY = 86_400

SCHEMA_CONTENT: dict[str, Any] = {
    "time_zone": "Europe/Berlin",
    "steps": [{"name": "click", "label": "click"}, {"name": "conversion", "label": "conversion"}],
    "features": [
        {"name": "age_band", "kind": "categorical", "scope": "user", "source": "store"},
        {
            "name": "loyalty",
            "kind": "categorical",
            "scope": "user",
            "source": "request",
            "default": "none",
        },
        {
            "name": "trips",
            "kind": "numeric",
            "scope": "user",
            "source": "store",
            "log1p": True,
            "minimum": 0,
        },
        {"name": "last_trip", "kind": "elapsed", "scope": "user", "source": "store"},
        {"name": "recent", "kind": "history", "of": "item_id", "max_length": 4},
        {
            "name": "visits",
            "kind": "recent",
            "column": "lines",
            "context": "store_id",
            "windows_days": [7, 30],
            "large": 20,
            "max_length": 5,
        },
        {
            "name": "store_id",
            "kind": "hashed",
            "scope": "context",
            "source": "request",
            "num_buckets": 50,
        },
        {
            "name": "basket",
            "kind": "numeric",
            "scope": "context",
            "source": "request",
            "default": 3,
        },
        {"name": "hour", "kind": "time_part", "part": "hour"},
        {"name": "weekday", "kind": "time_part", "part": "weekday"},
        {
            "name": "item_id",
            "kind": "hashed",
            "scope": "item",
            "source": "items",
            "num_buckets": 97,
        },
        {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"},
        {
            "name": "price",
            "kind": "numeric",
            "scope": "item",
            "source": "items",
            "log1p": True,
            "minimum": 0,
            "maximum": 1000,
        },
        {
            "name": "display",
            "kind": "categorical",
            "scope": "cross",
            "source": "request",
            "default": "0",
        },
        {"name": "discount", "kind": "numeric", "scope": "cross", "source": "request"},
        {
            "name": "position",
            "kind": "numeric",
            "scope": "cross",
            "source": "log_only",
            "serving_value": 1,
        },
        {"name": "bought_item", "kind": "match", "attribute": "item_id"},
        {"name": "bought_brand", "kind": "match", "attribute": "brand", "max_age_days": 90},
    ],
}

VOCABULARIES = {
    "age_band": ("25-34", "35-44", "65+"),
    "loyalty": ("none", "gold"),
    "brand": ("acme", "bolt", "7"),
    "display": ("0", "1", "5"),
}


def schema() -> Schema:
    return parse_schema(SCHEMA_CONTENT)


def feature_kinds() -> set[str]:
    """Every kind of feature that the contract knows."""
    union, *_ = get_args(Feature)
    return {kind.model_fields["kind"].default for kind in get_args(union)}


def fitted_schema() -> FittedSchema:
    return FittedSchema(
        schema=schema(),
        vocabularies=VOCABULARIES,
        moments={
            "trips": Moments(mean=2.0, std=1.5),
            "visits_count_30": Moments(mean=0.5, std=0.4),
            "price": Moments(mean=1.2, std=0.7),
            "bought_item_count": Moments(mean=0.8, std=0.5),
            "bought_brand_days": Moments(mean=2.5, std=1.0),
        },
    )


def graph(encoder: Encoder, *, seed: int = 3) -> bytes:
    """Inputs as `Blocks.feeds`, outputs pctr, pctcvr, pcvr."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, npt.NDArray[Any]] = {}
    request = _side("request", encoder.request_layout, rng, nodes, constants)
    candidate = _side("candidate", encoder.candidate_layout, rng, nodes, constants)
    constants["bias"] = np.array([-1.5, -2.0], np.float32)
    nodes += [
        helper.make_node("Gather", [request, "request_of"], ["gathered"], axis=0),
        helper.make_node("Add", ["gathered", candidate], ["sum"]),
        helper.make_node("Add", ["sum", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["conditional"]),
    ]
    for j, name in enumerate(("pctr", "pcvr")):
        constants[f"column_{name}"] = np.array(j, np.int64)
        nodes.append(helper.make_node("Gather", ["conditional", f"column_{name}"], [name], axis=1))
    nodes.append(helper.make_node("Mul", ["pctr", "pcvr"], ["pctcvr"]))
    inputs = [
        _input("request_ids", TensorProto.INT64, len(encoder.request_layout.ids)),
        _input("request_dense", TensorProto.FLOAT, len(encoder.request_layout.dense_columns)),
        _input("request_history", TensorProto.INT64, encoder.request_layout.history_width),
        _input("candidate_ids", TensorProto.INT64, len(encoder.candidate_layout.ids)),
        _input("candidate_dense", TensorProto.FLOAT, len(encoder.candidate_layout.dense_columns)),
        helper.make_tensor_value_info("request_of", TensorProto.INT64, ["N"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])
        for name in encoder.schema.output_names
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            inputs,
            outputs,
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def record(**changes: Any) -> UserRecord:
    """A household that bought items 1 and 3, made a day before NOON."""
    fields: dict[str, Any] = {
        "updated_at": NOON - DAY,
        "features": {"age_band": "35-44", "trips": 40, "last_trip": NOON - 3 * DAY, "unheard": 1},
        "matches": {
            "bought_item": match_entries({"1": (3, NOON - 12 * DAY), "3": (1, NOON - 2 * DAY)}),
            "bought_brand": match_entries({"acme": (9, NOON - 2 * DAY)}),
            "unheard": match_entries({"1": (1, NOON)}),
        },
        "histories": {
            "recent": HistoryEntries(
                ids=(3, 1), times=np.array([NOON - 2 * DAY, NOON - 12 * DAY], np.int64)
            )
        },
        "recents": {
            "visits": recent_entries([(4.0, 2, "31"), (25.0, 9, None), (7.5, 40, "8")]),
            "unheard": recent_entries([(1.0, 1, "31")]),
        },
    }
    return UserRecord(**{**fields, **changes})


def match_entries(seen: dict[str, tuple[int, float]]) -> MatchEntries:
    keys = hash_ids(seen)
    order = np.argsort(keys)
    counts = np.array([count for count, _ in seen.values()], np.uint32)
    times = np.array([time for _, time in seen.values()], np.int64)
    return MatchEntries(keys=keys[order], counts=counts[order], last_times=times[order])


def recent_entries(events: list[tuple[float, float, str | None]]) -> RecentEntries:
    """Of (value, days before NOON, context), newest first."""
    return RecentEntries(
        values=np.array([value for value, _, _ in events], np.float32),
        times=np.array([NOON - days * DAY for _, days, _ in events], np.int64),
        keys=hash_ids([context for _, _, context in events]),
    )


def item_snapshot() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [1, 2, 3, 4],
            "brand": ["acme", "bolt", "7", None],
            "price": [2.5, None, 99.0, 1.0],
            "colour": ["red", "red", "blue", "red"],
        }
    )


def golden(encoder: Encoder, model: bytes) -> Golden:
    """Six requests: ordinary, of an unknown user, of one candidate, with full histories."""
    rng = np.random.default_rng(5)
    num_requests, counts = 6, [1, 2, 10, 3, 20, 4]
    num_rows = sum(counts)
    request_columns: dict[str, list[Any]] = {
        "age_band": ["25-34", None, "65+", "unheard", "35-44", None],
        "loyalty": ["gold", None, "none", None, "gold", "unheard"],
        "trips": [3, None, 0, 12, 400, 7],
        "last_trip": [NOON - DAY, None, NOON - 90 * DAY, NOON, NOON + DAY, NOON - 1],
        "recent": [["1", "2", "3", "4", "5"], None, [], ["9"], ["2", "2"], ["1"]],
        "recent_time": [
            [NOON - i for i in range(5)],
            None,
            [],
            [NOON - DAY],
            [NOON + DAY, NOON - 1],
            [NOON],
        ],
        "visits": [[3, 30, 2.5], None, [], [20], [8, 1, 2, 3, 4, 5], [1]],
        "visits_time": [
            [NOON - i * 5 * DAY for i in range(3)],
            None,
            [],
            [NOON - DAY],
            [NOON + 29 * 3600 - i * DAY for i in range(6)],
            [NOON],
        ],
        "visits_store_id": [
            ["31", None, "8"],
            None,
            [],
            ["31"],
            ["8", "31", "8", "8", None, "31"],
            ["8"],
        ],
        "store_id": ["31", "32", None, "31", "8", "31"],
        "basket": [1, 2, None, 4, 5, 6],
    }
    candidate_columns: dict[str, list[Any]] = {
        "item_id": [str(i) for i in rng.integers(1, 9, num_rows)],
        "brand": [["acme", "bolt", "7", "unheard", None][i] for i in rng.integers(0, 5, num_rows)],
        "price": [None if i == 0 else float(i) for i in rng.integers(0, 200, num_rows)],
        "display": [["0", "1", "5", None][i] for i in rng.integers(0, 4, num_rows)],
        "discount": [float(x) for x in rng.random(num_rows)],
    }
    for name in ("bought_item", "bought_brand"):
        candidate_columns[f"{name}_count"] = rng.integers(0, 4, num_rows).tolist()
        candidate_columns[f"{name}_last_time"] = [
            float(NOON - days * DAY) for days in rng.integers(0, 120, num_rows)
        ]
    request_of = np.repeat(np.arange(num_requests), counts).astype(np.int64)
    time = np.array([NOON + 7 * 3600 * i for i in range(num_requests)], np.float64)
    blocks = Blocks(
        request=encoder.request_block(request_columns, time=time),
        candidate=encoder.candidate_block(candidate_columns, time=time[request_of]),
        request_of=request_of,
    )
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Golden(
        time=time,
        request_columns=request_columns,
        candidate_columns=candidate_columns,
        blocks=blocks,
        expected=dict(zip(names, session.run(names, blocks.feeds()), strict=True)),
    )


def encoded_split(blocks: Blocks, **changes: Any) -> EncodedSplit:
    """Rows of training data with these blocks: no label is 1, all are of one user."""
    count = len(blocks)
    fields: dict[str, Any] = {
        "request_ids": blocks.request.ids.astype(np.int32),
        "request_dense": blocks.request.dense,
        "request_history": blocks.request.history.astype(np.int32),
        "candidate_ids": blocks.candidate.ids.astype(np.int32),
        "candidate_dense": blocks.candidate.dense,
        "request_of": blocks.request_of,
        "label_values": np.zeros((count, 2), np.int8),
        "label_known": np.ones((count, 2), np.bool_),
        "weight": np.ones(count, np.float32),
        "user": np.zeros(count, np.int64),
    }
    return EncodedSplit(**{**fields, **changes})


def write(
    parent: Path,
    *,
    model: bytes | None = None,
    seed: int = 3,
    true_model: bytes | None = None,
    histograms: bytes = b"{}",
) -> Path:
    """Writes the bundle and returns its directory; `model` replaces the one it is true for."""
    fitted = fitted_schema()
    encoder = Encoder(fitted)
    true_model = graph(encoder, seed=seed) if true_model is None else true_model
    feeds = golden(encoder, true_model).blocks.feeds()
    return write_bundle(
        parent,
        manifest={
            "created_at": NOON_TEXT,
            "schema_sha256": fitted.schema_.sha256,
            "steps": [step.name for step in fitted.schema_.steps],
            "inputs": {name: str(array.dtype) for name, array in feeds.items()},
            "outputs": fitted.schema_.output_names,
            "training": {},
            "metrics": {},
            "calibration": {},
            "tool_versions": {},
        },
        files={
            SCHEMA: fitted.model_dump_json(by_alias=True).encode(),
            MODEL: true_model if model is None else model,
            HISTOGRAMS: histograms,
            **golden_files(golden(encoder, true_model)),
        },
    )


def _side(
    side: str,
    layout: BlockLayout,
    rng: np.random.Generator,
    nodes: list[onnx.NodeProto],
    constants: dict[str, npt.NDArray[Any]],
) -> str:
    terms = [_waves(f"{side}_ids", len(layout.ids), rng, nodes, constants, cast=True)]
    terms.append(_waves(f"{side}_dense", len(layout.dense_columns), rng, nodes, constants))
    if layout.history_width:
        terms.append(
            _waves(f"{side}_history", layout.history_width, rng, nodes, constants, cast=True)
        )
    nodes.append(helper.make_node("Sum", terms, [f"{side}_sum"]))
    return f"{side}_sum"


def _waves(
    name: str,
    width: int,
    rng: np.random.Generator,
    nodes: list[onnx.NodeProto],
    constants: dict[str, npt.NDArray[Any]],
    *,
    cast: bool = False,
) -> str:
    constants[f"{name}_phase"] = rng.uniform(0.3, 1.2, width).astype(np.float32)
    constants[f"{name}_weight"] = rng.normal(0.0, 0.3, (width, 2)).astype(np.float32)
    source = name
    if cast:
        source = f"{name}_float"
        nodes.append(helper.make_node("Cast", [name], [source], to=TensorProto.FLOAT))
    nodes += [
        helper.make_node("Mul", [source, f"{name}_phase"], [f"{name}_scaled"]),
        helper.make_node("Sin", [f"{name}_scaled"], [f"{name}_wave"]),
        helper.make_node("MatMul", [f"{name}_wave", f"{name}_weight"], [f"{name}_term"]),
    ]
    return f"{name}_term"


def _input(name: str, kind: int, width: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [f"{name}_rows", width])
