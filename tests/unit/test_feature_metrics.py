import numpy as np
import pytest
import tiny
from prometheus_client import CollectorRegistry

from model.contract.blocks import Blocks
from model.contract.encode import Encoder
from model.contract.histograms import FeatureHistograms, IdHistogram
from service.observe import Metrics
from service.sampler import Sampler

ENCODER = Encoder(tiny.fitted_schema())
TRAINED = FeatureHistograms(
    ids={"age_band": IdHistogram(codes=(3,), counts=(50,), other=50, missing=0, unknown=0)},
    numbers={},
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def serve(metrics: Metrics, bundle: str, *, times: int) -> Sampler:
    sampler = metrics.make_sampler(bundle, ENCODER, TRAINED, every=1, window_s=3600)
    blocks = Blocks(
        request=ENCODER.request_block({"age_band": ["unheard"]}, time=np.array([tiny.NOON])),
        candidate=ENCODER.candidate_block({}, time=np.empty(0)),
        request_of=np.empty(0, np.int64),
    )
    for _ in range(times):
        sampler.take(blocks, {})
    return sampler


def value(registry: CollectorRegistry, name: str, feature: str) -> float | None:
    return registry.get_sample_value(f"scoring_feature_{name}", {"feature": feature})


def test_counts_go_on_with_the_next_bundle(metrics: Metrics, registry: CollectorRegistry) -> None:
    serve(metrics, "b1", times=3)
    serve(metrics, "b2", times=4)

    assert value(registry, "values_total", "age_band") == 7
    assert value(registry, "unknown_total", "age_band") == 7
    assert value(registry, "missing_total", "age_band") == 0
    assert value(registry, "missing_total", "trips") == 7


def test_drift_begins_anew_with_the_next_bundle(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    serve(metrics, "b1", times=500)
    before = value(registry, "drift", "age_band")
    serve(metrics, "b2", times=499)

    assert before is not None
    assert before > 1
    assert value(registry, "drift", "age_band") is None


def test_only_features_with_a_histogram_have_drift(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    serve(metrics, "b1", times=500)

    assert value(registry, "drift", "loyalty") is None


def test_what_cannot_be_missing_or_unknown_has_no_such_series(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    serve(metrics, "b1", times=1)

    assert value(registry, "values_total", "hour") == 1
    assert value(registry, "missing_total", "hour") is None
    assert value(registry, "unknown_total", "trips") is None
    assert value(registry, "values_total", "position") is None
