import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from service.exposition import Family, render_families, series_text, with_label
from service.values import Info, Readings, Values


def library_text(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


def test_text_is_that_of_the_client_library() -> None:
    own, library = CollectorRegistry(), CollectorRegistry()
    ours = [
        Values("x_total", "X", kind="counter", registry=own, label="b", values=["1", 'q"\\\n']),
        Values("y", "Y", kind="gauge", registry=own),
    ]
    theirs = Counter("x_total", "X", ["b"], registry=library)
    gauge = Gauge("y", "Y", registry=library)
    for label, amount in (("1", 2), ('q"\\\n', 1e-7)):
        ours[0].by_label[label].inc(amount)
        theirs.labels(label).inc(amount)
    ours[1].single.set(123456)
    gauge.set(123456)

    text = render_families(family for source in ours for family in source.families())
    assert text.decode().splitlines() == library_text(library)
    assert library_text(own) == library_text(library)


@pytest.mark.parametrize(
    ("number", "text"),
    [(math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"), (0.5, "0.5"), (3.0, "3.0")],
)
def test_numbers_are_written_as_the_format_has_them(number: float, text: str) -> None:
    assert render_families([Family("x", "X", "gauge", [("x", number)])]).endswith(
        f"\nx {text}\n".encode()
    )


def test_labels_are_in_order_and_escaped() -> None:
    assert series_text("x", {"le": "1", "a": 'say "\\"\n'}) == 'x{a="say \\"\\\\\\"\\n",le="1"}'
    assert series_text("x", {}) == "x"


def test_a_label_is_added_at_the_end() -> None:
    assert with_label("x", "worker", "1") == 'x{worker="1"}'
    assert with_label('x{a="2"}', "worker", "1") == 'x{a="2",worker="1"}'


def test_what_cannot_be_read_has_no_series() -> None:
    registry = CollectorRegistry()
    reading = Readings("x", "X", kind="gauge", registry=registry)

    assert registry.get_sample_value("x") is None
    reading.read = lambda: 2.0
    assert registry.get_sample_value("x") == 2


def test_info_forgets_what_was_so_before() -> None:
    registry = CollectorRegistry()
    info = Info("x", "X", labels=["a"], registry=registry)
    info.tell("1")
    info.tell("2")

    assert registry.get_sample_value("x", {"a": "1"}) is None
    assert registry.get_sample_value("x", {"a": "2"}) == 1


def test_a_name_cannot_be_taken_twice() -> None:
    registry = CollectorRegistry()
    Values("x_total", "X", kind="counter", registry=registry)

    with pytest.raises(ValueError, match="x_total"):
        Values("x_total", "X", kind="counter", registry=registry)
