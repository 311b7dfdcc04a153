"""How far the served values have moved from the training rows: the population stability index.

A window of counts slides over time. Several workers put their counts together before the index is
made of them: the indices of parts cannot be put together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from model.contract.histograms import Counts

MIN_VALUES = 500

_NUM_SLICES = 12
_MIN_SHARE = 1e-4


class SlidingCounts:
    """Sums of what was added lately: over the window, and up to a twelfth of it less."""

    def __init__(self, width: int, *, window_s: float, clock: Callable[[], float]) -> None:
        """Starts empty.

        Args:
            width: Of the counts.
            window_s: Length of the window.
            clock: Seconds that never go back.
        """
        self._slices = np.zeros((_NUM_SLICES, width), np.int64)
        self._slice_s = window_s / _NUM_SLICES
        self._clock = clock
        self._now = int(clock() / self._slice_s)

    def add(self, counts: Counts, span: slice = slice(None)) -> None:
        """Adds counts as of now, to a span of the whole width."""
        self._turn()
        self._slices[self._now % _NUM_SLICES, span] += counts

    def total(self) -> Counts:
        """The sum over the window, [width]."""
        self._turn()
        total: Counts = self._slices.sum(axis=0)
        return total

    def _turn(self) -> None:
        now = int(self._clock() / self._slice_s)
        for passed in range(self._now + 1, min(now, self._now + _NUM_SLICES) + 1):
            self._slices[passed % _NUM_SLICES] = 0
        self._now = now


class WindowCounts(msgspec.Struct, array_like=True):
    """One worker's window, for another.

    Attributes:
        bundle: Whose bins they are.
        counts: int64, as bytes.
    """

    bundle: str
    counts: bytes


class Drift:
    """Compares windows with the training rows of one bundle. Immutable but for the window."""

    def __init__(
        self,
        bundle: str,
        *,
        expected: Mapping[str, Sequence[Counts]],
        places: Mapping[str, Sequence[npt.NDArray[np.intp]]],
        window: SlidingCounts,
    ) -> None:
        """Takes what it compares.

        Args:
            bundle: Its id.
            expected: Of each feature the training rows by bin, of each of its columns.
            places: Where the counts of the same bins stand in the window.
            window: Of the served values.
        """
        self._bundle = bundle
        self.window = window
        # All columns, one after another.
        self._features = [name for name, columns in expected.items() for _ in columns]
        columns = [column for columns in expected.values() for column in columns]
        at = [place for name in expected for place in places[name]]
        self._expected = np.concatenate(columns) if columns else np.empty(0, np.int64)
        self._at = np.concatenate(at) if at else np.empty(0, np.intp)
        self._starts = np.cumsum([0, *map(len, columns)])[:-1]

    def told(self) -> WindowCounts:
        """The window as it is now."""
        return WindowCounts(self._bundle, self.window.total().tobytes())

    def indices(self, told: Iterable[WindowCounts]) -> dict[str, float]:
        """The index of each feature over several windows, those of other bundles left out.

        Of a feature of several columns the largest; none of one with too few values.
        """
        counts = [
            np.frombuffer(window.counts, np.int64)
            for window in told
            if window.bundle == self._bundle
        ]
        if not counts or not self._features:
            return {}
        actual = np.sum(counts, axis=0)[self._at]
        sums = np.add.reduceat(actual, self._starts).tolist()
        indices = stability_indices(self._expected, actual, self._starts).tolist()
        found: dict[str, float] = {}
        for feature, num_values, index in zip(self._features, sums, indices, strict=True):
            if num_values >= MIN_VALUES:
                found[feature] = max(index, found.get(feature, 0.0))
        return found


def stability_indices(
    expected: Counts, actual: Counts, starts: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Sums over bins of (p - q) ln(p / q), p and q being the shares of the actual and the expected.

    A share below 1e-4 counts as that much. 0 for equal shares; without drift about
    (bins - 1) / actual values. Source: the usual definition in credit scoring, where less than 0.1
    is called stable and more than 0.25 a shift.

    Args:
        expected: Counts by bin, those of several columns one after another.
        actual: Likewise.
        starts: Where each column begins.
    """
    p, q = _shares(actual, starts), _shares(expected, starts)
    terms: npt.NDArray[np.float64] = np.add.reduceat((p - q) * np.log(p / q), starts)
    return terms


def _shares(counts: Counts, starts: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    sums = np.maximum(np.add.reduceat(counts, starts), 1)
    lengths = np.diff(starts, append=len(counts))
    return np.maximum(counts / sums.repeat(lengths), _MIN_SHARE)
