"""CPU of the model run alone: what no server around it can avoid, and so no comparison of them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from loadtest.peers.encoded import arrays_of
from loadtest.procs import pinned
from model.contract.blocks import Blocks

_WARM_UP, _RUNS = 20, 300


def model_cpu_us(
    model: Path, blocks: Sequence[Blocks], *, cpu: int | None, gather: bool = False
) -> float:
    """Median CPU time of one run, one request a run, one thread; microseconds.

    Args:
        model: ONNX file.
        blocks: Requests, taken in turn.
        cpu: Core to measure on.
        gather: Whether request rows are repeated for each candidate first, outside the time; always
            for a model that takes no `request_of`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    with pinned(cpu):
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = {entry.name for entry in session.get_inputs()}
        feeds = [_feeds(one, names, gather=gather) for one in blocks[:_RUNS]]
        used = []
        for number in range(_WARM_UP + _RUNS):
            feed = feeds[number % len(feeds)]
            began_at = time.thread_time_ns()
            session.run(None, feed)
            used.append(time.thread_time_ns() - began_at)
    return round(float(np.median(used[_WARM_UP:])) / 1e3, 1)


def _feeds(
    blocks: Blocks, names: set[str], *, gather: bool
) -> dict[str, npt.NDArray[Any]]:  # Any: int64 and float32
    arrays, request_of = arrays_of(blocks), blocks.request_of
    if gather or "request_of" not in names:
        gathered = {n: a[request_of] for n, a in arrays.items() if n.startswith("request_")}
        arrays, request_of = {**arrays, **gathered}, np.arange(len(request_of))
    return {**arrays, "request_of": request_of} if "request_of" in names else arrays
