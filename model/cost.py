"""What a graph costs: parameters, multiply-adds, CPU time per run on one ONNX Runtime thread."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.contract.blocks import Blocks, RequestBlock
from model.contract.bundle import MODEL, MODEL_BY_ITEM, Bundle, ItemParts

ROWS = (1, 20, 100, 400)
REPEATS = 200
# A network is written in two parts if they take at most so much of the whole's time: what they cost
# beside it is memory.
WORTHWHILE_SHARE = 0.9
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")

Feeds = dict[str, Any]  # Any: int64 and float32 arrays side by side


def run_cost(bundle: Bundle) -> dict[str, float]:
    """Parameters, bytes, multiply-adds, and median CPU microseconds at several numbers of rows.

    Of the graph that is served: `ItemParts.model` of a bundle that has it, items' sums given.
    """
    # Imported here: what is not a graph is timed without them.
    import onnx

    from model.export import make_session

    model, blocks = served_form(bundle)
    session = make_session(model)
    graph = onnx.load_model_from_string(model).graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    per_request, per_candidate = multiply_adds(model, blocks)
    files = bundle.manifest.files
    cost: dict[str, float] = {
        "parameters": sum(int(np.prod(tensor.dims)) for tensor in floats),
        "bytes of the model": files[MODEL if bundle.parts is None else MODEL_BY_ITEM].bytes,
        "bytes of the bundle": sum(entry.bytes for entry in files.values()),
        "multiply-adds per request": per_request,
        "multiply-adds per candidate": per_candidate,
    }
    if bundle.parts is not None:
        item_sum = blocks.candidate.item_sum
        assert item_sum is not None
        cost["multiply-adds per item, once"] = multiply_adds(bundle.parts.item_side, blocks)[1]
        cost["bytes of memory per item"] = item_sum[0].nbytes
    for rows in ROWS:
        feeds = one_request(blocks, rows).feeds()
        median = cpu_microseconds(partial(session.run, None, feeds))
        cost[f"CPU us per run of {rows} candidates"] = round(median, 1)
        cost[f"CPU us per candidate of {rows}"] = round(median / rows, 2)
    return cost


def plain_model_of(run: Path) -> bytes:
    """The plain export of a training run, see `model.export.plain_onnx`."""
    from model.contract.encode import Encoder
    from model.export import plain_onnx
    from model.run import read_run

    read = read_run(run)
    return plain_onnx(
        read.net, read.calibrators, encoder=Encoder(read.fitted), last_time=read.last_time
    )


def cost_against_plain(bundle: Bundle, plain: bytes) -> dict[str, float]:
    """CPU time of the plain export on gathered request rows, and the bundle's share of it.

    Runs of both are interleaved, so that the machine's other work falls on both alike.
    """
    from model.export import make_session

    model, golden = served_form(bundle)
    served, other = make_session(model), make_session(plain)
    cost: dict[str, float] = {}
    for rows in ROWS:
        given = one_request(bundle.golden.blocks, rows)
        ours, theirs = interleaved_microseconds(
            [
                partial(served.run, None, one_request(golden, rows).feeds()),
                partial(other.run, None, gathered(given).feeds()),
            ]
        )
        cost[f"CPU us per plain run of {rows} candidates"] = round(theirs, 1)
        cost[f"served : plain at {rows}"] = round(ours / theirs, 3)
    return cost


def served_form(bundle: Bundle) -> tuple[bytes, Blocks]:
    """The model that a service runs, and the golden blocks as it is given them."""
    from model.export import make_session, with_item_sum

    blocks = bundle.golden.blocks
    if bundle.parts is None:
        return bundle.model, blocks
    return bundle.parts.model, with_item_sum(blocks, make_session(bundle.parts.item_side))


def are_parts_faster(model: bytes, parts: ItemParts, blocks: Blocks) -> bool:
    """Whether 100 and 400 candidates take less time by `WORTHWHILE_SHARE`, items' sums given.

    Args:
        model: the whole.
        parts: of the same network.
        blocks: from which rows are taken.
    """
    from model.export import make_session, with_item_sum

    whole, by_item = make_session(model), make_session(parts.model)
    summed = with_item_sum(blocks, make_session(parts.item_side))
    for rows in ROWS[-2:]:
        ours, theirs = interleaved_microseconds(
            [
                partial(by_item.run, None, one_request(summed, rows).feeds()),
                partial(whole.run, None, one_request(blocks, rows).feeds()),
            ]
        )
        if ours > WORTHWHILE_SHARE * theirs:
            return False
    return True


def multiply_adds(model: bytes, blocks: Blocks) -> tuple[int, int]:
    """Multiply-adds of the graph's matrix products: per request, and per candidate on top of that.

    The shapes are those of three runs: each product is linear in both numbers of rows.

    Args:
        model: an ONNX file's content.
        blocks: from which rows are taken; at least two requests.
    """
    counted = [
        _multiply_adds_of_a_run(model, _some_rows(blocks, *rows).feeds())
        for rows in ((1, 3), (1, 4), (2, 4))
    ]
    return counted[2] - counted[1], counted[1] - counted[0]


def cpu_microseconds(run: Callable[[], object]) -> float:
    """Median CPU time of one call on this thread, in microseconds."""
    return interleaved_microseconds([run])[0]


def interleaved_microseconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median CPU time of a call of each, on this thread, called in turn."""
    times = np.empty((REPEATS, len(runs)))
    for repeat in range(REPEATS):
        for i, run in enumerate(runs):
            started = time.thread_time()
            run()
            times[repeat, i] = time.thread_time() - started
    return [float(median) * 1e6 for median in np.median(times, axis=0)]


