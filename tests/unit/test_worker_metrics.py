import re
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.contract.blocks import Blocks, RequestBlock
from model.contract.encode import Encoder
from model.contract.histograms import FeatureHistograms, IdHistogram
from service.exposition import Family
from service.observe import Metrics
from service.worker_metrics import Report, WorkerMetrics, merge

pytestmark = pytest.mark.anyio


def worker(
    directory: Path, index: int, metrics: Metrics, *, num_restarts: int = 0, num_workers: int = 2
) -> WorkerMetrics:
    return WorkerMetrics(
        metrics,
        worker=index,
        num_workers=num_workers,
        num_restarts=num_restarts,
        directory=directory,
    )


def scored(num_candidates: int, *, is_ready: bool = True) -> Metrics:
    metrics = Metrics()
    metrics.request_finished(outcome="ok", seconds=0.004, candidates=num_candidates)
    metrics.ready_changed(is_ready=is_ready)
    return metrics


def value(text: bytes, series: str) -> float | None:
    found = re.search(rf"^{re.escape(series)} (\S+)$", text.decode(), re.M)
    return None if found is None else float(found[1])


async def test_whoever_is_asked_tells_the_sum(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, 0, scored(3)) as first,
        worker(tmp_path, 1, scored(40)) as second,
    ):
        texts = [await first.render(), await second.render()]

    for text in texts:
        assert value(text, "scoring_candidates_total") == 43
        assert value(text, 'scoring_request_seconds_bucket{le="0.005",outcome="ok"}') == 2
        assert value(text, 'scoring_request_seconds_count{outcome="ok"}') == 2


async def test_gauges_are_told_per_worker(tmp_path: Path) -> None:
    async with (
        worker(tmp_path, 0, scored(1)) as asked,
        worker(tmp_path, 1, scored(1, is_ready=False)),
    ):
        text = await asked.render()

    assert value(text, 'scoring_ready{worker="0"}') == 1
    assert value(text, 'scoring_ready{worker="1"}') == 0
    assert value(text, "scoring_ready") is None


async def test_worker_that_is_gone_still_counts(tmp_path: Path) -> None:
    async with worker(tmp_path, 0, scored(3)) as asked:
        async with worker(tmp_path, 1, scored(40)):
            before = await asked.render()
        after = await asked.render()

    assert value(before, "scoring_candidates_total") == 43
    assert value(after, "scoring_candidates_total") == 43
    assert value(after, 'scoring_ready{worker="1"}') == 0
    assert value(after, 'scoring_queue_rows{worker="1"}') is None
    assert value(after, "scoring_silent_workers_total") == 1


async def test_worker_started_again_goes_on_from_there(tmp_path: Path) -> None:
    async with worker(tmp_path, 0, scored(3)) as asked:
        async with worker(tmp_path, 1, scored(40)):
            await asked.render()
        async with worker(tmp_path, 1, scored(5), num_restarts=1):
            once = await asked.render()
        async with worker(tmp_path, 1, scored(2), num_restarts=2):
            twice = await asked.render()

    assert value(once, "scoring_candidates_total") == 48
    assert value(twice, "scoring_candidates_total") == 50
    assert value(once, "scoring_worker_restarts_total") == 1
    assert value(twice, "scoring_worker_restarts_total") == 2


async def test_what_was_told_once_is_not_lost_in_a_crash(tmp_path: Path) -> None:
    crashed = worker(tmp_path, 1, scored(40))
    async with worker(tmp_path, 0, scored(3)) as asked:
        await crashed.__aenter__()
        assert crashed._server is not None
        await asked.render()
        crashed._server.close()  # As the kernel does; nothing is written any more.
        text = await asked.render()

    assert value(text, "scoring_candidates_total") == 43


async def test_text_is_that_of_one_process_if_there_is_one(tmp_path: Path) -> None:
    metrics = scored(3)
    async with worker(tmp_path, 0, metrics, num_workers=1) as alone:
        text = await alone.render()

    gauges = re.compile(rb'\{worker="0"\}|,worker="0"')
    assert unread(gauges.sub(b"", text)) == unread(metrics.render())


def unread(text: bytes) -> list[bytes]:
    """Without what is read from the kernel, which is never twice the same."""
    kernel = (b"scoring_process_", b"scoring_cpu_")
    return [line for line in text.splitlines() if not line.startswith(kernel)]


def test_series_that_only_some_workers_have_are_kept() -> None:
    first = Family("a", "", "counter", [('a_total{x="1"}', 2.0)])
    second = Family("a", "", "counter", [('a_total{x="2"}', 3.0), ('a_total{x="1"}', 5)])

    (merged,) = merge([Report(0, True, [first]), Report(1, True, [second])])

    assert merged.samples == [('a_total{x="1"}', 7.0), ('a_total{x="2"}', 3.0)]


def test_what_all_workers_tell_of_the_machine_is_not_summed() -> None:
    told = [
        Report(worker, True, [Family("a", "", "counter", [("a_total", value)], is_shared=True)])
        for worker, value in enumerate([2.0, 2.5, 2.25])
    ]

    (merged,) = merge(told)

    assert merged.samples == [("a_total", 2.5)]


async def test_process_figures_are_of_all_workers(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.connections_counted(lambda: 3)
    metrics.loop_was_late(0.004)
    other = Metrics()
    other.loop_was_late(0.004)
    async with worker(tmp_path, 0, metrics) as asked, worker(tmp_path, 1, other):
        text = await asked.render()

    cpu = value(text, "scoring_process_cpu_seconds_total")
    assert cpu is not None
    assert cpu > time.process_time()  # of two workers, which here are one process
    assert value(text, 'scoring_open_connections{worker="0"}') == 3
    assert value(text, 'scoring_open_connections{worker="1"}') is None
    assert value(text, 'scoring_event_loop_lag_seconds_bucket{le="0.004"}') == 2
    assert value(text, 'scoring_process_resident_bytes{worker="1"}') is not None


async def test_drift_is_made_of_what_all_workers_have_counted(tmp_path: Path) -> None:
    encoder = Encoder(tiny.fitted_schema())
    trained = FeatureHistograms(
        ids={"age_band": IdHistogram(codes=(3,), counts=(50,), other=50, missing=0, unknown=0)},
        numbers={},
    )
    blocks = encoder.request_block({"age_band": ["25-34", "65+"]}, time=np.full(2, tiny.NOON))
    no_candidates = encoder.candidate_block({}, time=np.empty(0))
    both = []
    for row, times in ((0, 400), (1, 100)):
        metrics = Metrics()
        sampler = metrics.make_sampler("b", encoder, trained, every=1, window_s=3600)
        request = RequestBlock(
            ids=blocks.ids[row : row + 1],
            dense=blocks.dense[row : row + 1],
            history=blocks.history[row : row + 1],
        )
        for _ in range(times):
            sampler.take(
                Blocks(request=request, candidate=no_candidates, request_of=np.empty(0, np.int64)),
                {},
            )
        both.append(metrics)
    async with worker(tmp_path, 0, both[0]) as asked, worker(tmp_path, 1, both[1]):
        text = await asked.render()

    # 50 % and 50 % in training, 80 % and 20 % in the 500 requests of both workers.
    index = value(text, 'scoring_feature_drift{feature="age_band"}')
    assert index == pytest.approx(0.4159, abs=1e-4)
    assert value(text, 'scoring_feature_values_total{feature="age_band"}') == 500
    assert b"scoring_feature_drift{" not in both[0].render()
