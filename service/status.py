"""Whether the service takes requests, as routes, server and swaps see it."""

from collections.abc import Awaitable, Callable

from service.errors import NotReady, ServiceError, ShuttingDown
from service.observe import Metrics
from service.scorer import Scorer


class ServiceStatus:
    """Changes; one per app."""

    def __init__(self, metrics: Metrics) -> None:
        """Starts without a scorer: not ready."""
        self.metrics = metrics
        self.scorer: Scorer | None = None
        self.is_draining = False
        # Of this process; several workers put one in its place that tells of all of them.
        self.render_metrics: Callable[[], Awaitable[bytes]] = self._render_metrics

    def model_wait_s(self) -> float:
        """Predicted seconds until the model will have run what it was given; 0 without one."""
        return 0.0 if self.scorer is None else self.scorer.model_wait_s

    def set_scorer(self, scorer: Scorer | None) -> None:
        """Begins to score, or (None) ceases to."""
        self.scorer = scorer
        self.metrics.ready_changed(is_ready=scorer is not None and not self.is_draining)

    def begin_drain(self) -> None:
        """Fails readiness; requests are still scored."""
        self.is_draining = True
        self.metrics.ready_changed(is_ready=False)

    def require_scorer(self) -> Scorer:
        """The scorer.

        Raises:
            NotReady, ShuttingDown: There is none yet, or no longer.
        """
        if self.scorer is None:
            raise self._unavailable()
        return self.scorer

    def require_ready(self) -> Scorer:
        """The scorer, unless the service is draining.

        Raises:
            NotReady, ShuttingDown: See above.
        """
        if self.is_draining:
            raise self._unavailable()
        return self.require_scorer()

    async def _render_metrics(self) -> bytes:
        return self.metrics.render()

    def _unavailable(self) -> ServiceError:
        if self.is_draining:
            return ShuttingDown("the service is shutting down")
        return NotReady("no bundle is being served yet")
