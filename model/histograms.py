"""Chooses the bins of every encoded column of the training rows, and counts the rows in them.

A bin holds at least 1 % of the rows: one of fewer says nothing that a sample of the served rows
could be compared with.
"""

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout, Dense
from model.contract.columns import Ids
from model.contract.encode import Encoder
from model.contract.histograms import (
    BinCounts,
    Bins,
    FeatureHistograms,
    IdHistogram,
    NumberHistogram,
    number_names,
)
from model.contract.spec import FIRST_CODE, FittedSchema
from model.dataset import EncodedSplit

_MIN_SHARE = 0.01
_MAX_CODES = 30
_QUANTILES = np.arange(1, 10) / 10
_HEAVY = 0.1  # a value of so many rows has a bin of its own
_MAX_ROWS_FOR_EDGES = 500_000
_CHUNK_ROWS = 8160


def histograms(split: EncodedSplit, encoder: Encoder) -> FeatureHistograms:
    """Those of the training rows: of each request once, and of every impression's candidate."""
    empty = np.empty((len(split.candidate_ids), 0), np.int64)
    sides = (
        (encoder.request_layout, split.request_ids, split.request_dense, split.request_history),
        (encoder.candidate_layout, split.candidate_ids, split.candidate_dense, empty),
    )
    ids: dict[str, IdHistogram] = {}
    numbers: dict[str, NumberHistogram] = {}
    for layout, *arrays in sides:
        made = _side(layout, encoder.fitted, *arrays)
        ids |= made.ids
        numbers |= made.numbers
    return FeatureHistograms(ids=ids, numbers=numbers)


def _side(
    layout: BlockLayout, fitted: FittedSchema, ids: Ids, dense: Dense, history: Ids
) -> FeatureHistograms:
    codes = [_codes(ids[:, j]) for j in range(len(layout.ids))]
    values = Bins.of(layout, fitted).numbers_of(*_every_nth(dense, history))
    edges = [_edges(column[~np.isnan(column)]) for column in values]
    chosen = FeatureHistograms(
        ids={
            name: IdHistogram(
                codes=tuple(found), counts=(0,) * len(found), other=0, missing=0, unknown=0
            )
            for name, found in zip(layout.ids, codes, strict=True)
        },
        numbers={
            name: NumberHistogram(edges=tuple(found), counts=(0,) * (len(found) + 1), missing=0)
            for name, found in zip(number_names(layout), edges, strict=True)
        },
    )
    return _filled(chosen, layout, _count(Bins.of(layout, fitted, chosen), ids, dense, history))


def _filled(chosen: FeatureHistograms, layout: BlockLayout, counts: BinCounts) -> FeatureHistograms:
    ids, numbers = dict(chosen.ids), dict(chosen.numbers)
    for name, column in zip(layout.ids, counts.ids.T.tolist(), strict=True):
        *found, other, missing, unknown = column
        codes = ids[name].codes
        ids[name] = IdHistogram(
            codes=codes,
            counts=found[: len(codes)],
            other=other,
            missing=missing,
            unknown=unknown,
        )
    for name, column in zip(number_names(layout), counts.numbers.T.tolist(), strict=True):
        *found, missing = column
        edges = numbers[name].edges
        numbers[name] = NumberHistogram(
            edges=edges, counts=found[: len(edges) + 1], missing=missing
        )
    return FeatureHistograms(ids=ids, numbers=numbers)


def _count(bins: Bins, ids: Ids, dense: Dense, history: Ids) -> BinCounts:
    counts = bins.count(ids[:0], dense[:0], history[:0])
    for start in range(0, len(ids), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        counts += bins.count(ids[rows], dense[rows], history[rows])
    return counts


def _every_nth(dense: Dense, history: Ids) -> tuple[Dense, Ids]:
    step = -(-len(dense) // _MAX_ROWS_FOR_EDGES) or 1
    return dense[::step], history[::step]


def _codes(column: npt.NDArray[np.integer]) -> list[int]:
    counts = np.bincount(column) if len(column) else np.zeros(1, np.int64)
    counts[:FIRST_CODE] = 0
    top = np.argsort(-counts, kind="stable")[:_MAX_CODES]
    return [int(code) for code in top if counts[code] >= max(1, _MIN_SHARE * len(column))]


def _edges(values: Dense) -> list[float]:
    """Between deciles and around heavy values, half-way between two values that occur.

    Half-way, because an encoded value may differ in its last bits from one machine to another.
    """
    if not len(values):
        return []
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        margin = max(1e-3, 1e-3 * abs(float(distinct[0])))
        return [float(np.float32(distinct[0] + side * margin)) for side in (-1, 1)]
    cumulative = np.cumsum(counts)
    at_quantiles = np.searchsorted(cumulative, _QUANTILES * len(values))
    heavy = np.flatnonzero(counts >= _HEAVY * len(values))
    cuts = np.unique(np.concatenate([at_quantiles, heavy, heavy - 1]))
    kept = _wide_enough(cuts[(cuts >= 0) & (cuts < len(distinct) - 1)], cumulative)
    low, high = distinct[kept], distinct[kept + 1]
    middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
    return [float(edge) for edge in np.where(middle < high, middle, low)]


def _wide_enough(cuts: Ids, cumulative: Ids) -> Ids:
    """Cuts after distinct values, without those that would leave a bin of too few rows."""
    least = _MIN_SHARE * cumulative[-1]
    kept: list[int] = []
    before = 0
    for cut in cuts.tolist():
        if cumulative[cut] - before >= least:
            kept.append(cut)
            before = cumulative[cut]
    while kept and cumulative[-1] - cumulative[kept[-1]] < least:
        kept.pop()
    return np.array(kept, np.int64)
