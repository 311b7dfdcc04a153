import io
import json
import logging
import math
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.errors import (
    RecordCorrupt,
    ServiceError,
    StoreError,
    StoreTimeout,
    error_codes,
)
from service.log_lines import JsonFormatter, configure_logging
from service.observe import Metrics, request_outcomes
from service.run_cost import RunCost


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_request_counts_by_outcome_and_candidates(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    metrics.request_finished(outcome="ok", seconds=0.0021, candidates=100)
    metrics.request_finished(outcome="overloaded", seconds=0.0001)
    assert value(registry, "scoring_request_seconds_count", outcome="ok") == 1
    assert value(registry, "scoring_request_seconds_bucket", outcome="ok", le="0.003") == 1
    assert value(registry, "scoring_request_seconds_bucket", outcome="ok", le="0.002") == 0
    assert value(registry, "scoring_request_seconds_count", outcome="overloaded") == 1
    assert value(registry, "scoring_request_seconds_count", outcome="degraded") == 0
    assert value(registry, "scoring_candidates_total") == 100


def test_outcomes_are_a_closed_set(metrics: Metrics) -> None:
    assert set(request_outcomes()) == {
        *("ok", "degraded", "cancelled", "internal_error"),
        *("invalid_request", "too_many_candidates", "payload_too_large"),
        *("not_ready", "overloaded", "shutting_down", "deadline_exceeded", "inference_failed"),
    }
    for outcome in request_outcomes():
        metrics.request_finished(outcome=outcome, seconds=0.001)
    with pytest.raises(ValueError, match="'user-17'"):
        metrics.request_finished(outcome="user-17", seconds=0.001)


def test_latency_buckets_begin_at_half_a_millisecond(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    edges = [
        sample.labels["le"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "scoring_stage_seconds_bucket" and sample.labels["stage"] == "run"
    ]
    assert [float(edge) * 1000 for edge in edges[:-1]] == pytest.approx(
        [0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 250, 1000]
    )


def test_observes_a_batcher(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.queue_changed(rows=7)
    metrics.request_waited(seconds=0.001)
    metrics.batch_finished(rows=120, requests=3, run_seconds=0.004)
    metrics.batch_split(requests=3)
    metrics.request_dropped(reason="expired")
    assert value(registry, "scoring_queue_rows") == 7
    assert value(registry, "scoring_stage_seconds_sum", stage="queue") == 0.001
    assert value(registry, "scoring_stage_seconds_sum", stage="run") == 0.004
    assert value(registry, "scoring_batch_rows_sum") == 120
    assert value(registry, "scoring_batch_requests_sum") == 3
    assert value(registry, "scoring_batch_splits_total") == 1
    assert value(registry, "scoring_batch_drops_total", reason="expired") == 1
    assert value(registry, "scoring_batch_drops_total", reason="cancelled") == 0


def test_shows_what_admission_is_decided_by(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.run_cost_known(RunCost(fixed_s=3e-5, row_s=2e-6, max_rows=700))
    metrics.wait_predicted(lambda: 0.012)
    metrics.request_dropped(reason="backlog")
    assert value(registry, "scoring_max_batch_rows") == 700
    assert value(registry, "scoring_run_fixed_seconds") == 3e-5
    assert value(registry, "scoring_run_row_seconds") == 2e-6
    assert value(registry, "scoring_predicted_wait_seconds") == 0.012
    assert value(registry, "scoring_batch_drops_total", reason="backlog") == 1
    assert value(registry, "scoring_batch_drops_total", reason="queue_time") == 0


def test_counts_features_and_store(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.stage_finished(stage="features", seconds=0.002)
    metrics.store_failed(StoreTimeout("late"))
    metrics.store_failed(RecordCorrupt("bytes"))
    metrics.degraded("user_features")
    metrics.degraded("stale_user_features")
    metrics.unknown_items(3)
    metrics.unknown_items(0)
    metrics.unknown_user()
    metrics.ignored_features(2)
    metrics.record_used(age_seconds=7200)
    metrics.non_finite_outputs(1)
    assert value(registry, "scoring_stage_seconds_count", stage="features") == 1
    assert value(registry, "scoring_store_errors_total", code="store_timeout") == 1
    assert value(registry, "scoring_store_errors_total", code="record_corrupt") == 1
    assert value(registry, "scoring_store_errors_total", code="store_unavailable") == 0
    assert value(registry, "scoring_degraded_total", reason="user_features") == 1
    assert value(registry, "scoring_unknown_items_total") == 3
    assert value(registry, "scoring_unknown_users_total") == 1
    assert value(registry, "scoring_ignored_features_total") == 2
    assert value(registry, "scoring_record_age_seconds_bucket", le="3600.0") == 0
    assert value(registry, "scoring_record_age_seconds_bucket", le="10800.0") == 1
    assert value(registry, "scoring_non_finite_outputs_total") == 1


def test_only_the_bundle_being_served_is_shown(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    metrics.bundle_served(bundle="b1", schema="s1")
    metrics.bundle_served(bundle="b2", schema="s1")
    assert value(registry, "scoring_bundle_info", bundle="b1", schema="s1") is None
    assert value(registry, "scoring_bundle_info", bundle="b2", schema="s1") == 1


def test_state_gauges(metrics: Metrics, registry: CollectorRegistry) -> None:
    assert value(registry, "scoring_ready") == 0
    metrics.ready_changed(is_ready=True)
    metrics.item_table_changed(rows=12)
    assert value(registry, "scoring_ready") == 1
    assert value(registry, "scoring_item_table_rows") == 12
    metrics.ready_changed(is_ready=False)
    assert value(registry, "scoring_ready") == 0


def test_swaps_and_workers_are_counted(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.swapped("items")
    metrics.swap_refused("bundle")
    metrics.worker_restarted(2)
    metrics.worker_silent()
    assert value(registry, "scoring_swaps_total", part="items") == 1
    assert value(registry, "scoring_swaps_total", part="bundle") == 0
    assert value(registry, "scoring_swaps_refused_total", part="bundle") == 1
    assert value(registry, "scoring_worker_restarts_total") == 2
    assert value(registry, "scoring_silent_workers_total") == 1


def test_process_and_loop_are_told(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.loop_was_late(0.004)
    metrics.connections_counted(lambda: 3)
    assert value(registry, "scoring_event_loop_lag_seconds_bucket", le="0.003") == 0
    assert value(registry, "scoring_event_loop_lag_seconds_bucket", le="0.004") == 1
    assert value(registry, "scoring_open_connections") == 3
    for name in ("process_resident_bytes", "process_open_files", "process_cpu_seconds_total"):
        assert (value(registry, f"scoring_{name}") or 0) > 0
    assert value(registry, "scoring_cpu_throttled_seconds_total") is not None


def test_ages_are_of_now(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.ages_known(bundle_made_at=time.time() - 100, items_as_of=None)
    assert value(registry, "scoring_bundle_age_seconds") == pytest.approx(100, abs=5)
    assert value(registry, "scoring_item_snapshot_age_seconds") is None
    metrics.ages_known(bundle_made_at=None, items_as_of=time.time() + 100)
    assert value(registry, "scoring_bundle_age_seconds") is None
    assert value(registry, "scoring_item_snapshot_age_seconds") == 0


def test_connections_are_not_told_where_nobody_counts_them(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    assert value(registry, "scoring_open_connections") is None


def test_exposition_parses_and_stays_short(metrics: Metrics) -> None:
    metrics.bundle_served(bundle="b", schema="s")
    text = metrics.render().decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) == 39
    assert all(family.name.startswith("scoring_") for family in families)
    assert "_created" not in text
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families)
    assert len(text.splitlines()) < 350  # and as many as the bundle has features


def test_registries_are_separate() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first).unknown_user()
    Metrics(second)
    assert value(second, "scoring_unknown_users_total") == 0
    assert b"scoring_ready" in Metrics().render()


def test_codes_are_unique_and_groups_are_not_among_them() -> None:
    codes = error_codes()
    assert len(codes) == len(set(codes)) == 12
    assert ServiceError.code not in codes
    assert error_codes(StoreError) == (
        *("record_corrupt", "store_misconfigured", "store_timeout", "store_unavailable"),
    )


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = before[0], before[1]


def log_line(message: str, *args: object, **extra: object) -> dict[str, object]:
    logger = logging.getLogger("tests.observe")
    record = logger.makeRecord(logger.name, logging.INFO, "f", 1, message, args, None, extra=extra)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed: dict[str, object] = json.loads(line)
    return parsed


def test_log_line_is_one_json_object_with_its_extras() -> None:
    entry = log_line("loaded %s\nin %d ms", "b1", 7, request_id="r-1", bundle="b1")
    assert entry["message"] == "loaded b1\nin 7 ms"
    assert entry["level"] == "info"
    assert entry["logger"] == "tests.observe"
    assert entry["request_id"] == "r-1"
    assert entry["bundle"] == "b1"
    assert str(entry["time"]).endswith("+00:00")
    assert set(entry) == {"time", "level", "logger", "message", "request_id", "bundle"}


def test_log_line_takes_values_that_are_no_json() -> None:
    assert log_line("x", path=io.StringIO, ratio=math.inf)["path"] == str(io.StringIO)


def test_configure_logging_writes_json_to_the_stream(restored_logging: None) -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    logger = logging.getLogger("tests.observe")
    logger.debug("hidden")
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("failed", extra={"request_id": "r"})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["failed"]
    assert "ValueError: bad" in lines[0]["exception"]
