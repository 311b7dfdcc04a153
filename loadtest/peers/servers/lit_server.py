"""LitServe: one API process, one worker, batches of requests."""

import os
import sys
from typing import Any

import litserve
from graph import Graph, to_lists


class ScoreAPI(litserve.LitAPI):
    """Decodes, joins, runs, splits: the framework's four steps."""

    def setup(self, device: str) -> None:
        del device
        self._graph = Graph()

    # No annotation: the framework would take one for the shape of the HTTP request.
    def decode_request(self, request) -> Any:  # type: ignore[no-untyped-def]  # see above
        return self._graph.parse(request["request"])

    def batch(self, inputs: Any) -> Any:
        return inputs

    def predict(self, x: Any) -> Any:
        # With batches of one the framework hands over the request itself.
        return self._graph.run(x) if isinstance(x, list) else self._graph.run([x])[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> Any:
        return to_lists(output)


if __name__ == "__main__":
    api = ScoreAPI(
        max_batch_size=int(os.environ["PEER_MAX_REQUESTS"]), batch_timeout=0.001, api_path="/score"
    )
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
