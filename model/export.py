"""Export: network and calibrators to one ONNX graph, checked against torch, written as a bundle."""

import io
import json
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from model.calibrate import Calibrator, CalibratorLayer
from model.contract.blocks import Blocks, CandidateBlock, ItemColumns, RequestBlock
from model.contract.bundle import (
    HISTOGRAMS,
    ITEM_SIDE,
    MODEL,
    MODEL_BY_ITEM,
    PARITY_ABSOLUTE,
    PARITY_RELATIVE,
    SCHEMA,
    Golden,
    ItemParts,
    golden_files,
    parity_excess,
    write_bundle,
)
from model.contract.encode import Encoder
from model.contract.errors import ParityError
from model.contract.log_spec import num_unserved
from model.contract.spec import UNKNOWN_CODE, Schema
from model.cost import are_parts_faster
from model.dataset import EncodedSplit
from model.golden import golden_requests, synthetic_requests
from model.histograms import histograms
from model.nets.layers import Net, NetInput
from model.serving_graph import ServingGraph, chain_outputs
from model.serving_items import item_parts

NUM_PARITY_ROWS = 100_000
INPUT_NAMES = (
    "request_ids",
    "request_dense",
    "request_history",
    "candidate_ids",
    "candidate_dense",
    "request_of",
)
FORBIDDEN_OPERATORS = {"Loop", "Scan", "If", "SequenceConstruct", "ConcatFromSequence"}

Probabilities = dict[str, npt.NDArray[np.float32]]


