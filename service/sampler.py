"""Looks at a sample of what is served: values of features and predicted probabilities.

Which requests, and which of their candidates, is decided by two sequences n * a mod 1, with
irrational a: no chance is in it, every request counts equally often in the long run, and so does
every one of a traffic that repeats itself in any rhythm (Weyl's theorem on equidistribution).

On the way of a request some rows are copied; they are counted together when there are enough.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout, Blocks
from model.contract.columns import Ids
from model.contract.encode import Encoder
from model.contract.histograms import (
    BinCounts,
    Bins,
    Counts,
    FeatureHistograms,
    counts_of,
    number_names,
)
from model.contract.spec import Categorical, Feature, Hashed, Match, Recent, TimePart
from service.drift import Drift, SlidingCounts
from service.histograms import Histogram

Outputs = Mapping[str, npt.NDArray[np.float32]]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction in 64 bits
_ROOT_OF_TWO = 0x6A09E667F3BCC908  # that of the square root of 2
_CANDIDATE_STRIDE = 8
_ROWS = 255  # counted together


@dataclass(frozen=True, slots=True)
class FeatureCount:
    """Values of one feature looked at; `missing` or `unknown` is None where it cannot be."""

    values: int
    missing: int | None
    unknown: int | None


class _Side:
    """One block's rows that wait to be counted, column by column."""

    def __init__(self, layout: BlockLayout, bins: Bins) -> None:
        self.num_rows = 0
        self._bins = bins
        self._ids = np.empty((len(layout.ids), _ROWS), np.int64).T
        self._dense = np.empty((len(layout.dense_columns), _ROWS), np.float32).T
        self._history = np.empty((_ROWS, layout.history_width), np.int64)

    def put(self, ids: Ids, dense: npt.NDArray[np.float32], history: Ids | None = None) -> None:
        start = self.num_rows
        self.num_rows = stop = start + len(ids)
        self._ids[start:stop] = ids
        self._dense[start:stop] = dense
        if history is not None:
            self._history[start:stop] = history

    def count(self) -> BinCounts:
        rows = slice(self.num_rows)
        self.num_rows = 0
        return self._bins.count(self._ids[rows], self._dense[rows], self._history[rows])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a feature's counts stand: its side, and its columns among ids or numbers."""

    side: int
    is_id: bool
    columns: tuple[int, ...]


