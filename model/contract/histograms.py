"""Histograms of encoded features: what a bundle holds of its training rows, and the counting.

Training rows and served ones are counted by the same code, so that their bins mean the same.

Bins of an id feature: some frequent codes, any other, missing, unknown. Bins of a numeric column:
(-inf, e0], (e0, e1], ... (en, inf), missing; edges are of encoded values. A history's number is its
length.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

from model.contract.blocks import BlockLayout, Dense
from model.contract.columns import Ids
from model.contract.numerics import moments_of
from model.contract.spec import MISSING_CODE, PADDING_CODE, UNKNOWN_CODE, FittedSchema

Counts = npt.NDArray[np.int64]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class IdHistogram(_Strict):
    """Rows of one id feature.

    Attributes:
        codes: those with a bin of their own.
        counts: of each of them.
    """

    codes: tuple[int, ...]
    counts: tuple[NonNegativeInt, ...]
    other: NonNegativeInt
    missing: NonNegativeInt
    unknown: NonNegativeInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.codes) != len(self.counts) or len(set(self.codes)) != len(self.codes):
            raise ValueError("expected one count per code, and every code once")
        return self


class NumberHistogram(_Strict):
    """Rows of one numeric column.

    Attributes:
        edges: between the bins, ascending.
        counts: one more than there are edges.
    """

    edges: tuple[float, ...]
    counts: tuple[NonNegativeInt, ...]
    missing: NonNegativeInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("expected ascending edges and one count more")
        return self


class FeatureHistograms(_Strict):
    """Those of all columns, by name: id features; value columns, and histories by their length."""

    version: Literal[2] = 2
    ids: dict[str, IdHistogram]
    numbers: dict[str, NumberHistogram]

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Reads histograms.json; None for a file of another version, as older bundles have.

        Raises:
            ValueError: it is no JSON, or contradicts itself.
        """
        content: Any = json.loads(data)  # Any: JSON
        if not isinstance(content, dict) or content.get("version") != 2:
            return None
        return cls.model_validate(content)


@dataclass(frozen=True, kw_only=True)
class BinCounts:
    """Rows by bin.

    Attributes:
        ids: [K + 3, F], for each id feature: the codes of its bins, other, missing, unknown.
        numbers: [E + 2, V], for each numeric column, histories last: its bins, then missing.
    """

    ids: Counts
    numbers: Counts

    def __add__(self, other: "BinCounts") -> "BinCounts":
        """Both together."""
        return BinCounts(ids=self.ids + other.ids, numbers=self.numbers + other.numbers)


