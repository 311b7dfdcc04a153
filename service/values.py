"""Counters and gauges that cost a tenth of the client library's to change; for one thread."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.registry import CollectorRegistry

from service.exposition import Family, Kind, Source, series_text


class Value:
    """The number of one series."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        """Starts at 0."""
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Adds."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replaces."""
        self.value = float(value)


class Values(Source):
    """A counter or gauge with one value for each value of a label, or one without a label."""

    def __init__(
        self,
        name: str,
        text: str,
        *,
        kind: Kind,
        registry: CollectorRegistry,
        label: str | None = None,
        values: Iterable[str] = (),
    ) -> None:
        """Registers the metric.

        Args:
            name: Of the metric; a counter's ends in `_total`.
            text: Its help.
            kind: `counter` or `gauge`.
            registry: Where to.
            label: None for a metric without one; `single` is then its value.
            values: Of the label: all that there will be.
        """
        self._head = (name, text, kind)
        self.single = Value()
        if label is None:
            self.by_label: dict[str, Value] = {}
            self._series = [(name, self.single)]
        else:
            self.by_label = {value: Value() for value in values}
            self._series = [
                (series_text(name, {label: value}), child) for value, child in self.by_label.items()
            ]
        super().__init__(registry)

    def families(self) -> Iterator[Family]:
        """See `Source`."""
        yield Family(*self._head, [(series, child.value) for series, child in self._series])


class Readings(Source):
    """A metric that is read from somewhere else whenever it is asked for."""

    def __init__(
        self,
        name: str,
        text: str,
        *,
        kind: Kind,
        registry: CollectorRegistry,
        read: Callable[[], float | None] = lambda: None,
        is_shared: bool = False,
    ) -> None:
        """Registers the metric.

        Args:
            name: See `Values`.
            text: See there.
            kind: See there.
            registry: See there.
            read: Tells the value; None leaves the series out. May be replaced.
            is_shared: See `Family`.
        """
        self._head = (name, text, kind)
        self._is_shared = is_shared
        self.read = read
        super().__init__(registry)

    def families(self) -> Iterator[Family]:
        """See `Source`."""
        value = self.read()
        samples = [] if value is None else [(self._head[0], float(value))]
        yield Family(*self._head, samples, self._is_shared)


class Info(Source):
    """A gauge of value 1 whose labels say what is so now."""

    def __init__(
        self, name: str, text: str, *, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        """Registers the metric, without a series until `tell`."""
        self._name, self._text, self._labels = name, text, labels
        self._samples: list[tuple[str, float]] = []
        super().__init__(registry)

    def tell(self, *values: str) -> None:
        """Replaces what was so before; values in the order of the labels."""
        labels = dict(zip(self._labels, values, strict=True))
        self._samples = [(series_text(self._name, labels), 1.0)]

    def families(self) -> Iterator[Family]:
        """See `Source`."""
        yield Family(self._name, self._text, "gauge", list(self._samples))
