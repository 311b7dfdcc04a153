"""Triton, Python backend: one run per batch that Triton's dynamic batcher forms."""

import os
import sys
from typing import Any

# The backend's interpreter heeds no PYTHONPATH and sees no virtual environment.
sys.path.insert(0, os.environ["PEER_SITE_PACKAGES"])

import numpy as np
import triton_python_backend_utils as triton
from graph import Graph


class TritonPythonModel:
    """Each tensor has a leading dimension of 1: Triton counts requests, not rows."""

    def initialize(self, args: Any) -> None:
        del args
        self._graph = Graph()

    def execute(self, requests: Any) -> Any:
        parsed = [
            {
                name: triton.get_input_tensor_by_name(request, name).as_numpy().reshape(-1, width)
                for name, width in self._graph.widths.items()
            }
            for request in requests
        ]
        return [
            triton.InferenceResponse(
                [
                    triton.Tensor(name, np.ascontiguousarray(values).reshape(1, -1))
                    for name, values in answer.items()
                ]
            )
            for answer in self._graph.run(parsed)
        ]
