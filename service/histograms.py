"""Histograms that cost a tenth of the client library's to fill; for one thread.

The library takes a lock and walks the buckets for every observation. These are filled on the event
loop alone, several times per request, and read there when /metrics is asked for.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class Histogram:
    """Observations of one set of labels."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Starts empty; `bounds` are the upper bounds of all buckets but the last, ascending."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, as the exposition has them, and the sum."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        counts = map(float, accumulate(self._counts))
        return list(zip(names, counts, strict=True)), self._sum


class Histograms(Collector):
    """A metric with one histogram per value of one label, or a single one without a label."""

    def __init__(
        self,
        name: str,
        text: str,
        *,
        bounds: Sequence[float],
        registry: CollectorRegistry,
        label: str | None = None,
        values: Iterable[str] = (),
    ) -> None:
        """Registers the metric.

        Args:
            name: Of the metric.
            text: Its help.
            bounds: Of the buckets, without infinity.
            registry: Where to.
            label: None for a metric without one; `single` is then its histogram.
            values: Values of the label that are shown before anything was observed.

        Raises:
            ValueError: The registry has a metric of this name.
        """
        self._name, self._text, self._label = name, text, label
        self._bounds = tuple(map(float, bounds))
        self._children = {value: Histogram(self._bounds) for value in values}
        self.single = Histogram(self._bounds)
        registry.register(self)

    def of(self, value: str) -> Histogram:
        """The histogram of one value of the label; from a closed set, as each is kept for ever."""
        child = self._children.get(value)
        if child is None:
            child = self._children[value] = Histogram(self._bounds)
        return child

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See `Collector`."""
        labels = [] if self._label is None else [self._label]
        family = HistogramMetricFamily(self._name, self._text, labels=labels)
        children = self._children if labels else {"": self.single}
        for value, child in children.items():
            buckets, total = child.samples()
            family.add_metric([value] if labels else [], buckets, total)
        yield family
