"""What the sampled values say of each feature, as metrics; follows one bundle to the next."""

from collections.abc import Iterable, Iterator

from prometheus_client.registry import CollectorRegistry

from service.drift import WindowCounts
from service.exposition import Family, Source, series_text
from service.sampler import FeatureCount, Sampler

_NOTHING = FeatureCount(0, None, None)


class FeatureCounts(Source):
    """Values looked at, and how many of them were missing or unknown, by feature."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers the metrics, without a series until there is a sampler."""
        self._before: dict[str, FeatureCount] = {}
        self._series: dict[tuple[str, str], str] = {}
        self._sampler: Sampler | None = None
        super().__init__(registry)

    def follow(self, sampler: Sampler | None) -> None:
        """Goes on with the sampler of another bundle; counts do not go back."""
        self._before = self._counts()
        self._sampler = sampler

    def families(self) -> Iterator[Family]:
        """See `Source`."""
        counts = self._counts()
        for kind, text in (
            ("values", "Sampled values of a feature that were looked at"),
            ("missing", "Sampled values of a feature that are missing"),
            ("unknown", "Sampled values of a feature that training had not seen"),
        ):
            name = f"scoring_feature_{kind}_total"
            samples = [
                (self._text(name, feature), float(number))
                for feature, count in counts.items()
                if (number := getattr(count, kind)) is not None
            ]
            yield Family(name, text, "counter", samples)

    def _text(self, name: str, feature: str) -> str:
        text = self._series.get((name, feature))
        if text is None:
            text = self._series[name, feature] = series_text(name, {"feature": feature})
        return text

    def _counts(self) -> dict[str, FeatureCount]:
        found = dict(self._before)
        if self._sampler is not None:
            for feature, count in self._sampler.counts().items():
                before = found.get(feature, _NOTHING)
                found[feature] = FeatureCount(
                    before.values + count.values,
                    _sum(before.missing, count.missing),
                    _sum(before.unknown, count.unknown),
                )
        return found


class FeatureDrift(Source):
    """The stability index of each feature."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers the metric, without a series until there is a sampler."""
        self._sampler: Sampler | None = None
        super().__init__(registry)

    def follow(self, sampler: Sampler | None) -> None:
        """Tells the drift of another bundle's features."""
        self._sampler = sampler

    def told(self) -> list[WindowCounts]:
        """This worker's window, for the one that puts all together; nothing without drift."""
        if self._sampler is None or self._sampler.drift is None:
            return []
        self._sampler.count()
        return [self._sampler.drift.told()]

    def families(self) -> Iterator[Family]:
        """See `Source`; of this worker alone."""
        yield self.family(self.told())

    def family(self, told: Iterable[WindowCounts]) -> Family:
        """The indices over the windows of several workers."""
        name = "scoring_feature_drift"
        drift = None if self._sampler is None else self._sampler.drift
        indices = {} if drift is None else drift.indices(told)
        return Family(
            name,
            "Population stability index of the sampled values against the training rows",
            "gauge",
            [(series_text(name, {"feature": f}), index) for f, index in indices.items()],
        )


def _sum(before: int | None, now: int | None) -> int | None:
    return now if before is None else before + (now or 0)