class ScoringGraph(nn.Module):
    """Blocks to probabilities: network, calibrators, then the chain's product.

    Args:
        net: trained.
        calibrators: one per step.
        num_unserved: steps at the chain's start that are factors and no outputs.
    """

    def __init__(
        self, net: Net, calibrators: Sequence[Calibrator], *, num_unserved: int = 0
    ) -> None:
        super().__init__()
        self.net = net
        self.num_unserved = num_unserved
        self.calibrators = nn.ModuleList([CalibratorLayer(c) for c in calibrators])

    def forward(
        self,
        request_ids: Tensor,
        request_dense: Tensor,
        request_history: Tensor,
        candidate_ids: Tensor,
        candidate_dense: Tensor,
        request_of: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `chain_outputs`."""
        logits = self.net(
            NetInput(
                request_ids=request_ids,
                request_dense=request_dense,
                request_history=request_history,
                candidate_ids=candidate_ids,
                candidate_dense=candidate_dense,
                request_of=request_of,
            )
        ).logits
        # Not sigmoid: ONNX Runtime's is exact to 1e-7 absolute only, 1e-3 of a probability of 1e-4.
        conditional = [
            1.0 / (1.0 + torch.exp(-calibrate(logits[:, t])))
            for t, calibrate in enumerate(self.calibrators)
        ]
        return chain_outputs(conditional, num_unserved=self.num_unserved)


def scoring_graph(net: Net, calibrators: Sequence[Calibrator], *, schema: Schema) -> ScoringGraph:
    """The graph of a schema's chain, ready to be exported."""
    return ScoringGraph(net, calibrators, num_unserved=num_unserved(schema.steps)).eval()


def export_bundle(
    net: Net,
    calibrators: Sequence[Calibrator],
    *,
    encoder: Encoder,
    train: EncodedSplit,
    out: Path,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    last_time: float,
    in_parts: bool | None = None,
) -> Path:
    """Writes a bundle under `out` and returns its directory, named by its digest.

    If it can be, the network is written in two parts as well: where they are faster than the whole
    (see `cost.are_parts_faster`) if `in_parts` is None, else as that says.

    Raises:
        ParityError: the graph, run by ONNX Runtime, does not score as torch does; nothing is
            written.
    """
    graph = scoring_graph(net, calibrators, schema=encoder.schema)
    names = encoder.schema.output_names
    raw = golden_requests(encoder, last_time=last_time)
    blocks = raw.encode(encoder)
    serving = ServingGraph(net, calibrators, num_unserved=graph.num_unserved).eval()
    model = optimised(to_onnx(serving, blocks=blocks, outputs=names))
    parts = None if in_parts is False else parts_to_onnx(serving, blocks, encoder)
    if parts is not None and not (in_parts or are_parts_faster(model, parts, blocks)):
        parts = None
    check_parity(graph, model, parts, encoder=encoder, last_time=last_time)
    golden = Golden(
        time=raw.time,
        request_columns=raw.request_columns,
        candidate_columns=raw.candidate_columns,
        blocks=blocks,
        expected=run_torch(graph, blocks, names),
    )
    fitted = encoder.fitted
    return write_bundle(
        out,
        manifest={
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "schema_sha256": fitted.schema_.sha256,
            "steps": [step.name for step in fitted.schema_.steps],
            "inputs": {name: str(array.dtype) for name, array in blocks.feeds().items()},
            "outputs": list(names),
            "training": dict(training),
            "metrics": dict(metrics),
            "calibration": _described(fitted.schema_, calibrators),
            "tool_versions": tool_versions(),
            **({} if parts is None else {"item_features": list(parts.features)}),
        },
        files={
            **_model_files(model, parts),
            SCHEMA: fitted.model_dump_json(by_alias=True).encode(),
            HISTOGRAMS: histograms(train, encoder).model_dump_json().encode(),
            **golden_files(golden),
        },
    )


def _model_files(model: bytes, parts: ItemParts | None) -> dict[str, bytes]:
    if parts is None:
        return {MODEL: model}
    return {MODEL: model, ITEM_SIDE: parts.item_side, MODEL_BY_ITEM: parts.model}


def _described(schema: Schema, calibrators: Sequence[Calibrator]) -> dict[str, Any]:
    return {
        step.name: json.loads(calibrator.model_dump_json())
        for step, calibrator in zip(schema.steps, calibrators, strict=True)
    }


def plain_onnx(
    net: Net, calibrators: Sequence[Calibrator], *, encoder: Encoder, last_time: float
) -> bytes:
    """The training form through the exporter and nothing else, as ONNX bytes.

    What `ServingGraph` is compared with. It takes a bundle's inputs; to be plain in full, give it
    one request row per candidate (`cost.gathered`).
    """
    graph = scoring_graph(net, calibrators, schema=encoder.schema)
    blocks = golden_requests(encoder, last_time=last_time).encode(encoder)
    return to_onnx(graph, blocks=blocks, outputs=encoder.schema.output_names)


def optimised(model: bytes) -> bytes:
    """The model as ONNX Runtime's own fusions leave it, those of one processor left out."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / MODEL
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()


def to_onnx(
    graph: nn.Module,
    *,
    blocks: Blocks,
    outputs: Sequence[str],
    inputs: Sequence[str] = INPUT_NAMES,
) -> bytes:
    """The graph as ONNX bytes; rows of requests and of candidates are free dimensions.

    Args:
        graph: its `forward` takes the inputs in their order.
        blocks: an example.
        outputs: names.
        inputs: names; those of no width are no inputs of the result.

    Raises:
        ParityError: the exporter made an operator that would run row by row.
    """
    given = NetInput.of(blocks)
    tensors = {name: getattr(given, name) for name in inputs}
    requests, candidates = torch.export.Dim("requests"), torch.export.Dim("candidates")
    dynamic = {
        name: {0: requests if name.startswith("request_") and name != "request_of" else candidates}
        for name in inputs
    }
    # It logs that torchvision is not there, which nothing here uses.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated calls and of shared axis names
        program = torch.onnx.export(
            graph,
            tuple(tensors.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(dynamic.values()),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    unused = {name for name in inputs if name not in blocks.feeds()}
    kept = [entry for entry in model.graph.input if entry.name not in unused]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    bad = sorted({node.op_type for node in model.graph.node} & FORBIDDEN_OPERATORS)
    if bad:
        raise ParityError(
            f"the exported graph holds {', '.join(bad)}", max_abs_diff=0.0, tolerance=0.0
        )
    onnx.checker.check_model(model)
    buffer = io.BytesIO()
    onnx.save_model(model, buffer)
    return buffer.getvalue()


def with_item_sum(blocks: Blocks, item_side: ort.InferenceSession) -> Blocks:
    """The blocks with `CandidateBlock.item_sum`, by a session of `ItemParts.item_side`."""
    feeds = blocks.feeds()
    (item_sum,) = item_side.run(
        None, {entry.name: feeds[entry.name] for entry in item_side.get_inputs()}
    )
    return replace(blocks, candidate=replace(blocks.candidate, item_sum=item_sum))


def parts_to_onnx(serving: ServingGraph, blocks: Blocks, encoder: Encoder) -> ItemParts | None:
    """The network in two parts, as `serving_items.item_parts` makes them; None if it does not."""
    columns = ItemColumns.of(encoder.schema)
    parts = item_parts(serving, columns)
    if parts is None:
        return None
    item_side = to_onnx(parts[0], blocks=blocks, inputs=INPUT_NAMES[3:5], outputs=("item_sum",))
    summed = with_item_sum(blocks, make_session(item_side))
    model = to_onnx(
        parts[1],
        blocks=summed,
        inputs=(*INPUT_NAMES, "item_sum"),
        outputs=encoder.schema.output_names,
    )
    return ItemParts(
        features=columns.features, item_side=optimised(item_side), model=optimised(model)
    )


def run_torch(graph: ScoringGraph, blocks: Blocks, names: Sequence[str]) -> Probabilities:
    """Probabilities by output name, by the trainer."""
    given = NetInput.of(blocks)
    with torch.inference_mode():
        outputs = graph(*(getattr(given, name) for name in INPUT_NAMES))
    return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}


def make_session(model: bytes) -> ort.InferenceSession:
    """A session on one thread."""
    return ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])


def session_options() -> ort.SessionOptions:
    """One thread, all optimisations, errors only in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def check_parity(
    graph: ScoringGraph,
    model: bytes,
    parts: ItemParts | None = None,
    *,
    encoder: Encoder,
    last_time: float,
) -> None:
    """Compares torch with ONNX Runtime on golden rows, hostile ids and 100,000 random rows.

    Raises:
        ParityError: a probability differs by more than PARITY_ABSOLUTE or PARITY_RELATIVE.
    """
    names = encoder.schema.output_names
    forms = {"the graph": _runner(model, names)}
    if parts is not None:
        forms["the graph in two parts"] = _runner(parts.model, names, item_side=parts.item_side)
    golden = golden_requests(encoder, last_time=last_time).encode(encoder)
    cases = {"golden rows": golden, "ids outside the tables": _with_hostile_ids(golden)}
    rng = np.random.default_rng(1)
    per_run = 10_000
    for part in range(NUM_PARITY_ROWS // per_run):
        requests = synthetic_requests(
            encoder, sizes=[50] * (per_run // 50), last_time=last_time, rng=rng
        )
        cases[f"random rows {part}"] = requests.encode(encoder)
    for case, blocks in cases.items():
        expected = run_torch(graph, blocks, names)
        for form, run in forms.items():
            _compare(expected, run(blocks), what=f"on {case}: {form}")
    for form, run in forms.items():
        hostile = run(cases["ids outside the tables"])
        unknown = run(_with_ids(golden, UNKNOWN_CODE))
        if not all(np.array_equal(hostile[name], unknown[name]) for name in names):
            raise ParityError(
                f"{form}: ids outside the tables do not score as unknown ids",
                max_abs_diff=0.0,
                tolerance=0.0,
            )


def _runner(
    model: bytes, names: Sequence[str], *, item_side: bytes | None = None
) -> Callable[[Blocks], Probabilities]:
    session = make_session(model)
    sums = None if item_side is None else make_session(item_side)

    def run(blocks: Blocks) -> Probabilities:
        given = blocks if sums is None else with_item_sum(blocks, sums)
        return dict(zip(names, session.run(list(names), given.feeds()), strict=True))

    return run


def _compare(expected: Probabilities, actual: Probabilities, *, what: str) -> None:
    for name, values in expected.items():
        largest, relative, fits = parity_excess(values, actual[name])
        if not fits:
            raise ParityError(
                f"{name} {what} differs from the network by {largest:.2e} absolute, "
                f"{relative:.2e} relative; allowed are {PARITY_ABSOLUTE} and {PARITY_RELATIVE}",
                max_abs_diff=largest,
                tolerance=PARITY_ABSOLUTE,
            )


def tool_versions() -> dict[str, str]:
    """Versions of what a bundle was made with."""
    names = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "polars", "ctr-scoring")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _with_hostile_ids(blocks: Blocks) -> Blocks:
    """Ids far outside every table, alternately negative and huge."""
    spoilt = _with_ids(blocks, -5)
    spoilt.candidate.ids[::2] = 2**40
    spoilt.request.ids[::2] = 2**40
    return spoilt


def _with_ids(blocks: Blocks, code: int) -> Blocks:
    return Blocks(
        request=RequestBlock(
            ids=np.full_like(blocks.request.ids, code),
            dense=blocks.request.dense,
            history=blocks.request.history,
        ),
        candidate=CandidateBlock(
            ids=np.full_like(blocks.candidate.ids, code), dense=blocks.candidate.dense
        ),
        request_of=blocks.request_of,
    )
