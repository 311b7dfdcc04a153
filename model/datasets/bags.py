"""Fields with many values and a weight each: as slots of a history, or the heaviest in columns.

A history is pooled as the mean over its slots. Where a value takes slots in proportion to its
weight, that mean is the weighted mean, to within one slot per value.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Values of one field: entry k is value ids[k] with weights[k] >= 0 of row rows[k], ascending.

    Attributes:
        rows: int64 [K], in [0, num_rows), ascending.
        num_rows: rows there are, with or without values.
    """

    rows: Ints
    ids: Ints
    weights: Floats
    num_rows: int

    @property
    def counts(self) -> Ints:
        """Values per row, int64 [num_rows]."""
        return np.bincount(self.rows, minlength=self.num_rows).astype(np.int64)

    @property
    def totals(self) -> Floats:
        """Sum of weights per row, float64 [num_rows]."""
        sums = np.bincount(self.rows, weights=self.weights, minlength=self.num_rows)
        return sums.astype(np.float64)

    def heaviest_first(self) -> "Bags":
        """The same entries, each row's by falling weight, equal ones as they came."""
        order = np.lexsort((-self.weights, self.rows))
        return Bags(
            rows=self.rows[order],
            ids=self.ids[order],
            weights=self.weights[order],
            num_rows=self.num_rows,
        )

    def places(self) -> Ints:
        """Each entry's place within its row, from 0."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(len(self.rows)) - starts[self.rows]


def first_values(bags: Bags) -> tuple[pl.Series, pl.Series, int]:
    """Of a field with one value: id and weight of the first in each row, and how many were more."""
    is_first = bags.places() == 0
    rows = bags.rows[is_first]
    return (
        _scattered(bags.ids[is_first], rows, bags.num_rows),
        _scattered(bags.weights[is_first], rows, bags.num_rows),
        int((~is_first).sum()),
    )


def heaviest(bags: Bags, count: int) -> list[pl.Series]:
    """Ids of each row's heaviest, second heaviest and so on, null where there are fewer."""
    ordered = bags.heaviest_first()
    places = ordered.places()
    return [
        _scattered(ordered.ids[places == k], ordered.rows[places == k], bags.num_rows)
        for k in range(count)
    ]


def slot_lists(bags: Bags, *, slots: int) -> pl.Series:
    """Lists of ids, heaviest first, in which an id's share of the places is that of the weight.

    Places go by largest remainders (Hamilton's method; of equal ones the heavier, then the earlier
    first): a value is off by less than one place, and one of less than half a place's weight may
    have none. Rows whose values weigh the same and fit have one place for each value, others have
    `slots` places. A row whose weights are all 0 counts as one of equal weights.

    Returns:
        List of int64, null where a row has no value.
    """
    ordered = bags.heaviest_first()
    rows, counts, places = ordered.rows, ordered.counts, ordered.places()
    totals = ordered.totals
    weights = np.where(totals[rows] > 0, ordered.weights, 1.0)
    totals = np.where(totals > 0, totals, counts)
    quotas = slots * weights / totals[rows]
    # A quota that is a whole number but for rounding is that number.
    base = np.floor(quotas + 1e-9)
    left = slots - np.bincount(rows, weights=base, minlength=ordered.num_rows)
    order = np.lexsort((places, -np.round(quotas - base, 9), rows))
    rank = np.empty(len(rows), np.int64)
    rank[order] = places  # ranks within a row are its places, in the order of the remainders
    taken = base.astype(np.int64) + (rank < left[rows])
    largest, smallest = np.full((2, ordered.num_rows), -np.inf)
    np.maximum.at(largest, rows, weights)
    np.maximum.at(smallest, rows, -weights)
    is_even = (largest == -smallest) & (counts <= slots)
    taken = np.where(is_even[rows], 1, taken)
    flat = pl.DataFrame({"row": np.repeat(rows, taken), "ids": np.repeat(ordered.ids, taken)})
    lists = flat.group_by("row", maintain_order=True).agg("ids")
    every = pl.DataFrame({"row": np.arange(bags.num_rows)})
    return every.join(lists, on="row", how="left", maintain_order="left")["ids"]


def _scattered(values: npt.NDArray[Any], rows: Ints, num_rows: int) -> pl.Series:
    """Values at their rows, null elsewhere."""
    full = np.zeros(num_rows, values.dtype)
    full[rows] = values
    is_absent = np.ones(num_rows, np.bool_)
    is_absent[rows] = False
    return pl.Series(full).set(pl.Series(is_absent), None)
