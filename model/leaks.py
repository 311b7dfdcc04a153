"""What one column alone tells of a label, and how its values differ between splits.

Works on sampled values; where they come from and what is said of them is not its business.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.columns import Column, Dictionary, Ragged

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_BINS = 64
MIN_CLASS = 20  # rows of either class for a judgement
MIN_CERTAIN = 50  # rows of either class for an error
MAX_CERTAIN_VALUES = 16
PRESENCE_RATIO, MIN_PRESENCE = 10.0, 0.2
MIN_POSITION_REQUESTS = 30
POSITION_SHARE = 0.98
TOP_VALUES = 20
MIN_UNITS = 100  # independent values for a stability index


@dataclass(frozen=True, kw_only=True)
class Values:
    """One column on some rows: numbers (NaN is missing), or codes of distinct values (-1 is).

    Attributes:
        names: the distinct values as text, by code.
    """

    numbers: Floats | None = None
    codes: Ints | None = None
    names: tuple[str, ...] = ()

    @property
    def is_present(self) -> Bools:
        if self.numbers is not None:
            return ~np.isnan(self.numbers)
        assert self.codes is not None
        return self.codes >= 0

    def take(self, rows: Ints | Bools) -> "Values":
        return Values(
            numbers=None if self.numbers is None else self.numbers[rows],
            codes=None if self.codes is None else self.codes[rows],
            names=self.names,
        )


def column_values(column: "Column | Ragged", rows: Ints) -> Values | None:
    """Those of an encoder's raw column; None for lists."""
    if isinstance(column, Dictionary):
        return Values(codes=column.index[rows], names=tuple(map(str, column.values)))
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        return Values(numbers=column[rows].astype(np.float64))
    return None


def series_values(series: pl.Series) -> Values | None:
    """Those of a table's column; None for lists."""
    if series.dtype.is_nested():
        return None
    if series.dtype.is_temporal():
        series = series.to_physical()
    if series.dtype.is_numeric():
        return Values(numbers=series.cast(pl.Float64).fill_null(np.nan).to_numpy().copy())
    texts = series.cast(pl.String)
    names = texts.drop_nulls().unique(maintain_order=True)
    codes = texts.replace_strict(
        names, pl.int_range(len(names), eager=True), default=-1, return_dtype=pl.Int64
    )
    return Values(codes=codes.fill_null(-1).to_numpy(), names=tuple(names.to_list()))


def rank_auc(scores: Floats, positive: Bools) -> float:
    """Area under the ROC curve, ties half; NaN when one class is absent."""
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[index]
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    wins = float(ranks[positive].sum()) - num_positive * (num_positive + 1) / 2.0
    return wins / (num_positive * num_negative)


def separation(values: Values, positive: Bools, *, fewest: int = MIN_CLASS) -> float | None:
    """AUC with which the column alone ranks the label, either way; None with too few rows.

    The larger of that of the number itself and that of rates per value, which are learnt on one
    half of the rows and scored on the other: an id that is new in each row tells nothing.

    Args:
        values: of the column.
        positive: whether the row has the label.
        fewest: rows of either class.
    """
    if min(int(positive.sum()), int((~positive).sum())) < fewest:
        return None
    found = [0.5]
    if values.numbers is not None:
        present = values.is_present
        lowest = values.numbers[present].min(initial=0.0) - 1.0
        area = rank_auc(np.where(present, values.numbers, lowest), positive)
        found.append(max(area, 1.0 - area))
    codes = _binned(values)
    is_first = np.random.default_rng(0).random(len(codes)) < 0.5
    areas = []
    for learn in (is_first, ~is_first):
        base = positive[learn].mean()
        counts = np.bincount(codes[learn], minlength=codes.max() + 1)
        sums = np.bincount(codes[learn], weights=positive[learn], minlength=codes.max() + 1)
        rates = (sums + base) / (counts + 1.0)
        areas.append(rank_auc(rates[codes[~learn]], positive[~learn]))
    if not np.isnan(areas).any():
        found.append(float(np.mean(areas)))
    return max(found)


def determines(values: Values, positive: Bools) -> bool:
    """Whether the label is certain from a few values, or from whether there is a value."""
    if min(int(positive.sum()), int((~positive).sum())) < MIN_CERTAIN:
        return False
    for codes in (_binned(values), values.is_present.astype(np.int64)):
        counts = np.bincount(codes)
        rates = np.bincount(codes, weights=positive)[counts > 0] / counts[counts > 0]
        if 2 <= len(rates) <= MAX_CERTAIN_VALUES and np.isin(rates, (0.0, 1.0)).all():
            return True
    return False


def presence(values: Values, positive: Bools) -> tuple[float, float] | None:
    """Shares of rows with a value, with the label and without it, where the label decides it.

    None where they are alike: less than ten times as many filled, or empty, with the label.
    """
    if min(int(positive.sum()), int((~positive).sum())) < MIN_CLASS:
        return None
    with_label, without = (float(values.is_present[m].mean()) for m in (positive, ~positive))
    for one, other in ((with_label, without), (1.0 - with_label, 1.0 - without)):
        is_seen = one * positive.sum() >= MIN_CLASS / 2
        if is_seen and one >= MIN_PRESENCE and one >= PRESENCE_RATIO * other:
            return with_label, without
    return None


