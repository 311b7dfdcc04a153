"""A run's data, encoded: logs and tables to blocks per split, cached by what they were made of."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.config import TrainConfig
from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.columns import Column, Columns, Dictionary, Ragged
from model.contract.encode import Encoder
from model.contract.errors import LogError
from model.contract.spec import (
    Elapsed,
    Feature,
    FittedSchema,
    History,
    Match,
    Numeric,
    Recent,
    Schema,
    load_schema,
    raw_columns,
)
from model.fit import fit_schema
from model.history import AsOf
from model.logs import SPLITS, TIME, USER, ImpressionLog, Labels, read_log, unix_seconds
from model.raw_split import RawSplit
from model.run_checks import check_run
from model.tables import Tables

CACHE_VERSION = 8

Rows = npt.NDArray[np.int64]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """One split: request rows stored once, and N impressions that point at them.

    Ids are kept as int32, wide enough for every table, to halve the memory.

    Attributes:
        truth: [N, T], known conditional step probabilities; None where the log has none.
    """

    request_ids: npt.NDArray[np.int32]
    request_dense: npt.NDArray[np.float32]
    request_history: npt.NDArray[np.int32]
    candidate_ids: npt.NDArray[np.int32]
    candidate_dense: npt.NDArray[np.float32]
    request_of: npt.NDArray[np.int64]
    label_values: npt.NDArray[np.int8]
    label_known: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]
    user: npt.NDArray[np.int64]
    truth: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.request_of)

    @property
    def labels(self) -> Labels:
        return Labels(values=self.label_values, known=self.label_known, weight=self.weight)

    def followed_by(self, other: "EncodedSplit") -> "EncodedSplit":
        """This split's rows, then a later one's; users of the two are taken to be different."""
        moved = {
            "request_of": other.request_of + len(self.request_ids),
            "user": other.user + self.user.max(initial=-1) + 1,
        }
        joined = {
            name: np.concatenate([array, moved.get(name, getattr(other, name))])
            for name, array in vars(self).items()
            if array is not None
        }
        return EncodedSplit(**joined)

    def blocks(self, rows: "Rows | slice") -> Blocks:
        """Blocks of some impressions, as copies; each of their requests comes once."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        requests, request_of = np.unique(self.request_of[rows], return_inverse=True)
        return Blocks(
            request=RequestBlock(
                ids=self.request_ids[requests].astype(np.int64),
                dense=self.request_dense[requests],
                history=self.request_history[requests].astype(np.int64),
            ),
            candidate=CandidateBlock(
                ids=self.candidate_ids[rows].astype(np.int64), dense=self.candidate_dense[rows]
            ),
            request_of=request_of.astype(np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class EncodedData:
    """All splits, the fitted schema, and what the log's check found.

    Attributes:
        report: rows read and dropped, time range (unix seconds), rows and labels per split, and
            what `model.checks` found.
    """

    fitted: FittedSchema
    splits: dict[str, EncodedSplit]
    report: dict[str, object]


def load_data(config: TrainConfig, *, cache: Path, progress: Progress) -> EncodedData:
    """Reads the encoded data from the cache, or makes it.

    Raises:
        SpecError, LogError, EncodeError: the schema or a table is at fault.
    """
    schema = load_schema(config.data.schema_file)
    key = cache_key(config, schema)
    directory = cache / key
    if is_cached(cache, key):
        progress("reading the encoded impressions")
        return _read_cache(directory)
    data = prepare(config, schema=schema, progress=progress)
    _write_cache(directory, data)
    return data


def is_cached(cache: Path, key: str) -> bool:
    """Whether the cache holds the data of this `cache_key`, whole."""
    return (cache / key / "done").exists()


def prepare(config: TrainConfig, *, schema: Schema, progress: Progress) -> EncodedData:
    """Logs and tables to encoded splits; the encoding is fitted on train only.

    Raises:
        SpecError, LogError, EncodeError: a table is at fault, or a feature decides a label.
    """
    progress("reading the impression log")
    log = read_log(config.data, schema=schema, split=config.split)
    tables = Tables.read(
        events=config.data.events,
        items=config.data.items,
        users=config.data.users,
        schema=schema,
    )
    as_of = AsOf(tables, schema=schema)
    parts = {}
    for name in SPLITS:
        progress(f"building {name} features as of their time")
        parts[name] = build_columns(log, as_of, rows=np.flatnonzero(log.split == name))
    progress("looking for leaks")
    findings = check_run(log, parts, schema=schema)
    train = parts["train"]
    progress("fitting vocabularies")
    fitted = fit_schema(
        schema,
        request_columns=train.request_columns,
        candidate_columns=train.candidate_columns,
        request_time=train.request_time,
        request_of=train.request_of,
    )
    splits = {}
    for name in SPLITS:
        progress(f"encoding {name}")
        # Position and the like are read as logged where the model is fitted and chosen, and fixed
        # as online where it is calibrated and measured.
        encoder = Encoder(fitted, serving=name in ("calibration", "test"))
        splits[name] = encode_split(parts.pop(name), encoder)
    report = _report(log, schema, splits) | {"findings": [f.as_json() for f in findings]}
    return EncodedData(fitted=fitted, splits=splits, report=report)


def build_columns(log: ImpressionLog, as_of: AsOf, *, rows: Rows) -> RawSplit:
    """Raw columns of some rows: as the log has them, else from the tables as of their time."""
    schema = as_of.schema
    frame = log.frame[rows].with_columns(
        pl.col(schema.log.user_id).alias(USER),
        pl.Series(TIME, unix_seconds(log.frame[schema.log.time])[rows]),
    )
    first, request_of = _requests(frame, schema)
    requests = frame[first]
    builder = _ColumnBuilder(as_of, frame=requests, is_request_side=True)
    request_columns = builder.columns()
    candidates = _ColumnBuilder(as_of, frame=frame, is_request_side=False).columns()
    return RawSplit(
        request_columns=request_columns,
        candidate_columns=candidates,
        request_time=requests[TIME].to_numpy(),
        request_of=request_of,
        labels=log.labels.take(rows),
        user=frame[USER].rank("dense").fill_null(0).to_numpy().astype(np.int64),
        truth=None if log.truth is None else log.truth[rows],
    )


def encode_split(raw: RawSplit, encoder: Encoder) -> EncodedSplit:
    """Encodes one split by a fitted encoder."""
    request = encoder.request_block(raw.request_columns, time=raw.request_time)
    candidate = encoder.candidate_block(
        raw.candidate_columns, time=raw.request_time[raw.request_of]
    )
    return EncodedSplit(
        request_ids=request.ids.astype(np.int32),
        request_dense=request.dense,
        request_history=request.history.astype(np.int32),
        candidate_ids=candidate.ids.astype(np.int32),
        candidate_dense=candidate.dense,
        request_of=raw.request_of,
        label_values=raw.labels.values,
        label_known=raw.labels.known,
        weight=raw.labels.weight,
        user=raw.user,
        truth=raw.truth,
    )


class _ColumnBuilder:
    """Finds each feature's raw column: in the log, in the attribute tables, or in the events."""

    def __init__(self, as_of: AsOf, *, frame: pl.DataFrame, is_request_side: bool) -> None:
        self._as_of = as_of
        self._schema = as_of.schema
        self._frame = frame
        self._time = frame[TIME].to_numpy()
        self._is_request_side = is_request_side
        log = self._schema.log
        self._key = log.user_id if is_request_side else log.item_id
        self._table = as_of.tables.users if is_request_side else as_of.tables.items
        self._rows: Rows | None = None

    def columns(self) -> Columns:
        columns: dict[str, Column | Ragged] = {}
        for feature in self._schema.features:
            if feature.is_request_side == self._is_request_side:
                columns |= self._feature_columns(feature)
        return columns

    def _feature_columns(self, feature: Feature) -> dict[str, Column | Ragged]:
        names = raw_columns(feature)
        if not names:
            return {}
        if all(name in self._frame.columns for name in names):
            return self._logged(feature)
        if isinstance(feature, Match):
            counts, times = self._as_of.matches(feature, self._frame, self._keys(feature.attribute))
            return {feature.count_column: counts, feature.last_time_column: times}
        if isinstance(feature, History):
            return {feature.name: self._as_of.history(feature, self._frame)}
        if isinstance(feature, Recent):
            return dict(self._as_of.recent(feature, self._frame))
        statistic = feature.statistic if isinstance(feature, Numeric | Elapsed) else None
        if statistic is not None and feature.scope == "item":
            keys = self._keys(str(statistic.attribute))
            return {feature.name: self._as_of.item_statistic(statistic, keys, self._time)}
        if statistic is not None:
            return {feature.name: self._as_of.user_statistic(statistic, self._frame)}
        return {feature.name: self._attribute(feature)}

    def _logged(self, feature: Feature) -> dict[str, Column | Ragged]:
        if isinstance(feature, History | Recent):
            return {name: self._frame[name].to_list() for name in raw_columns(feature)}
        return {
            name: _raw(self._frame[name], is_number=isinstance(feature, Numeric | Elapsed | Match))
            for name in raw_columns(feature)
        }

    def _attribute(self, feature: Feature) -> Column:
        if self._table is None or feature.name not in self._table.columns:
            raise LogError(
                f"feature {feature.name!r} is in neither the impressions nor the "
                f"{'users' if self._is_request_side else 'items'} table, and names no statistic"
            )
        series = self._table[feature.name]
        rows = self._table_rows()
        if isinstance(feature, Numeric | Elapsed):
            return np.append(_numbers(series), np.nan)[rows]
        return Dictionary(values=series.to_list(), index=rows)

    def _keys(self, attribute: str) -> pl.Series:
        """Each row's value of an item attribute, null where there is none."""
        if attribute in self._frame.columns:
            return self._frame[attribute]
        if self._table is None or attribute not in self._table.columns:
            raise LogError(f"attribute {attribute!r} is in neither the impressions nor the items")
        rows = self._table_rows()
        return (
            self._table[attribute]
            .gather(pl.Series(np.where(rows < 0, 0, rows)))
            .set(pl.Series(rows < 0), None)
        )

    def _table_rows(self) -> Rows:
        if self._rows is None:
            assert self._table is not None
            self._rows = self._as_of.attribute_rows(
                self._table, self._key, self._frame[self._key], self._time
            )
        return self._rows


def _raw(series: pl.Series, *, is_number: bool) -> Column:
    """A table's column in the form the encoder takes."""
    if is_number:
        return _numbers(series)
    distinct = series.drop_nulls().unique(maintain_order=True)
    index = (
        series.to_frame("v")
        .join(
            distinct.to_frame("v").with_row_index("i"), on="v", how="left", maintain_order="left"
        )["i"]
        .cast(pl.Int64)
        .fill_null(-1)
    )
    return Dictionary(values=distinct.to_list(), index=index.to_numpy())


def _numbers(series: pl.Series) -> npt.NDArray[np.float64]:
    if series.dtype.is_temporal() or series.dtype.is_numeric():
        return unix_seconds(series)
    raise LogError(f"column {series.name!r} is {series.dtype}, expected numbers")


def _requests(frame: pl.DataFrame, schema: Schema) -> tuple[Rows, Rows]:
    """First row of each request, and each row's request; every row is its own without an id."""
    name = schema.log.request_id
    if name is None:
        return np.arange(len(frame)), np.arange(len(frame))
    grouped = (
        frame.lazy()
        .with_row_index("_n")
        .group_by(name, maintain_order=True)
        .agg(
            pl.col("_n").first(),
            (pl.col(USER).n_unique() * pl.col(TIME).n_unique()).alias("_kinds"),
        )
        .collect()
    )
    mixed = grouped.filter(pl.col("_kinds") > 1)
    if len(mixed):
        raise LogError(
            f"request {mixed[name][0]!r} has impressions of several users or times; leave "
            "'request_id' out of the schema, or mend the log"
        )
    number = grouped.select(name).with_row_index("_request")
    request_of = frame.select(name).join(number, on=name, how="left", maintain_order="left")
    return (
        grouped["_n"].cast(pl.Int64).to_numpy(),
        request_of["_request"].cast(pl.Int64).to_numpy(),
    )


def _report(
    log: ImpressionLog, schema: Schema, splits: dict[str, EncodedSplit]
) -> dict[str, object]:
    time = log.time(schema)
    return {
        "rows_read": log.num_read,
        "rows_broken_chain": log.num_broken_chain,
        "time_range": [float(time.min()), float(time.max())],
        "splits": {
            name: {
                "rows": len(split),
                "requests": len(split.request_ids),
                **{
                    step.name: int(split.label_values[:, t].sum())
                    for t, step in enumerate(schema.steps)
                },
                "masked": int((~split.label_known).any(axis=1).sum()),
            }
            for name, split in splits.items()
        },
    }


def cache_key(config: TrainConfig, schema: Schema) -> str:
    """Names what the encoded data are made of: schema, split and the content of the tables.

    Raises:
        LogError: a table cannot be read.
    """
    files = {
        name: _file_digest(path)
        for name, path in config.data
        if isinstance(path, Path) and name != "schema_file"
    }
    content = [
        CACHE_VERSION,
        schema.model_dump_json(),
        config.split.model_dump_json(),
        str(config.data.observed_until),
        files,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    """Of the content: data made again the same way is found again."""
    digest = hashlib.sha256()
    try:
        for part in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as exc:
        raise LogError(f"cannot read {path}: {exc.strerror}", path=path) from exc
    return digest.hexdigest()


def _write_cache(directory: Path, data: EncodedData) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, split in data.splits.items():
        for field, array in vars(split).items():
            if array is not None:
                np.save(directory / f"{name}.{field}.npy", array)
    (directory / "fitted.json").write_text(data.fitted.model_dump_json(by_alias=True))
    (directory / "report.json").write_text(json.dumps(data.report))
    (directory / "done").touch()


def _read_cache(directory: Path) -> EncodedData:
    """The arrays are mapped, read-only: processes that train side by side share their pages."""
    fields = EncodedSplit.__dataclass_fields__
    splits = {}
    for name in SPLITS:
        paths = {field: directory / f"{name}.{field}.npy" for field in fields}
        if not paths["truth"].exists():
            del paths["truth"]
        # Plain arrays: memmap's subclass slows every small slice down.
        arrays = {field: np.asarray(np.load(path, mmap_mode="r")) for field, path in paths.items()}
        splits[name] = EncodedSplit(**arrays)
    return EncodedData(
        fitted=FittedSchema.model_validate_json((directory / "fitted.json").read_bytes()),
        splits=splits,
        report=json.loads((directory / "report.json").read_bytes()),
    )
