"""Metrics as text, quickly: the Prometheus format, and the form in which workers tell each other.

A series is kept as the text that stands before its value, made once: reading 500 of them takes the
event loop half a millisecond, where the client library takes five.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]

_NOT_FINITE = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Family(msgspec.Struct, array_like=True):
    """One metric's values.

    Attributes:
        name: With its `_total`, if it has one.
        text: Its help.
        kind: Its type.
        samples: Each series as the format writes it, and its value.
        is_shared: Whether all workers tell the same thing of the machine, not each its own.
    """

    name: str
    text: str
    kind: Kind
    samples: list[tuple[str, float]]
    is_shared: bool = False


class Source(Collector):
    """Some metrics that can tell their values; also a collector of the client library."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers the metrics; a subclass calls it once `families` can be.

        Raises:
            ValueError: The registry has a metric of this name.
        """
        registry.register(self)

    @abstractmethod
    def families(self) -> Iterator[Family]:
        """Current values."""

    def describe(self) -> Iterator[Metric]:
        """See `Collector`."""
        for family in self.families():
            yield Metric(family.name.removesuffix("_total"), family.text, family.kind)

    def collect(self) -> Iterator[Metric]:
        """See `Collector`; for registries that others read."""
        yield from text_string_to_metric_families(render_families(self.families()).decode())


def series_text(name: str, labels: Mapping[str, str]) -> str:
    """A series as the format writes it before its value."""
    if not labels:
        return name
    pairs = (f'{key}="{value.translate(_ESCAPED)}"' for key, value in sorted(labels.items()))
    return f"{name}{{{','.join(pairs)}}}"


def with_label(series: str, label: str, value: str) -> str:
    """The series with one label more, which comes last."""
    pair = f'{label}="{value}"}}'
    return f"{series[:-1]},{pair}" if series[-1] == "}" else f"{series}{{{pair}"


def render_families(families: Iterable[Family]) -> bytes:
    """The families in the Prometheus text format, of `CONTENT_TYPE`."""
    lines: list[str] = []
    for family in families:
        lines += (
            f"# HELP {family.name} {family.text}\n",
            f"# TYPE {family.name} {family.kind}\n",
        )
        lines += [f"{series} {_number(value)}\n" for series, value in family.samples]
    return "".join(lines).encode()


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else _NOT_FINITE[repr(value)]
