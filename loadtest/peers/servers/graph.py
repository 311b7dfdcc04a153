"""The model inside a peer: requests as encoded rows in, probabilities out; numpy and ONNX Runtime.

A request is an object of the four arrays by name, or one base64 text of their little-endian bytes
one after another: request_ids int64 [F], request_dense float32 [D], candidate_ids int64 [N, f],
candidate_dense float32 [N, d].
"""

import base64
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

DTYPES = {
    "request_ids": np.int64,
    "request_dense": np.float32,
    "candidate_ids": np.int64,
    "candidate_dense": np.float32,
}
Arrays = dict[str, Any]  # Any: arrays of two kinds


class Graph:
    """One session with one thread; PEER_MODEL names the file.

    With PEER_GATHER=1 a request's own row is repeated for each of its candidates before the run, as
    a model without `request_of` needs it in any case.
    """

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        path = os.environ["PEER_MODEL"]
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.widths = {entry.name: entry.shape[1] for entry in inputs if entry.name in DTYPES}
        self.takes_request_of = any(entry.name == "request_of" for entry in inputs)
        self.gathers = os.environ.get("PEER_GATHER") == "1" or not self.takes_request_of
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def parse(self, given: Any) -> Arrays:
        """Arrays of one request, the request's own with one row."""
        if isinstance(given, str):
            return self._parse_bytes(base64.b64decode(given))
        return {
            name: np.asarray(given[name], DTYPES[name]).reshape(-1, width)
            for name, width in self.widths.items()
        }

    def run(self, requests: Sequence[Arrays]) -> list[Arrays]:
        """All in one run; each its own outputs, float32 [N] by name."""
        sizes = [len(request["candidate_ids"]) for request in requests]
        feeds = {name: np.concatenate([r[name] for r in requests]) for name in self.widths}
        request_of = np.repeat(np.arange(len(requests)), sizes)
        if self.gathers:
            for name in feeds:
                if name.startswith("request_"):
                    feeds[name] = feeds[name][request_of]
            request_of = np.arange(len(request_of))
        if self.takes_request_of:
            feeds["request_of"] = request_of
        ends = np.cumsum(sizes)[:-1]
        columns = [np.split(values, ends) for values in self.session.run(self.outputs, feeds)]
        return [dict(zip(self.outputs, parts, strict=True)) for parts in zip(*columns, strict=True)]

    def _parse_bytes(self, data: bytes) -> Arrays:
        arrays, start = {}, 0
        row = sum(
            width * np.dtype(DTYPES[name]).itemsize
            for name, width in self.widths.items()
            if name.startswith("candidate_")
        )
        head = sum(
            width * np.dtype(DTYPES[name]).itemsize
            for name, width in self.widths.items()
            if name.startswith("request_")
        )
        count = (len(data) - head) // row
        for name in DTYPES:
            if name not in self.widths:
                continue
            rows = 1 if name.startswith("request_") else count
            size = rows * self.widths[name]
            values = np.frombuffer(data, DTYPES[name], count=size, offset=start)
            arrays[name] = values.reshape(rows, self.widths[name])
            start += values.nbytes
        return arrays


def to_lists(outputs: Arrays) -> dict[str, list[float]]:
    """Outputs as JSON takes them."""
    return {name: values.tolist() for name, values in outputs.items()}
