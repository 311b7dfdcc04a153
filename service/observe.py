"""Every metric of the service: names, help, labels and buckets.

Methods take what happened, in words of the service, and never raise for a value of the right
type: they are called in `finally`. Labels come from closed sets, so what a worker exposes has a
bound whatever the traffic: writing it out stalls the event loop in proportion.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry

from model.contract.encode import Encoder
from model.contract.histograms import FeatureHistograms
from service.batch_plan import DropReason
from service.buckets import (
    AGE_BUCKETS_S,
    LAG_BUCKETS_S,
    LATENCY_BUCKETS_S,
    PROBABILITY_BUCKETS,
    REQUESTS_BUCKETS,
    ROWS_BUCKETS,
)
from service.cpu_limits import read_throttled_s
from service.drift import WindowCounts
from service.errors import ServiceError, StoreError, error_codes
from service.exposition import Family, Kind, Source, render_families
from service.feature_metrics import FeatureCounts, FeatureDrift
from service.histograms import Histogram, Histograms
from service.process import cpu_seconds, open_files, resident_bytes
from service.run_cost import RunCost
from service.sampler import Sampler
from service.values import Info, Readings, Value, Values

Stage = Literal["parse", "features", "encode", "queue", "run", "respond"]
DegradedReason = Literal["user_features", "stale_user_features"]
SwapPart = Literal["bundle", "items"]
NotLoggedReason = Literal["queue_full", "write_failed"]


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
            registry: Where to; None makes one of its own, never the library's global one. What
                else it holds is not told by `render`.

        Raises:
            ValueError: The registry holds these metrics already.
        """
        self._registry = CollectorRegistry() if registry is None else registry
        self._sources: list[Source] = []
        self._outcomes = frozenset(request_outcomes())
        self._init_requests()
        self._init_batches()
        self._init_features()
        self._init_health()
        self._init_state()
        self._init_process()

    def render(self) -> bytes:
        """Current values in the Prometheus text format, of `exposition.CONTENT_TYPE`."""
        return render_families([*self.families(), self.drift(self.windows())])

    def families(self) -> list[Family]:
        """Current values of all but drift, which is made of the counts of all workers."""
        return [family for source in self._sources for family in source.families()]

    def windows(self) -> list[WindowCounts]:
        """What this worker's drift is made of; nothing without a bundle that can tell it."""
        return self._feature_drift.told()

    def drift(self, windows: Iterable[WindowCounts]) -> Family:
        """The drift of all these workers together."""
        return self._feature_drift.family(windows)

    def make_sampler(
        self,
        bundle: str,
        encoder: Encoder,
        histograms: FeatureHistograms | None,
        *,
        every: int,
        window_s: float,
    ) -> Sampler:
        """A sampler whose findings are told from now on in place of those of the one before.

        Args:
            bundle: See `Sampler`, as for the others.
            encoder: See there.
            histograms: See there.
            every: See there.
            window_s: See there.
        """
        names = encoder.schema.output_names
        sampler = Sampler(
            bundle,
            encoder,
            histograms,
            probabilities={name: self._probabilities.of(name) for name in names},
            bounds=self._probabilities.bounds,
            every=every,
            window_s=window_s,
        )
        self._feature_counts.follow(sampler)
        self._feature_drift.follow(sampler)
        return sampler

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
        self._predicted_wait.read = predict

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
        self._bundle_info.tell(bundle, schema)

    def ages_known(self, *, bundle_made_at: float | None, items_as_of: float | None) -> None:
        """From when bundle and item snapshot are, in unix seconds; None tells no age."""
        self._bundle_age.read = _age(bundle_made_at)
        self._items_age.read = _age(items_as_of)

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

    def loop_was_late(self, seconds: float) -> None:
        """The event loop woke a timer so much too late."""
        self._loop_lag.observe(seconds)

    def connections_counted(self, count: Callable[[], int]) -> None:
        """Asked at every scrape for the number of open connections."""
        self._connections.read = count

    def _init_requests(self) -> None:
        self._request_seconds = Histograms(
            "scoring_request_seconds",
            "Time from a scoring request to its answer, by what became of it",
            bounds=LATENCY_BUCKETS_S,
            registry=self._registry,
            label="outcome",
            values=("ok", "degraded"),
        )
        self._sources.append(self._request_seconds)
        stage_seconds = Histograms(
            "scoring_stage_seconds",
            "Time of one stage; queue per request in the batcher, run per model run",
            bounds=LATENCY_BUCKETS_S,
            registry=self._registry,
            label="stage",
            values=get_args(Stage),
        )
        self._sources.append(stage_seconds)
        self._stage_seconds = {stage: stage_seconds.of(stage) for stage in get_args(Stage)}
        self._candidates = self._counter("candidates", "Candidates scored")
        self._degraded = self._counters(
            "degraded", "Requests answered with defaults", "reason", get_args(DegradedReason)
        )

    def _init_batches(self) -> None:
        self._batch_rows = self._histogram("batch_rows", "Rows of one model run", ROWS_BUCKETS)
        self._batch_requests = self._histogram(
            "batch_requests", "Requests of one model run", REQUESTS_BUCKETS
        )
        self._queue_rows = self._gauge("queue_rows", "Rows waiting for a model run")
        self._predicted_wait = self._reading(
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
            "record_age_seconds", "Age of the user records used", AGE_BUCKETS_S
        )

    def _init_health(self) -> None:
        self._probabilities = Histograms(
            "scoring_predicted_probability",
            "Predicted probabilities of sampled candidates",
            bounds=PROBABILITY_BUCKETS,
            registry=self._registry,
            label="output",
        )
        self._feature_counts = FeatureCounts(self._registry)
        # The features first: reading them counts what has been taken and not been counted yet.
        self._sources += [self._feature_counts, self._probabilities]
        self._feature_drift = FeatureDrift(self._registry)

    def _init_state(self) -> None:
        self._bundle_info = Info(
            "scoring_bundle_info",
            "1 for the bundle being served",
            labels=["bundle", "schema"],
            registry=self._registry,
        )
        self._sources.append(self._bundle_info)
        self._bundle_age = self._reading(
            "bundle_age_seconds", "Time since the bundle being served was made"
        )
        self._items_age = self._reading(
            "item_snapshot_age_seconds",
            "Time since what the item snapshot is as of, or its writing if it does not say",
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

    def _init_process(self) -> None:
        self._loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the event loop wakes a timer", LAG_BUCKETS_S
        )
        self._connections = self._reading("open_connections", "Open HTTP connections")
        self._reading(
            "process_resident_bytes",
            "Resident memory of the process, shared pages included",
            read=resident_bytes,
        )
        self._reading("process_open_files", "Open file descriptors", read=open_files)
        self._reading("process_cpu_seconds_total", "CPU time", kind="counter", read=cpu_seconds)
        self._reading(
            "cpu_throttled_seconds_total",
            "Time that the CPU quota of the container held back its processes",
            kind="counter",
            read=read_throttled_s,
            is_shared=True,
        )

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        made = Histograms(f"scoring_{name}", text, bounds=bounds, registry=self._registry)
        self._sources.append(made)
        return made.single

    def _gauge(self, name: str, text: str) -> Value:
        made = Values(f"scoring_{name}", text, kind="gauge", registry=self._registry)
        self._sources.append(made)
        return made.single

    def _counter(self, name: str, text: str) -> Value:
        made = Values(f"scoring_{name}_total", text, kind="counter", registry=self._registry)
        self._sources.append(made)
        return made.single

    def _counters(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Value]:
        made = Values(
            f"scoring_{name}_total",
            text,
            kind="counter",
            registry=self._registry,
            label=label,
            values=values,
        )
        self._sources.append(made)
        return made.by_label

    def _reading(
        self,
        name: str,
        text: str,
        *,
        kind: Kind = "gauge",
        read: Callable[[], float | None] = lambda: None,
        is_shared: bool = False,
    ) -> Readings:
        made = Readings(
            f"scoring_{name}",
            text,
            kind=kind,
            registry=self._registry,
            read=read,
            is_shared=is_shared,
        )
        self._sources.append(made)
        return made


def _age(since: float | None) -> Callable[[], float | None]:
    return lambda: None if since is None else max(0.0, time.time() - since)
