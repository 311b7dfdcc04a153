"""Histograms that cost a tenth of the client library's to fill; for one thread.

The library takes a lock and walks the buckets for every observation. These are filled on the event
loop alone, several times per request, and read there when /metrics is asked for.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.registry import CollectorRegistry
from prometheus_client.utils import floatToGoString

from service.exposition import Family, Source, series_text


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

    def add(self, counts: Sequence[int], total: float) -> None:
        """Counts many values.

        Args:
            counts: How many fall into each bucket, the last one has no upper bound.
            total: Their sum.
        """
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]
        self._sum += total

    def values(self) -> list[float]:
        """Cumulative counts by upper bound, the last of all, then that count again and the sum."""
        cumulative = [*map(float, accumulate(self._counts))]
        return [*cumulative, cumulative[-1], self._sum]


class Histograms(Source):
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
        self.bounds = tuple(map(float, bounds))
        self._children: dict[str, tuple[Histogram, list[str]]] = {}
        self.single = Histogram(self.bounds)
        if label is None:
            self._children[""] = (self.single, self._series(""))
        for value in values:
            self.of(value)
        super().__init__(registry)

    def of(self, value: str) -> Histogram:
        """The histogram of one value of the label; from a closed set, as each is kept for ever."""
        child = self._children.get(value)
        if child is None:
            child = self._children[value] = (Histogram(self.bounds), self._series(value))
        return child[0]

    def families(self) -> Iterator[Family]:
        """See `Source`."""
        samples: list[tuple[str, float]] = []
        for child, series in self._children.values():
            samples += zip(series, child.values(), strict=True)
        yield Family(self._name, self._text, "histogram", samples)

    def _series(self, value: str) -> list[str]:
        labels = {} if self._label is None else {self._label: value}
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        return [
            *(series_text(f"{self._name}_bucket", {**labels, "le": bound}) for bound in bounds),
            series_text(f"{self._name}_count", labels),
            series_text(f"{self._name}_sum", labels),
        ]
