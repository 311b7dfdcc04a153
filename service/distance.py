"""How far the probabilities of two bundles lie apart, and whether that is too far. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Of one output, over the same candidates.

    Attributes:
        mean_before: Mean probability of the one bundle.
        mean_after: Mean probability of the other.
        mean_absolute: Mean distance candidate by candidate.
        max_absolute: Largest one.
        psi: Population stability index over tenths of the first's values; 0 if they are spread
            alike, below 0.1 usually counts as none, above 0.25 as much.
        ks: Largest distance of the two cumulative distributions, 0 to 1.
        rank_correlation: Spearman's, mean over requests of two or more candidates; None without
            one whose values differ.
        top_overlap: Mean share of a request's ten best candidates that are the same, over
            requests of more than ten; None without one.
    """

    mean_before: float
    mean_after: float
    mean_absolute: float
    max_absolute: float
    psi: float
    ks: float
    rank_correlation: float | None
    top_overlap: float | None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far apart is not too far."""

    max_psi: float = 0.25
    max_mean_ratio: float = 1.25
    min_rank_correlation: float = 0.5


TOP = 10


def distance(before: Floats, after: Floats, *, ends: npt.NDArray[np.int64]) -> Distance:
    """Compares two bundles' probabilities.

    Args:
        before: [N], N > 0.
        after: [N], of the same candidates.
        ends: [R], where each request's candidates end, ascending; the last is N.
    """
    absolute = np.abs(before - after)
    correlations, overlaps = [], []
    start = 0
    for end in ends.tolist():
        one, other = before[start:end], after[start:end]
        start = end
        if len(one) > 1 and np.ptp(one) > 0 and np.ptp(other) > 0:
            correlations.append(float(np.corrcoef(_ranks(one), _ranks(other))[0, 1]))
        if len(one) > TOP:
            best = (set(np.argsort(-v, kind="stable")[:TOP].tolist()) for v in (one, other))
            overlaps.append(len(set.intersection(*best)) / TOP)
    return Distance(
        mean_before=float(before.mean()),
        mean_after=float(after.mean()),
        mean_absolute=float(absolute.mean()),
        max_absolute=float(absolute.max()),
        psi=_psi(before, after),
        ks=_ks(before, after),
        rank_correlation=float(np.mean(correlations)) if correlations else None,
        top_overlap=float(np.mean(overlaps)) if overlaps else None,
    )


def reasons_against(distances: Mapping[str, Distance], bounds: Bounds) -> list[str]:
    """Every bound that is not kept, with its figure; none says that the other bundle may go."""
    reasons = []
    for name, d in distances.items():
        if not np.isfinite(d.mean_after) or not np.isfinite(d.mean_before):
            reasons.append(f"{name}: not finite")
            continue
        if d.psi > bounds.max_psi:
            reasons.append(f"{name}: psi {d.psi:.3f} is above {bounds.max_psi:g}")
        low, high = sorted((d.mean_before, d.mean_after))
        if high > bounds.max_mean_ratio * low:
            reasons.append(
                f"{name}: mean {d.mean_after:.3g} against {d.mean_before:.3g}, a ratio beyond "
                f"{bounds.max_mean_ratio:g}"
            )
        if d.rank_correlation is not None and d.rank_correlation < bounds.min_rank_correlation:
            reasons.append(
                f"{name}: rank correlation {d.rank_correlation:.2f} is below "
                f"{bounds.min_rank_correlation:g}"
            )
    return reasons


def _psi(before: Floats, after: Floats) -> float:
    # Equal values share a bin, so tied tenths leave fewer of them.
    edges = np.unique(np.quantile(before, np.linspace(0, 1, _BINS + 1)[1:-1]))
    shares = []
    for values in (before, after):
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        # Half a value in an empty bin: its logarithm would be infinite.
        shares.append(np.maximum(counts, 0.5) / len(values))
    return float(np.sum((shares[0] - shares[1]) * np.log(shares[0] / shares[1])))


def _ks(before: Floats, after: Floats) -> float:
    at = np.sort(np.concatenate([before, after]))
    one, other = (np.searchsorted(np.sort(v), at, side="right") / len(v) for v in (before, after))
    return float(np.abs(one - other).max())


def _ranks(values: Floats) -> Floats:
    # Of equal values each gets the mean of their ranks.
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts - 1) / 2.0
    return means[inverse]
