"""CPU of the model run alone: what no server around it can avoid, and so no comparison of them."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from loadtest.peers.encoded import arrays_of
from loadtest.procs import pinned
from model.contract.blocks import Blocks

_WARM_UP, _RUNS = 20, 300


def model_cpu_us(model: Path, blocks: Sequence[Blocks], *, cpu: int | None) -> float:
    """Median CPU time of one run, one request a run, one thread; microseconds.

    Args:
        model: ONNX file; request rows are repeated for one that takes no `request_of`.
        blocks: Requests, taken in turn.
        cpu: Core to measure on.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    with pinned(cpu):
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = {entry.name for entry in session.get_inputs()}
        feeds = []
        for one in blocks[:_RUNS]:
            arrays = arrays_of(one)
            if "request_of" in names:
                feeds.append({**arrays, "request_of": one.request_of})
            else:
                gathered = {n: a[one.request_of] for n, a in arrays.items() if "request" in n}
                feeds.append({**arrays, **gathered})
        used = []
        for number in range(_WARM_UP + _RUNS):
            feed = feeds[number % len(feeds)]
            began_at = time.thread_time_ns()
            session.run(None, feed)
            used.append(time.thread_time_ns() - began_at)
    return round(float(np.median(used[_WARM_UP:])) / 1e3, 1)
