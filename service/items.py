"""The item table: every item of a snapshot encoded once, in memory, found by item id.

Knows no request: what a request says of its candidates is written over a copy by the scorer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.blocks import CandidateBlock
from model.contract.columns import Column, Columns, Dictionary
from model.contract.encode import Encoder
from model.contract.errors import EncodeError, LogError
from model.contract.ids import canonical_id
from model.contract.record import Keys
from model.contract.spec import Feature, Numeric
from service.parquet import reading

_log = logging.getLogger(__name__)

_CHUNK_ROWS = 65_536
_NO_TIME = np.zeros(1, np.float64)


@dataclass(frozen=True, kw_only=True)
class CandidateRows:
    """Encoded rows of one request's candidates; copies, which the caller may write to.

    Attributes:
        block: Ids int64 [N, F] and dense float32 [N, D]; features that are not the item's hold
            their defaults.
        keys: uint64 [N, M], key hash of the candidate's attribute per match feature.
        is_known: bool [N], False where the snapshot has no such item.
    """

    block: CandidateBlock
    keys: Keys
    is_known: npt.NDArray[np.bool_]


class ItemTable:
    """Encoded items and one row of defaults for every other item. Immutable."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        index: dict[str, int],
        ids: npt.NDArray[Any],  # Any: int32, or int64 if a code does not fit
        dense: npt.NDArray[np.float32],
        keys: Keys,
    ) -> None:
        """Takes what `load_item_table` built.

        Args:
            encoder: The one that encoded the rows.
            index: Row by canonical item id.
            ids: [n + 1, F], dense [n + 1, D] and keys [n + 1, M]; the last row is the default.
            dense: See `ids`.
            keys: See `ids`.
        """
        self._encoder = encoder
        self._index = index
        self._ids = ids
        self._dense = dense
        self._keys = keys
        for array in (ids, dense, keys):
            array.setflags(write=False)

    def __len__(self) -> int:
        """Number of items, without the default row."""
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays; the index of ids comes on top."""
        return self._ids.nbytes + self._dense.nbytes + self._keys.nbytes

    def take(self, item_ids: Sequence[str] | Sequence[int]) -> CandidateRows:
        """Rows of the items, in the order asked.

        An item that is not in the table has defaults, but for what is made from its id alone:
        the feature whose raw column is the item id column, and match keys on that column.

        Args:
            item_ids: Canonical ids, all of them text or all integers; repeats allowed.

        Raises:
            EncodeError: A feature made from the item id cannot be made from this one.
        """
        item_ids = list(map(str, item_ids))
        num_items, num_rows = len(self._index), len(item_ids)
        rows = np.fromiter(
            map(self._index.get, item_ids, repeat(num_items)), np.intp, count=num_rows
        )
        block = CandidateBlock(
            ids=self._ids[rows].astype(np.int64, copy=False), dense=self._dense[rows]
        )
        keys = self._keys[rows]
        is_known = rows != num_items
        if not is_known.all():
            self._write_unknown(block, keys, item_ids, np.flatnonzero(~is_known))
        return CandidateRows(block=block, keys=keys, is_known=is_known)

    def _write_unknown(
        self,
        block: CandidateBlock,
        keys: Keys,
        item_ids: Sequence[str],
        rows: npt.NDArray[np.intp],
    ) -> None:
        columns: Columns = {self._encoder.schema.log.item_id: [item_ids[row] for row in rows]}
        unknown = CandidateBlock(ids=block.ids[rows], dense=block.dense[rows])
        self._encoder.overwrite_candidates(unknown, columns)
        block.ids[rows], block.dense[rows] = unknown.ids, unknown.dense
        keys[rows] = self._encoder.match_keys(columns, num_rows=len(rows))


def empty_item_table(encoder: Encoder) -> ItemTable:
    """A table without items: everything is scored by its id and what the request says."""
    return _build(encoder, pl.DataFrame(), [], {})


def load_item_table(path: Path, encoder: Encoder) -> ItemTable:
    """Reads an item snapshot (Parquet) and encodes it.

    The snapshot has the schema's item id column and raw columns of item features. Other columns
    are ignored, and absent features are at their defaults; both are logged once.

    Raises:
        LogError: The snapshot is missing or damaged, has no item id column, an item without id
            or twice, or a value that does not fit its feature.
    """
    item_id = encoder.schema.log.item_id
    features = _snapshot_features(encoder)
    wanted = {item_id, *features}
    with reading("item snapshot", path):
        present = pl.read_parquet_schema(path)
        names = [name for name in present if name in wanted]
        frame = pl.read_parquet(path, columns=names, glob=False)
    if item_id not in present:
        raise LogError(
            f"item snapshot {path}: no column {item_id!r}, which names the items", path=path
        )
    _report_columns(path, ignored=set(present) - wanted, absent=wanted - set(present))
    index = _index(frame[item_id], path)
    try:
        return _build(encoder, frame, list(features.values()), index)
    except EncodeError as exc:
        raise LogError(
            f"item snapshot {path}: column {exc.feature!r}: {exc.reason}", path=path
        ) from exc


def _snapshot_features(encoder: Encoder) -> dict[str, Feature]:
    item_id = encoder.schema.log.item_id
    return {
        feature.name: feature
        for feature in encoder.schema.features
        if feature.scope == "item" and (feature.source == "items" or feature.name == item_id)
    }


def _report_columns(path: Path, *, ignored: set[str], absent: set[str]) -> None:
    if ignored:
        _log.info("item snapshot %s: columns not used: %s", path, ", ".join(sorted(ignored)))
    if absent:
        _log.warning(
            "item snapshot %s: no column for %s; defaults are used", path, ", ".join(sorted(absent))
        )


def _index(series: pl.Series, path: Path) -> dict[str, int]:
    if series.dtype.is_integer():
        series = series.cast(pl.String)
    index: dict[str, int] = {}
    for row, value in enumerate(series.to_list()):
        try:
            item_id = canonical_id(value)
        except TypeError as exc:
            raise _row_error(path, row, str(exc)) from exc
        if item_id is None:
            raise _row_error(path, row, "the item has no id")
        if index.setdefault(item_id, row) != row:
            raise _row_error(path, row, f"item {item_id[:40]!r} is there twice")
    return index


def _row_error(path: Path, row: int, reason: str) -> LogError:
    return LogError(f"item snapshot {path}: row {row}: {reason}", path=path, row_number=row)


def _build(
    encoder: Encoder, frame: pl.DataFrame, features: list[Feature], index: dict[str, int]
) -> ItemTable:
    layout = encoder.candidate_layout
    num_items = len(index)
    largest_code = max((encoder.table_size(name) for name in layout.ids), default=0)
    id_type = np.int32 if largest_code <= np.iinfo(np.int32).max else np.int64
    default = encoder.candidate_block({}, time=_NO_TIME)
    ids = np.empty((num_items + 1, len(layout.ids)), id_type)
    dense = np.empty((num_items + 1, len(layout.dense_columns)), np.float32)
    keys = np.empty((num_items + 1, len(layout.matches)), np.uint64)
    ids[-1], dense[-1] = default.ids[0], default.dense[0]
    keys[-1] = encoder.match_keys({}, num_rows=1)[0]
    for start in range(0, num_items, _CHUNK_ROWS):
        chunk = frame.slice(start, _CHUNK_ROWS)
        rows = slice(start, start + len(chunk))
        columns = _columns(encoder, chunk, features)
        block = encoder.candidate_block(columns, time=np.zeros(len(chunk), np.float64))
        ids[rows], dense[rows] = block.ids, block.dense
        keys[rows] = encoder.match_keys(columns, num_rows=len(chunk))
    return ItemTable(encoder, index=index, ids=ids, dense=dense, keys=keys)


def _columns(encoder: Encoder, chunk: pl.DataFrame, features: list[Feature]) -> Columns:
    item_id = encoder.schema.log.item_id
    columns: dict[str, Column] = {item_id: _id_column(chunk[item_id])}
    for feature in features:
        if feature.name in chunk.columns:
            series = chunk[feature.name]
            is_number = isinstance(feature, Numeric)
            columns[feature.name] = _number_column(series) if is_number else _id_column(series)
    return columns


def _number_column(series: pl.Series) -> Column:
    if series.dtype.is_numeric():
        return series.cast(pl.Float64).to_numpy()
    return series.to_list()


def _id_column(series: pl.Series) -> Column:
    if series.dtype.is_nested():
        return series.to_list()
    values = series.drop_nulls().unique(maintain_order=True).alias("value")
    positions = values.to_frame().with_row_index("position")
    index = (
        series.alias("value")
        .to_frame()
        .join(positions, on="value", how="left", maintain_order="left")["position"]
        .cast(pl.Int64)
        .fill_null(-1)
    )
    return Dictionary(values=values.to_list(), index=index.to_numpy())
