"""Match features of a candidate block: count and days since, log1p'd and standardised."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.contract.blocks import BlockLayout, Dense
from model.contract.columns import Floats
from model.contract.recent import Mask
from model.contract.times import SECONDS_PER_DAY


@dataclass(frozen=True, kw_only=True)
class MatchPlan:
    """How the M match features of a block are made.

    Attributes:
        max_age_days: of each, infinity for no limit.
        values: which dense columns hold counts and then days, [2M]; `flags` the missing flags, [M].
        mean: of the values, float64 [2M, 1]; `std` likewise.
        present_flag: the flag's encoded value where there is an entry, [M, 1]; `missing_flag`
            where there is none.
    """

    max_age_days: tuple[float, ...]
    values: slice
    flags: slice
    mean: Floats
    std: Floats
    present_flag: Floats
    missing_flag: Floats

    @classmethod
    def of(
        cls, layout: BlockLayout, max_age_days: Sequence[float], *, mean: Floats, std: Floats
    ) -> "MatchPlan":
        """The plan of a layout; mean and std float64 [D, 1] are of all its dense columns."""
        first, width = len(layout.numerics), len(layout.matches)
        values, flags = slice(first, first + 2 * width), slice(len(mean) - width, len(mean))
        return cls(
            max_age_days=tuple(max_age_days),
            values=values,
            flags=flags,
            mean=mean[values],
            std=std[values],
            present_flag=(0.0 - mean[flags]) / std[flags],
            missing_flag=(1.0 - mean[flags]) / std[flags],
        )

    def write(self, dense: Dense, entries: Floats, time: Floats | float) -> None:
        """Encodes counts and last times [2, M, N], used up, into a block's dense [N, D]."""
        present = log_matches(self.max_age_days, entries, time)
        scaled = entries.reshape(len(self.mean), -1)
        scaled -= self.mean
        scaled /= self.std
        dense[:, self.values] = np.where(present, entries, 0.0).reshape(scaled.shape).T
        dense[:, self.flags] = np.where(present, self.present_flag, self.missing_flag).T


def log_matches(max_age_days: Sequence[float], entries: Floats, time: Floats | float) -> Mask:
    """Which entries [k, N] are not missing; makes values of their counts and last times [2, k, N].

    Those are log1p of the count and of the days since, of no meaning where the entry is missing.
    It is where its count is 0 or NaN, where it is later than the request, and where it is older
    than the feature's limit.
    """
    counts, days = entries
    np.subtract(time, days, out=days)
    days /= SECONDS_PER_DAY
    present: Mask = counts > 0
    present &= days >= 0
    if min(max_age_days, default=np.inf) < np.inf:
        present &= days <= np.array(max_age_days)[:, None]
    np.maximum(entries, 0.0, out=entries)  # what is missing may have no logarithm
    np.log1p(entries, out=entries)
    return present
