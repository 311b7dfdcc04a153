import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.histograms import Histograms

BOUNDS = (0.0005, 0.001, 0.0015, 1.0, 250.0)
VALUES = [*np.random.default_rng(1).lognormal(-6, 4, 500).tolist(), *BOUNDS, 0.0, 1e9]


def exposition(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_exposition_is_that_of_the_client_library() -> None:
    own, library = CollectorRegistry(), CollectorRegistry()
    ours = Histograms("x_seconds", "Text", bounds=BOUNDS, registry=own, label="stage")
    theirs = Histogram("x_seconds", "Text", ["stage"], buckets=BOUNDS, registry=library)
    for number, value in enumerate(VALUES):
        ours.of("ab"[number % 2]).observe(value)
        theirs.labels("ab"[number % 2]).observe(value)

    assert exposition(own) == exposition(library)


def test_without_a_label_there_is_one_histogram() -> None:
    own, library = CollectorRegistry(), CollectorRegistry()
    ours = Histograms("x_rows", "Text", bounds=(1, 5), registry=own).single
    theirs = Histogram("x_rows", "Text", buckets=(1, 5), registry=library)
    for value in (1, 3, 7):
        ours.observe(value)
        theirs.observe(value)

    assert exposition(own) == exposition(library)


def test_values_of_the_label_are_shown_before_anything_was_observed() -> None:
    registry = CollectorRegistry()

    Histograms("x", "Text", bounds=(1,), registry=registry, label="stage", values=("parse",))

    assert registry.get_sample_value("x_count", {"stage": "parse"}) == 0
