"""Reads an item snapshot (Parquet) and encodes it into an item table, in memory or in a file."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.blocks import CandidateBlock
from model.contract.columns import Column, Dictionary
from model.contract.encode import Encoder
from model.contract.errors import EncodeError, LogError
from model.contract.ids import canonical_id
from model.contract.spec import Feature, Match, Numeric
from model.contract.times import AS_OF
from service.item_index import DuplicateIdError, ItemIndex, Rows, build_index
from service.item_sums import ItemSums
from service.items import (
    ItemRows,
    ItemTable,
    create_item_file,
    row_specs,
    write_default_row,
)
from service.parquet import reading

_log = logging.getLogger(__name__)

_CHUNK_ROWS = 16_384


def load_item_table(
    path: Path, encoder: Encoder, *, item_sums: ItemSums | None = None
) -> ItemTable:
    """Reads an item snapshot and encodes it, into memory of this process.

    The snapshot has the schema's item id column and raw columns of item features. Other columns
    are ignored, and absent features are at their defaults; both are logged once. With `item_sums`
    the table has the items' sums, too.

    Raises:
        LogError: The snapshot is missing or damaged, has no item id column, an item without id
            or twice, or a value that does not fit its feature.
    """
    snapshot = _open(path, encoder)
    specs = row_specs(encoder, snapshot.index.num_items, item_sums=item_sums)
    rows = ItemRows(**{name: np.empty(*spec) for name, spec in specs.items()})
    _fill(rows, snapshot, encoder, item_sums)
    return ItemTable(
        encoder, index=snapshot.index, rows=rows, item_sums=item_sums, as_of=snapshot.as_of
    )


def write_item_file(
    snapshot_path: Path, encoder: Encoder, target: Path, *, item_sums: ItemSums | None = None
) -> None:
    """Like `load_item_table`, into a file for `map_item_file`.

    Raises:
        LogError: See there.
        OSError: The file cannot be written; what there is of it is left to the caller.
    """
    snapshot = _open(snapshot_path, encoder)
    rows = create_item_file(
        target,
        index=snapshot.index,
        encoder=encoder,
        item_sums=item_sums,
        as_of=snapshot.as_of,
    )
    _fill(rows, snapshot, encoder, item_sums)


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """A snapshot whose ids have been read.

    Attributes:
        path: The file.
        features: Those of its columns that are used, by raw column.
        ids: Canonical ids, int64 [n] or texts.
        index: Of the table.
        order: intp [n], the snapshot's row of each row of the table.
        as_of: Unix seconds.
    """

    path: Path
    features: Mapping[str, Feature]
    ids: npt.NDArray[np.int64] | list[str]
    index: ItemIndex
    order: Rows
    as_of: float


def _open(path: Path, encoder: Encoder) -> _Snapshot:
    item_id = encoder.schema.log.item_id
    features = _snapshot_features(encoder)
    wanted = {item_id, *features}
    with reading("item snapshot", path):
        present = pl.read_parquet_schema(path)
    if item_id not in present:
        raise LogError(
            f"item snapshot {path}: no column {item_id!r}, which names the items", path=path
        )
    _report_columns(path, ignored=set(present) - wanted, absent=wanted - set(present))
    ids = _canonical(_read(path, [item_id])[item_id], path)
    try:
        index, order = build_index(ids)
    except DuplicateIdError as exc:
        value = str(ids[exc.row])[:40]
        raise _row_error(path, exc.row, f"item {value!r} is there twice") from exc
    return _Snapshot(
        path=path,
        features={name: feature for name, feature in features.items() if name in present},
        ids=ids,
        index=index,
        order=order,
        as_of=_as_of(path),
    )


def _as_of(path: Path) -> float:
    """The time that the snapshot names, or that of its writing if it names none."""
    with reading("item snapshot", path):
        text = pl.read_parquet_metadata(path).get(AS_OF)
        written_at = path.stat().st_mtime
    try:
        as_of = written_at if text is None else float(text)
    except ValueError:
        as_of = math.nan
    if not math.isfinite(as_of):
        raise LogError(
            f"item snapshot {path}: {AS_OF} is {text!r}, expected unix seconds", path=path
        )
    return as_of


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    with reading("item snapshot", path):
        return pl.read_parquet(path, columns=columns, glob=False)


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


def _canonical(series: pl.Series, path: Path) -> npt.NDArray[np.int64] | list[str]:
    """All ids as int64 if every canonical form is such an integer, else their texts."""
    if not len(series):
        return []
    if series.dtype == pl.String or isinstance(series.dtype, pl.Categorical | pl.Enum):
        series = series.cast(pl.String)
        _require_ids(series.is_null() | (series == ""), path)
        numbers = series.cast(pl.Int64, strict=False)
        is_integer = (numbers.cast(pl.String) == series).fill_null(value=False).all()
        return numbers.to_numpy() if is_integer else series.to_list()
    if series.dtype.is_integer():
        _require_ids(series.is_null(), path)
        numbers = series.cast(pl.Int64, strict=False)
        return numbers.to_numpy() if not numbers.null_count() else list(map(str, series))
    return _canonical_by_value(series, path)


def _require_ids(is_missing: pl.Series, path: Path) -> None:
    row = is_missing.fill_null(value=True).arg_max()
    if row is not None and is_missing[row] is not False:
        raise _row_error(path, row, "the item has no id")


def _canonical_by_value(series: pl.Series, path: Path) -> npt.NDArray[np.int64] | list[str]:
    texts: list[str] = []
    for row, value in enumerate(series.to_list()):
        try:
            text = canonical_id(value)
        except TypeError as exc:
            raise _row_error(path, row, str(exc)) from exc
        if text is None:
            raise _row_error(path, row, "the item has no id")
        texts.append(text)
    if series.dtype.is_float():
        return _canonical(pl.Series(texts, dtype=pl.String), path)
    return texts


def _row_error(path: Path, row: int, reason: str) -> LogError:
    return LogError(f"item snapshot {path}: row {row}: {reason}", path=path, row_number=row)


def _fill(
    rows: ItemRows, snapshot: _Snapshot, encoder: Encoder, item_sums: ItemSums | None
) -> None:
    write_default_row(encoder, rows)
    try:
        if snapshot.index.num_items:
            _fill_ids(rows, snapshot, encoder)
            _fill_numbers(rows, snapshot, encoder)
    except EncodeError as exc:
        raise LogError(
            f"item snapshot {snapshot.path}: column {exc.feature!r}: {exc.reason}",
            path=snapshot.path,
        ) from exc
    if item_sums is not None and rows.sums is not None:
        for start in range(0, len(rows.sums), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            block = CandidateBlock(ids=rows.ids[part], dense=rows.dense[part])
            rows.sums[part] = item_sums.of(block)


def _fill_ids(rows: ItemRows, snapshot: _Snapshot, encoder: Encoder) -> None:
    order = snapshot.order
    ids = np.repeat(rows.ids[-1:], len(order), axis=0)
    columns = _id_columns(snapshot, encoder)
    no_dense = np.empty((len(order), 0), np.float32)
    encoder.overwrite_candidates(CandidateBlock(ids=ids, dense=no_dense), columns)
    # Rows are moved whole, after encoding: moving the raw columns costs several times that.
    np.take(ids, order, axis=0, out=rows.ids[:-1], mode="clip")
    keys = encoder.match_keys(columns, num_rows=len(order))
    np.take(keys, order, axis=0, out=rows.keys[:-1], mode="clip")


def _id_columns(snapshot: _Snapshot, encoder: Encoder) -> dict[str, Column]:
    item_id = encoder.schema.log.item_id
    used = {f.name for f in snapshot.features.values() if not isinstance(f, Numeric)}
    used |= {f.attribute for f in encoder.schema.features if isinstance(f, Match)}
    columns: dict[str, Column] = {
        name: _id_column(_read(snapshot.path, [name])[name])
        for name in snapshot.features
        if name in used - {item_id}
    }
    if item_id in used:
        ids = snapshot.ids
        columns[item_id] = list(map(str, ids.tolist())) if isinstance(ids, np.ndarray) else ids
    return columns


def _fill_numbers(rows: ItemRows, snapshot: _Snapshot, encoder: Encoder) -> None:
    names = [name for name, f in snapshot.features.items() if isinstance(f, Numeric)]
    places = np.empty_like(snapshot.order)
    places[snapshot.order] = np.arange(len(places))
    frame = _read(snapshot.path, names) if names else pl.DataFrame()
    for start in range(0, len(places), _CHUNK_ROWS):
        chunk = places[start : start + _CHUNK_ROWS]
        part = CandidateBlock(
            ids=np.empty((len(chunk), rows.ids.shape[1]), np.int64),
            dense=np.repeat(rows.dense[-1:], len(chunk), axis=0),
        )
        columns: dict[str, Column] = {
            name: _number_column(frame[name].slice(start, _CHUNK_ROWS)) for name in names
        }
        encoder.overwrite_candidates(part, columns)
        rows.dense[chunk] = part.dense


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