@dataclass(frozen=True, kw_only=True)
class Bins:
    """The bins of one block's columns; a column with fewer than the widest has empty ones.

    Attributes:
        codes: int64 [K, F], no code where there are fewer.
        edges: float32 [E, V], infinite where there are fewer.
        flags: int64, of each value column the position of its missing flag among the dense ones.
        thresholds: float32, a flag above it is set.
        histories: where each lies in the history part.
    """

    codes: Ids
    edges: Dense
    flags: Ids
    thresholds: Dense
    histories: tuple[slice, ...]

    @classmethod
    def of(
        cls, layout: BlockLayout, fitted: FittedSchema, histograms: FeatureHistograms | None = None
    ) -> "Bins":
        """The bins of histograms; None has none but missing, unknown and all else."""
        known_ids = {} if histograms is None else histograms.ids
        known_numbers = {} if histograms is None else histograms.numbers
        codes = [known_ids[name].codes if name in known_ids else () for name in layout.ids]
        edges = [
            known_numbers[name].edges if name in known_numbers else ()
            for name in number_names(layout)
        ]
        mean, std = moments_of(fitted, layout)
        flags = _flags(layout)
        return cls(
            codes=_padded(codes, -1, np.int64),
            edges=_padded(edges, np.inf, np.float32),
            flags=flags,
            thresholds=((0.5 - mean[flags]) / std[flags]).astype(np.float32),
            histories=_spans(layout),
        )

    def count(self, ids: Ids, dense: Dense, history: Ids) -> BinCounts:
        """Counts encoded rows.

        Args:
            ids: [n, F], any integers.
            dense: [n, D].
            history: [n, lengths]; of no width for candidates.
        """
        return BinCounts(
            ids=self._count_ids(ids), numbers=self._count_numbers(self.numbers_of(dense, history))
        )

    def _count_ids(self, ids: Ids) -> Counts:
        by_feature = ids.T
        found = _true(by_feature == self.codes[..., None])
        missing, unknown = _true(by_feature == MISSING_CODE), _true(by_feature == UNKNOWN_CODE)
        other = len(ids) - found.sum(axis=0) - missing - unknown
        return np.concatenate([found, np.stack([other, missing, unknown])])

    def numbers_of(self, dense: Dense, history: Ids) -> Dense:
        """The numbers that are counted, float32 [V, n], NaN where missing."""
        num_values = len(self.flags)
        numbers = np.empty((num_values + len(self.histories), len(dense)), np.float32)
        columns = dense.T
        is_missing = columns[self.flags] > self.thresholds[:, None]
        numbers[:num_values] = np.where(is_missing, np.nan, columns[:num_values])
        for row, span in enumerate(self.histories, num_values):
            lengths = np.count_nonzero(history[:, span] != PADDING_CODE, axis=1)
            numbers[row] = np.where(lengths == 0, np.nan, lengths)
        return numbers

    def _count_numbers(self, numbers: Dense) -> Counts:
        missing = _true(np.isnan(numbers))[None]
        # Rows up to each edge; what is missing is beyond none.
        below = _true(numbers <= self.edges[..., None])
        beside = [np.zeros_like(missing), below, numbers.shape[1] - missing]
        return np.concatenate([np.diff(np.concatenate(beside), axis=0), missing])


def counts_of(histograms: FeatureHistograms, layout: BlockLayout) -> BinCounts:
    """The histograms of one block's columns in the shape of `Bins.of`; 0 where there is none."""
    ids = [histograms.ids.get(name) for name in layout.ids]
    numbers = [histograms.numbers.get(name) for name in number_names(layout)]
    rest = [(0, 0, 0) if h is None else (h.other, h.missing, h.unknown) for h in ids]
    missing = [0 if h is None else h.missing for h in numbers]
    return BinCounts(
        ids=np.concatenate(
            [
                _padded([() if h is None else h.counts for h in ids], 0, np.int64),
                np.array(rest, np.int64).reshape(-1, 3).T,
            ]
        ),
        numbers=np.concatenate(
            [
                _padded([(0,) if h is None else h.counts for h in numbers], 0, np.int64),
                np.array([missing], np.int64),
            ]
        ),
    )


def number_names(layout: BlockLayout) -> tuple[str, ...]:
    """Names of the numeric columns in the order of `BinCounts.numbers`."""
    return (*layout.value_columns, *(history.name for history in layout.histories))


def _true(mask: npt.NDArray[np.bool_]) -> Counts:
    """How often each is true, over the last axis."""
    # Summed in bytes, which hold up to 255: a tenth of the time that sums of int64 take.
    total = np.zeros(mask.shape[:-1], np.int64)
    for start in range(0, mask.shape[-1], 255):
        part = mask[..., start : start + 255].view(np.uint8)
        total += np.add.reduce(part, axis=-1, dtype=np.uint8)
    return total


def _padded(columns: list[tuple[Any, ...]], fill: float, dtype: type[Any]) -> npt.NDArray[Any]:
    # Any: numbers of the dtype
    made = np.full((max(map(len, columns), default=0), len(columns)), fill, dtype)
    for j, values in enumerate(columns):
        made[: len(values), j] = values
    return made


def _flags(layout: BlockLayout) -> Ids:
    place = {name: j for j, name in enumerate(layout.dense_columns)}
    owners = (*layout.numerics, *layout.matches, *layout.matches)
    return np.array([place[f"{name}_missing"] for name in owners], np.int64)


def _spans(layout: BlockLayout) -> tuple[slice, ...]:
    ends = np.cumsum([history.max_length for history in layout.histories]).tolist()
    starts = [0, *ends[:-1]]
    return tuple(map(slice, starts, ends))