class Sampler:
    """The sample of one bundle's traffic. For one event loop."""

    def __init__(
        self,
        bundle: str,
        encoder: Encoder,
        histograms: FeatureHistograms | None,
        *,
        probabilities: Mapping[str, Histogram],
        bounds: tuple[float, ...],
        every: int,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts empty.

        Args:
            bundle: Its id.
            encoder: The bundle's.
            histograms: Of its training rows; None if it has none, which leaves out drift.
            probabilities: Where to count the outputs, by name.
            bounds: Of their buckets.
            every: One request in so many is looked at.
            window_s: Length of the window over which drift is told.
            clock: Seconds that never go back.
        """
        self.bundle = bundle
        self._threshold = (1 << 64) // every
        self._turn = self._offset = 0
        self._probabilities = probabilities
        self._bounds = np.array(bounds, np.float64)
        self._outputs = np.empty((len(probabilities), _ROWS), np.float32)
        layouts = (encoder.request_layout, encoder.candidate_layout)
        bins = [Bins.of(layout, encoder.fitted, histograms) for layout in layouts]
        self._sides = request, candidate = [*map(_Side, layouts, bins)]
        self._request, self._candidate = request, candidate
        counts = [side.count() for side in self._sides]
        self._shapes = [array.shape for c in counts for array in (c.ids, c.numbers)]
        self._totals = _flat(counts)
        first = len(_flat(counts[:1]))
        self._spans = slice(first), slice(first, None)
        self._rows = [0, 0]
        self._places = {
            f.name: (f, _place(f, layouts))
            for f in encoder.schema.features
            if f.source != "log_only"
        }
        window = SlidingCounts(len(self._totals), window_s=window_s, clock=clock)
        self.drift = self._drift(bundle, histograms, layouts, window)

    def is_due(self) -> bool:
        """Whether the next request is to be looked at; asked once for each."""
        self._turn = turn = (self._turn + _GOLDEN) & _MASK
        return turn < self._threshold

    def take(self, blocks: Blocks, outputs: Outputs) -> None:
        """Looks at one request, of which one row stands in the request block."""
        if self._request.num_rows == _ROWS:
            self._count(0)
        request, candidate = blocks.request, blocks.candidate
        self._request.put(request.ids[:1], request.dense[:1], request.history[:1])
        self._offset = (self._offset + _ROOT_OF_TWO) & _MASK
        first = self._offset * _CANDIDATE_STRIDE >> 64
        while first < len(blocks):
            start = self._candidate.num_rows
            if start == _ROWS:
                self._count(1)
                start = 0
            rows = slice(first, first + (_ROWS - start) * _CANDIDATE_STRIDE, _CANDIDATE_STRIDE)
            self._candidate.put(candidate.ids[rows], candidate.dense[rows])
            stop = self._candidate.num_rows
            for row, name in zip(self._outputs, self._probabilities, strict=True):
                row[start:stop] = outputs[name][rows]
            first = rows.stop

    def count(self) -> None:
        """Counts what was taken and not counted yet."""
        for j in range(len(self._sides)):
            self._count(j)

    def _count(self, j: int) -> None:
        side = self._sides[j]
        if not side.num_rows:
            return
        if side is self._candidate:
            self._count_outputs(self._outputs[:, : side.num_rows])
        self._rows[j] += side.num_rows
        flat, span = _flat([side.count()]), self._spans[j]
        self._totals[span] += flat
        if self.drift is not None:
            self.drift.window.add(flat, span)

    def counts(self) -> dict[str, FeatureCount]:
        """Of each feature, since the bundle is served."""
        self.count()
        # Of ids the last two rows are missing and unknown, of numbers the last one is missing.
        rows = [array[-2:].tolist() for array in self._split(self._totals)]
        found = {}
        for name, (feature, place) in self._places.items():
            last_but_one, last = rows[2 * place.side + (not place.is_id)]
            column = place.columns[0]
            missing = None
            if not isinstance(feature, TimePart):
                missing = (last_but_one if place.is_id else last)[column]
            unknown = last[column] if isinstance(feature, Categorical) else None
            found[name] = FeatureCount(self._rows[place.side], missing, unknown)
        return found

    def _count_outputs(self, outputs: npt.NDArray[np.float32]) -> None:
        for row, histogram in zip(outputs, self._probabilities.values(), strict=True):
            finite = row[np.isfinite(row)].astype(np.float64)
            buckets = np.searchsorted(self._bounds, finite)
            counts = np.bincount(buckets, minlength=len(self._bounds) + 1)
            histogram.add(counts.tolist(), float(finite.sum()))

    def _split(self, flat: npt.NDArray[np.int64]) -> list[Counts]:
        """Ids and numbers of the request side, then of the candidates'."""
        ends = np.cumsum([height * width for height, width in self._shapes])
        parts = np.split(flat, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _drift(
        self,
        bundle: str,
        histograms: FeatureHistograms | None,
        layouts: tuple[BlockLayout, BlockLayout],
        window: SlidingCounts,
    ) -> Drift | None:
        if histograms is None:
            return None
        flat = _flat([counts_of(histograms, layout) for layout in layouts])
        indices = self._split(np.arange(len(flat)))
        places = {}
        for name, (feature, place) in self._places.items():
            # An hour's traffic never looks like that of weeks, at whatever hour.
            if not isinstance(feature, TimePart):
                array = indices[2 * place.side + (not place.is_id)]
                places[name] = [array[:, column] for column in place.columns]
        expected = {name: [flat[at] for at in found] for name, found in places.items()}
        known = {name: e for name, e in expected.items() if all(map(np.sum, e))}
        return Drift(bundle, expected=known, places=places, window=window)


def _flat(counts: list[BinCounts]) -> npt.NDArray[np.int64]:
    return np.concatenate([array.ravel() for c in counts for array in (c.ids, c.numbers)])


def _place(feature: Feature, layouts: tuple[BlockLayout, BlockLayout]) -> _Place:
    side = 0 if feature.is_request_side else 1
    layout = layouts[side]
    if isinstance(feature, Categorical | Hashed | TimePart):
        return _Place(side, True, (layout.ids.index(feature.name),))
    columns = {name: j for j, name in enumerate(number_names(layout))}
    if isinstance(feature, Recent):
        names: tuple[str, ...] = feature.statistics
    elif isinstance(feature, Match):
        names = (f"{feature.name}_count", f"{feature.name}_days")
    else:
        names = (feature.name,)
    return _Place(side, False, tuple(columns[name] for name in names))
