"""What a graph costs: parameters and CPU time per run, on one ONNX Runtime thread."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.bundle import Bundle

ROWS = (1, 20, 100, 400)
REPEATS = 200


def run_cost(bundle: Bundle) -> dict[str, float]:
    """Parameters, and median CPU microseconds per run at several numbers of candidates."""
    # Imported here: what is not a graph is timed without them.
    import onnx

    from model.export import make_session

    session = make_session(bundle.model)
    graph = onnx.load_model_from_string(bundle.model).graph
    parameters = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    cost: dict[str, float] = {"parameters": parameters}
    for rows in ROWS:
        feeds = one_request(bundle.golden.blocks, rows).feeds()
        median = cpu_microseconds(partial(session.run, None, feeds))
        cost[f"CPU us per run of {rows} candidates"] = round(median, 1)
    return cost


def cpu_microseconds(run: Callable[[], object]) -> float:
    """Median CPU time of one call on this thread, in microseconds."""
    times = []
    for _ in range(REPEATS):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return float(np.median(times)) * 1e6


def one_request(blocks: Blocks, rows: int) -> Blocks:
    """The first request of some blocks with `rows` candidates, repeated as needed."""
    take = np.arange(rows) % len(blocks)
    return Blocks(
        request=RequestBlock(
            ids=blocks.request.ids[:1],
            dense=blocks.request.dense[:1],
            history=blocks.request.history[:1],
        ),
        candidate=CandidateBlock(
            ids=blocks.candidate.ids[take], dense=blocks.candidate.dense[take]
        ),
        request_of=np.zeros(rows, np.int64),
    )
