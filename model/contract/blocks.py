"""Blocks: encoded requests and candidates, and which feature stands in which of their columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract.columns import Ids
from model.contract.spec import (
    Categorical,
    Elapsed,
    Feature,
    Hashed,
    History,
    Match,
    Numeric,
    Recent,
    Schema,
    TimePart,
)

Dense = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RequestBlock:
    """Encoded requests: ids int64 [R, F], dense float32 [R, D], history int64 [R, lengths]."""

    ids: Ids
    dense: Dense
    history: Ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class CandidateBlock:
    """Encoded candidates: ids int64 [N, F], dense float32 [N, D].

    Attributes:
        item_sum: float32 [N, H], what the first layer makes of the columns in `ItemColumns`, for a
            model that adds it; None for one that reads all columns.
    """

    ids: Ids
    dense: Dense
    item_sum: Dense | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Ids | slice) -> "CandidateBlock":
        """Some of the candidates; a slice copies nothing."""
        item_sum = self.item_sum
        return CandidateBlock(
            ids=self.ids[rows],
            dense=self.dense[rows],
            item_sum=None if item_sum is None else item_sum[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one run of the network takes; request_of int64 [N] indexes the request block's rows."""

    request: RequestBlock
    candidate: CandidateBlock
    request_of: Ids

    def __len__(self) -> int:
        return len(self.request_of)

    def feeds(self) -> dict[str, npt.NDArray[Any]]:  # Any: int64 and float32 arrays side by side
        """The graph's inputs by name; those of no width are left out."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "request_ids": self.request.ids,
            "request_dense": self.request.dense,
            "request_history": self.request.history,
            "candidate_ids": self.candidate.ids,
            "candidate_dense": self.candidate.dense,
        }
        feeds = {name: array for name, array in arrays.items() if array.shape[1]}
        feeds["request_of"] = self.request_of
        if self.candidate.item_sum is not None:
            feeds["item_sum"] = self.candidate.item_sum
        return feeds


@dataclass(frozen=True)
class BlockLayout:
    """Which features stand in which columns of one block.

    Dense columns: a value for every numeric and elapsed feature and every statistic of a recent
    one, then the count of every match, then its days, then a missing flag for each of the former,
    then one for every match.
    """

    ids: tuple[str, ...]
    numerics: tuple[str, ...]
    matches: tuple[str, ...]
    histories: tuple[History, ...]

    @property
    def value_columns(self) -> tuple[str, ...]:
        """Names of the dense columns that hold values; missing flags follow them."""
        return (
            *self.numerics,
            *(f"{name}_count" for name in self.matches),
            *(f"{name}_days" for name in self.matches),
        )

    @property
    def dense_columns(self) -> tuple[str, ...]:
        """Names of all dense columns, by which `moments` are kept."""
        return (
            *self.value_columns,
            *(f"{name}_missing" for name in (*self.numerics, *self.matches)),
        )

    @property
    def history_width(self) -> int:
        """Columns of the history part: the sum of the histories' lengths."""
        return sum(history.max_length for history in self.histories)


@dataclass(frozen=True, kw_only=True)
class ItemColumns:
    """Columns of the candidate block that the item table fills, whatever the request.

    Attributes:
        features: whose columns they are.
        ids: positions among the id columns.
        dense: positions among the dense columns.
    """

    features: tuple[str, ...]
    ids: tuple[int, ...]
    dense: tuple[int, ...]

    @classmethod
    def of(cls, schema: Schema) -> "ItemColumns":
        """Those of a schema: what the snapshot holds, the item's id, and what is fixed."""
        _, layout = layouts(schema)
        names = {
            f.name
            for f in schema.features
            if isinstance(f, Categorical | Hashed | Numeric) and _is_of_item(f, schema)
        }
        ids = tuple(j for j, name in enumerate(layout.ids) if name in names)
        numerics = [name for name in layout.numerics if name in names]
        wanted = {*numerics, *(f"{name}_missing" for name in numerics)}
        return cls(
            features=(*(layout.ids[j] for j in ids), *numerics),
            ids=ids,
            dense=tuple(j for j, name in enumerate(layout.dense_columns) if name in wanted),
        )


def _is_of_item(feature: Feature, schema: Schema) -> bool:
    if feature.is_request_side:
        return False
    is_of_table = feature.source == "items" or feature.name == schema.log.item_id
    return feature.source == "log_only" or (feature.scope == "item" and is_of_table)


def _numeric_columns(feature: Feature) -> tuple[str, ...]:
    if isinstance(feature, Recent):
        return feature.statistics
    return (feature.name,) if isinstance(feature, Numeric | Elapsed) else ()


def layouts(schema: Schema) -> tuple[BlockLayout, BlockLayout]:
    """The request block's layout and the candidate block's."""

    def layout(features: Sequence[Feature]) -> BlockLayout:
        return BlockLayout(
            ids=tuple(f.name for f in features if isinstance(f, Categorical | Hashed | TimePart)),
            numerics=tuple(name for f in features for name in _numeric_columns(f)),
            matches=tuple(f.name for f in features if isinstance(f, Match)),
            histories=tuple(f for f in features if isinstance(f, History)),
        )

    return (
        layout([f for f in schema.features if f.is_request_side]),
        layout([f for f in schema.features if not f.is_request_side]),
    )
