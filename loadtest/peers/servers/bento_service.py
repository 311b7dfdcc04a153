"""BentoML: adaptive batching over requests, one worker."""

import os
from typing import Any

import bentoml
from graph import Graph, to_lists


@bentoml.service(
    workers=1,
    traffic={"timeout": 10, "max_concurrency": 512},
    metrics={"enabled": True},
    logging={"access": {"enabled": False}},
)
class Score:
    """Requests arrive as lists of one; the server joins the lists of several callers."""

    def __init__(self) -> None:
        self._graph = Graph()

    @bentoml.api(
        route="/score",
        batchable=True,
        batch_dim=0,
        max_batch_size=int(os.environ["PEER_MAX_REQUESTS"]),
        max_latency_ms=1000,
    )
    def score(self, requests: list[Any]) -> list[Any]:
        """One answer per request."""
        answers = self._graph.run([self._graph.parse(given) for given in requests])
        return [to_lists(answer) for answer in answers]
