"""Every metric of the service and the format of its log; the only module that knows Prometheus.

Methods take what happened, in words of the service, and never raise for a value of the right
type: they are called in `finally`. Labels come from closed sets, so a worker exposes fewer than
300 lines whatever the traffic; writing them out stalls the event loop in proportion.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal, TextIO, get_args

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.batch_plan import DropReason
from service.errors import ServiceError, StoreError, error_codes
from service.histograms import Histogram, Histograms
from service.run_cost import RunCost

Stage = Literal["parse", "features", "encode", "queue", "run", "respond"]
DegradedReason = Literal["user_features", "stale_user_features"]
SwapPart = Literal["bundle", "items"]
NotLoggedReason = Literal["queue_full", "write_failed"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_MS = 1e-3
_LATENCY_BUCKETS_S = tuple(
    ms * _MS for ms in (0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 250, 1000)
)
_ROWS_BUCKETS = (1, 5, 10, 20, 50, 100, 150, 200, 300, 400, 600, 1000, 2000)
_REQUESTS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
_AGE_BUCKETS_S = (
    *(hours * _HOUR_S for hours in (1, 3, 6, 12)),
    *(days * _DAY_S for days in (1, 2, 3, 5, 7, 14, 30)),
)


def request_outcomes() -> tuple[str, ...]:
    """All values of the label `outcome`: what can become of one scoring request.

    `cancelled` is a caller that hung up, `internal_error` a bug. Errors of the store are not
    among them: they end as `degraded`.
    """
    codes = set(error_codes()) - set(error_codes(StoreError))
    return ("ok", "degraded", "cancelled", ServiceError.code, *sorted(codes))


class Metrics:
    """The metrics of one worker; also the observer of its `MicroBatcher`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Registers every metric.

        Args:
            registry: Where to; None makes one of its own, never the library's global one.

        Raises:
            ValueError: The registry holds these metrics already.
        """
        self._registry = CollectorRegistry() if registry is None else registry
        self._outcomes = frozenset(request_outcomes())
        self._init_requests()
        self._init_batches()
        self._init_features()
        self._init_state()

    def render(self) -> bytes:
        """Current values in the Prometheus text format, of `CONTENT_TYPE`; about 10 us a line."""
        return generate_latest(_WithoutCreated(self._registry))

    def families(self) -> "list[Family]":
        """Current values, for another process."""
        return [
            Family(
                m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples]
            )
            for m in _WithoutCreated(self._registry).collect()
        ]

    def request_finished(self, *, outcome: str, seconds: float, candidates: int = 0) -> None:
        """One scoring request ended.

        Args:
            outcome: `ok`, `degraded`, `cancelled`, or the error's code; see `request_outcomes`.
            seconds: From the first byte parsed to the last one handed over.
            candidates: How many were scored, 0 for a failure.

        Raises:
            ValueError: An outcome that is not in the closed set.
        """
        if outcome not in self._outcomes:
            raise ValueError(f"outcome: got {outcome!r}, expected one of {sorted(self._outcomes)}")
        # Lazily, unlike the other labels: 20 lines for each error that never happens add up.
        self._request_seconds.of(outcome).observe(seconds)
        if candidates:
            self._candidates.inc(candidates)

    def stage_finished(self, *, stage: Stage, seconds: float) -> None:
        """One stage of a request ended; `queue` and `run` are reported by the batcher."""
        self._stage_seconds[stage].observe(seconds)

    def batch_finished(self, *, rows: int, requests: int, run_seconds: float) -> None:
        """See `BatchObserver`; stage `run` is observed once per batch."""
        self._batch_rows.observe(rows)
        self._batch_requests.observe(requests)
        self._stage_seconds["run"].observe(run_seconds)

    def batch_split(self, *, requests: int) -> None:
        """See `BatchObserver`."""
        del requests
        self._batch_splits.inc()

    def request_waited(self, *, seconds: float) -> None:
        """See `BatchObserver`."""
        self._stage_seconds["queue"].observe(seconds)

    def request_dropped(self, *, reason: DropReason) -> None:
        """See `BatchObserver`."""
        self._batch_drops[reason].inc()

    def queue_changed(self, *, rows: int) -> None:
        """See `BatchObserver`."""
        self._queue_rows.set(rows)

    def wait_predicted(self, predict: Callable[[], float]) -> None:
        """Asked at every scrape for what admission is decided by, in seconds."""
        self._predicted_wait.set_function(predict)

    def run_cost_known(self, cost: RunCost) -> None:
        """What model runs cost was measured; the bundle before is forgotten."""
        self._max_batch_rows.set(cost.max_rows)
        self._run_fixed.set(cost.fixed_s)
        self._run_row.set(cost.row_s)

    def store_failed(self, error: StoreError) -> None:
        """The online store, or the record it gave, could not be used."""
        self._store_errors[error.code].inc()

    def degraded(self, reason: DegradedReason) -> None:
        """A request is being answered with defaults in place of something."""
        self._degraded[reason].inc()

    def unknown_items(self, count: int) -> None:
        """Candidates of one request that are not in the item table."""
        if count:
            self._unknown_items.inc(count)

    def unknown_user(self) -> None:
        """The online store has no record of a request's user."""
        self._unknown_users.inc()

    def ignored_features(self, count: int) -> None:
        """Features named in one request that the schema does not have."""
        if count:
            self._ignored_features.inc(count)

    def record_used(self, *, age_seconds: float) -> None:
        """A user record of this age, at the time of the request, was used."""
        self._record_age_seconds.observe(age_seconds)

    def non_finite_outputs(self, count: int) -> None:
        """Candidates of one request for which the model gave NaN or infinity."""
        if count:
            self._non_finite.inc(count)

    def bundle_served(self, *, bundle: str, schema: str) -> None:
        """This bundle is the one being served now; the one before disappears."""
        self._bundle_info.clear()
        self._bundle_info.labels(bundle, schema).set(1)

    def ready_changed(self, *, is_ready: bool) -> None:
        """The service began or ceased to take requests."""
        self._ready.set(int(is_ready))

    def item_table_changed(self, *, rows: int) -> None:
        """The item table being served has this many items."""
        self._item_table_rows.set(rows)

    def swapped(self, part: SwapPart) -> None:
        """A whole new state is in service, or one with other items."""
        self._swaps[part].inc()

    def swap_refused(self, part: SwapPart) -> None:
        """What should have been put in service is damaged or does not fit."""
        self._swap_refusals[part].inc()

    def requests_logged(self, count: int) -> None:
        """Requests of the sample are in a file of the request log."""
        self._logged_requests.inc(count)

    def requests_not_logged(self, count: int, *, reason: NotLoggedReason) -> None:
        """Requests of the sample are lost to the request log."""
        self._not_logged[reason].inc(count)

    def worker_restarted(self, times: int) -> None:
        """This process stands for a worker that has ended `times` times."""
        self._worker_restarts.inc(times)

    def worker_silent(self) -> None:
        """Another worker did not tell its metrics in time."""
        self._silent_workers.inc()

    def _init_requests(self) -> None:
        self._request_seconds = Histograms(
            "scoring_request_seconds",
            "Time from a scoring request to its answer, by what became of it",
            bounds=_LATENCY_BUCKETS_S,
            registry=self._registry,
            label="outcome",
            values=("ok", "degraded"),
        )
        stage_seconds = Histograms(
            "scoring_stage_seconds",
            "Time of one stage; queue per request in the batcher, run per model run",
            bounds=_LATENCY_BUCKETS_S,
            registry=self._registry,
            label="stage",
            values=get_args(Stage),
        )
        self._stage_seconds = {stage: stage_seconds.of(stage) for stage in get_args(Stage)}
        self._candidates = self._counter("candidates", "Candidates scored")
        self._degraded = self._counters(
            "degraded", "Requests answered with defaults", "reason", get_args(DegradedReason)
        )

    def _init_batches(self) -> None:
        self._batch_rows = self._histogram("batch_rows", "Rows of one model run", _ROWS_BUCKETS)
        self._batch_requests = self._histogram(
            "batch_requests", "Requests of one model run", _REQUESTS_BUCKETS
        )
        self._queue_rows = self._gauge("queue_rows", "Rows waiting for a model run")
        self._predicted_wait = self._gauge(
            "predicted_wait_seconds", "Predicted time for answering all that is under way"
        )
        self._max_batch_rows = self._gauge("max_batch_rows", "Most rows run together")
        self._run_fixed = self._gauge(
            "run_fixed_seconds", "Time of a model run whatever its rows, measured at load"
        )
        self._run_row = self._gauge(
            "run_row_seconds", "Time of each row of a model run, measured at load"
        )
        self._batch_drops = self._counters(
            "batch_drops", "Requests that were not run", "reason", get_args(DropReason)
        )
        self._batch_splits = self._counter(
            "batch_splits", "Model runs that failed and were repeated request by request"
        )
        self._non_finite = self._counter(
            "non_finite_outputs", "Candidates for which the model gave NaN or infinity"
        )

    def _init_features(self) -> None:
        self._store_errors = self._counters(
            "store_errors", "Look-ups without a usable answer", "code", error_codes(StoreError)
        )
        self._unknown_items = self._counter(
            "unknown_items", "Candidates that are not in the item table"
        )
        self._unknown_users = self._counter(
            "unknown_users", "Requests whose user has no record in the store"
        )
        self._ignored_features = self._counter(
            "ignored_features", "Features in requests that the schema does not have"
        )
        self._record_age_seconds = self._histogram(
            "record_age_seconds", "Age of the user records used", _AGE_BUCKETS_S
        )

    def _init_state(self) -> None:
        self._bundle_info = Gauge(
            "scoring_bundle_info",
            "1 for the bundle being served",
            ["bundle", "schema"],
            registry=self._registry,
        )
        self._ready = self._gauge("ready", "1 while requests are taken")
        self._item_table_rows = self._gauge("item_table_rows", "Items in the item table")
        parts = get_args(SwapPart)
        self._swaps = self._counters(
            "swaps", "Bundles, or items alone, put in service after the first", "part", parts
        )
        self._swap_refusals = self._counters(
            "swaps_refused", "Bundles or items not put in service", "part", parts
        )
        self._logged_requests = self._counter(
            "logged_requests", "Requests of the sample that are in the request log"
        )
        self._not_logged = self._counters(
            "not_logged_requests",
            "Requests of the sample that the request log could not keep",
            "reason",
            get_args(NotLoggedReason),
        )
        self._worker_restarts = self._counter(
            "worker_restarts", "Workers started again after they had ended"
        )
        self._silent_workers = self._counter(
            "silent_workers", "Times that a worker did not tell the one asked for all metrics"
        )

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        return Histograms(f"scoring_{name}", text, bounds=bounds, registry=self._registry).single

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"scoring_{name}", text, registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"scoring_{name}_total", text, registry=self._registry)

    def _counters(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Counter]:
        counter = Counter(f"scoring_{name}_total", text, [label], registry=self._registry)
        return {value: counter.labels(value) for value in values}


class Family(msgspec.Struct, array_like=True):
    """One metric's values, with names and kind as the library has them."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


def render_families(families: Iterable[Family]) -> bytes:
    """The families in the Prometheus text format, of `CONTENT_TYPE`."""
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric


class _WithoutCreated(Collector):
    """Leaves out the `_created` time of every series: as many lines again as there are series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and what `extra` gave.

    `log.info("...", extra={"request_id": ..., "bundle": ...})` adds these keys; a value that is
    no JSON is written as its text.
    """

    _STANDARD = frozenset(
        (*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message")
    )

    def format(self, record: logging.LogRecord) -> str:
        """Renders the record; a traceback goes into the key `exception`."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in self._STANDARD and name not in entry:
                entry[name] = value
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, default=str)


def configure_logging(level: str, *, stream: TextIO | None = None) -> None:
    """Sends the process's whole log, warnings included, to one stream as JSON lines.

    For the command line only; replaces the handlers that the root logger has.

    Args:
        level: Least severe level, such as `info`.
        stream: None is stderr.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