def one_request(blocks: Blocks, rows: int) -> Blocks:
    """The first request of some blocks with `rows` candidates, repeated as needed."""
    return _some_rows(blocks, 1, rows)


def gathered(blocks: Blocks) -> Blocks:
    """The same with one request row per candidate, as a server of plain tensors is given them."""
    rows = blocks.request_of
    return Blocks(
        request=RequestBlock(
            ids=blocks.request.ids[rows],
            dense=blocks.request.dense[rows],
            history=blocks.request.history[rows],
        ),
        candidate=blocks.candidate,
        request_of=np.arange(len(rows), dtype=np.int64),
    )


def _some_rows(blocks: Blocks, num_requests: int, num_candidates: int) -> Blocks:
    take = np.arange(num_candidates) % len(blocks)
    return Blocks(
        request=RequestBlock(
            ids=blocks.request.ids[:num_requests],
            dense=blocks.request.dense[:num_requests],
            history=blocks.request.history[:num_requests],
        ),
        candidate=blocks.candidate.take(take),
        request_of=np.arange(num_candidates, dtype=np.int64) % num_requests,
    )


def _multiply_adds_of_a_run(model: bytes, feeds: Feeds) -> int:
    """By running the graph with the products' operands and results as its outputs."""
    import onnx
    import onnxruntime as ort

    proto = onnx.load_model_from_string(model)
    feeds = {entry.name: feeds[entry.name] for entry in proto.graph.input}
    products = [node for node in proto.graph.node if node.op_type in PRODUCTS]
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    shapes |= {name: array.shape for name, array in feeds.items()}
    names = {name for node in products for name in (node.input[0], node.output[0])}
    wanted = sorted(names - shapes.keys())
    present = {entry.name for entry in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in wanted
        if name not in present
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = session.run(wanted, feeds) if wanted else []
    shapes |= {name: array.shape for name, array in zip(wanted, arrays, strict=True)}
    total = 0
    for node in products:
        is_turned = any(a.name == "transA" and a.i for a in node.attribute)
        inner = shapes[node.input[0]][-2 if is_turned else -1]
        total += int(np.prod(shapes[node.output[0]], dtype=np.int64)) * inner
    return total