def is_position(values: Values, request: Ints) -> bool:
    """Whether the values of nearly every request are neighbouring whole numbers, each once.

    Args:
        values: of whole requests.
        request: each row's request.
    """
    numbers = _as_numbers(values)
    if numbers is None or np.isnan(numbers).any() or (numbers % 1 != 0).any():
        return False
    order = np.lexsort((numbers, request))
    sorted_request, sorted_numbers = request[order], numbers[order]
    starts = np.flatnonzero(np.append(True, sorted_request[1:] != sorted_request[:-1]))
    sizes = np.diff(np.append(starts, len(order)))
    is_step = np.append(0, sorted_numbers[1:] - sorted_numbers[:-1] == 1)
    is_step[starts] = 1
    neighbours = np.add.reduceat(is_step, starts) == sizes
    several = sizes >= 3
    if several.sum() < MIN_POSITION_REQUESTS:
        return False
    # Places of a page begin at one number; runs of ids do not.
    first = sorted_numbers[starts][several]
    _, counts = np.unique(first, return_counts=True)
    return bool(
        neighbours[several].mean() >= POSITION_SHARE and counts.max() >= 0.5 * several.sum()
    )


def rate_by_value(values: Values, positive: Bools) -> tuple[str, float, str, float] | None:
    """Of a column of numbers: the lowest and the highest common value, and the label's rate at it.

    Common is one with a hundredth of the rows or more; None where there are not two.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        return None
    distinct, counts = np.unique(numbers[~np.isnan(numbers)], return_counts=True)
    common = distinct[counts >= max(0.01 * len(numbers), MIN_CLASS)]
    if len(common) < 2:
        return None
    low, high = float(common[0]), float(common[-1])
    rates = [float(positive[numbers == v].mean()) for v in (low, high)]
    return f"{low:g}", rates[0], f"{high:g}", rates[1]


def stability_index(before: Values, after: Values, *, units: tuple[int, int]) -> float:
    """Population stability index of one split's values against another's, and its noise taken off.

    Sum of (q - p) ln(q / p) over tenths of numbers or the twenty commonest values, the others, and
    missing ones. Of two samples of one distribution it is about chi-squared of (bins - 1) times
    (1/n + 1/m): its mean is subtracted, and what is within three deviations of it is 0. So is
    that of few values, which say nothing of tenths.

    Args:
        before: of train.
        after: of the other split.
        units: independent values in each, see `num_units`.
    """
    if min(units) < MIN_UNITS:
        return 0.0
    p, q = _shares(before, after)
    index = float(np.sum((q - p) * np.log(q / p)))
    scale, freedom = sum(1.0 / n for n in units), len(p) - 1
    is_noise = index <= scale * (freedom + 3.0 * np.sqrt(2.0 * freedom))
    return 0.0 if is_noise else index - scale * freedom


def num_units(values: Values, *, user: Ints, request: Ints) -> int:
    """How many independent values there are: users where each has one value, requests otherwise.

    A user's thousand rows of one gender are one fact.
    """
    codes = _binned(values)
    num_users = pl.Series(user).n_unique()
    pairs = pl.Series(user * (codes.max(initial=0) + 1) + codes).n_unique()
    return num_users if pairs <= 1.05 * num_users else pl.Series(request).n_unique()


def _binned(values: Values) -> Ints:
    """Codes from 0, missing among them; numbers of many values by quantiles."""
    if values.codes is not None:
        return values.codes + 1
    assert values.numbers is not None
    present = values.is_present
    known = values.numbers[present]
    edges = np.unique(known)
    if len(edges) > MAX_BINS:
        edges = np.unique(np.quantile(known, np.linspace(0.0, 1.0, MAX_BINS + 1)[:-1]))
    codes = np.zeros(len(present), np.int64)
    codes[present] = np.searchsorted(edges, known, side="right")
    return codes


def _as_numbers(values: Values) -> Floats | None:
    """Numbers, also of codes whose texts are numbers; None otherwise."""
    if values.numbers is not None:
        return values.numbers
    assert values.codes is not None
    if len(values.names) > 10_000:
        return None
    try:
        table = np.array([*map(float, values.names), np.nan], np.float64)
    except ValueError:
        return None
    return table[values.codes]


def _shares(before: Values, after: Values) -> tuple[Floats, Floats]:
    if before.numbers is not None and after.numbers is not None:
        known = before.numbers[before.is_present]
        edges = np.unique(known)[:0]
        if len(known):
            edges = np.unique(np.quantile(known, np.linspace(0.0, 1.0, 11)[1:-1]))
        sides = [
            np.where(v.is_present, 1 + np.searchsorted(edges, v.numbers, side="right"), 0)
            for v in (before, after)
            if v.numbers is not None
        ]
        size = len(edges) + 2
    else:
        assert before.codes is not None
        assert after.codes is not None
        counts = np.bincount(before.codes[before.is_present], minlength=len(before.names))
        top = np.argsort(-counts, kind="stable")[:TOP_VALUES]
        place = {before.names[k]: 2 + i for i, k in enumerate(top.tolist())}
        sides = []
        for v in (before, after):
            assert v.codes is not None
            table = np.array([*(place.get(name, 1) for name in v.names), 0], np.int64)
            sides.append(table[v.codes])
        size = TOP_VALUES + 2
    tallies = np.array([np.bincount(side, minlength=size) for side in sides], np.float64)
    tallies = tallies[:, tallies.sum(axis=0) > 0] + 0.5
    p, q = tallies / tallies.sum(axis=1, keepdims=True)
    return p, q
