"""The encoder: raw columns to blocks. Training, item table and online request all call this one.

Two blocks: the request block has one row per request (user and context features), the candidate
block one row per candidate (item and cross features); `request_of` says which request row a
candidate belongs to. A block starts as copies of a row in which everything is missing, and given
columns overwrite it: so an absent column, an unknown user and an unknown item need no code of their
own.
"""

from collections.abc import Sequence
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout, CandidateBlock, Dense, RequestBlock, layouts
from model.contract.columns import (
    Column,
    Columns,
    Floats,
    Ids,
    Ragged,
    as_ragged,
    map_ids,
    numbers,
)
from model.contract.errors import EncodeError
from model.contract.ids import NO_KEY, canonical_id, hash_id
from model.contract.recent import RecentColumn, recent_statistics
from model.contract.spec import (
    FIRST_CODE,
    MISSING_CODE,
    PADDING_CODE,
    UNKNOWN_CODE,
    Categorical,
    Elapsed,
    FittedSchema,
    Hashed,
    History,
    Match,
    Numeric,
    Recent,
    TimePart,
    raw_columns,
)
from model.contract.times import SECONDS_PER_DAY


class Encoder:
    """Encodes by one fitted schema. Immutable; safe to share between threads.

    With `serving`, `log_only` features take their serving value whatever a column says; without,
    they are read like any other (training).
    """

    def __init__(self, fitted: FittedSchema, *, serving: bool = True) -> None:
        self.fitted = fitted
        self.schema = fitted.schema_
        self.request_layout, self.candidate_layout = layouts(self.schema)
        self._features = {feature.name: feature for feature in self.schema.features}
        self._recents = [f for f in self.schema.features if isinstance(f, Recent)]
        self._vocabularies = {
            name: {value: FIRST_CODE + i for i, value in enumerate(values)}
            for name, values in fitted.vocabularies.items()
        }
        self._fixed = {f.name for f in self.schema.features if serving and f.source == "log_only"}
        self._max_age_days = {
            f.name: f.max_age_days or np.inf for f in self.schema.features if isinstance(f, Match)
        }
        self._time_zone = ZoneInfo(self.schema.time_zone)
        self._request_moments = _moments(fitted, self.request_layout)
        self._candidate_moments = _moments(fitted, self.candidate_layout)
        self._request_default = self._default_row(self.request_layout)
        self._candidate_default = self._default_row(self.candidate_layout)

    def table_size(self, name: str) -> int:
        """Number of codes of an id feature, its embedding table's rows."""
        feature = self._features[name]
        if isinstance(feature, Hashed):
            return FIRST_CODE + feature.num_buckets
        if isinstance(feature, TimePart):
            return FIRST_CODE + feature.num_values
        return FIRST_CODE + len(self._vocabularies[name])

    def request_block(self, columns: Columns, *, time: Floats) -> RequestBlock:
        """Encodes one row per request.

        Args:
            columns: raw columns by raw column name; those of no request feature are ignored.
            time: unix seconds of the requests, float64 [R].

        Raises:
            EncodeError: a value does not fit its feature.
        """
        layout, num_rows = self.request_layout, len(time)
        columns = self.with_recent_statistics(columns, time=time)
        ids, dense = _tile(self._request_default, num_rows)
        self._write(layout, self._request_moments, ids, dense, columns, time)
        if any(isinstance(self._features[name], TimePart) for name in layout.ids):
            local = time + self._utc_offsets(time)
            for j, name in enumerate(layout.ids):
                feature = self._features[name]
                if isinstance(feature, TimePart):
                    ids[:, j] = FIRST_CODE + _time_part(feature.part, local)
        history = np.zeros((num_rows, layout.history_width), np.int64)
        start = 0
        for feature in layout.histories:
            column = columns.get(feature.name)
            if column is not None:
                stop = start + feature.max_length
                history[:, start:stop] = self._history(feature, column, columns, time)
            start += feature.max_length
        return RequestBlock(ids=ids, dense=dense, history=history)

    def candidate_block(self, columns: Columns, *, time: Floats) -> CandidateBlock:
        """Encodes one row per candidate; `time` float64 [N] is that of each candidate's request.

        Raises:
            EncodeError: a value does not fit its feature.
        """
        ids, dense = _tile(self._candidate_default, len(time))
        block = CandidateBlock(ids=ids, dense=dense)
        self.overwrite_candidates(block, columns)
        matches = self.candidate_layout.matches
        counts, last_times = np.full((2, len(time), len(matches)), np.nan)
        given = False
        for j, name in enumerate(matches):
            pair = (f"{name}_count", f"{name}_last_time")
            present = [column for column in pair if column in columns]
            if len(present) == 1:
                raise EncodeError(present[0], f"{' and '.join(pair)} must be given together")
            if present:
                given = True
                counts[:, j], last_times[:, j] = (numbers(c, columns[c]) for c in pair)
        if given:
            self.overwrite_matches(block, counts, last_times, time=time)
        return block

    def overwrite_candidates(self, block: CandidateBlock, columns: Columns) -> None:
        """Writes the given id and numeric features into the block; columns have its length."""
        self._write(
            self.candidate_layout, self._candidate_moments, block.ids, block.dense, columns, None
        )

    def overwrite_matches(
        self, block: CandidateBlock, counts: Floats, last_times: Floats, *, time: Floats
    ) -> None:
        """Writes every match feature: counts and last times [N, M] (NaN for none), time [N]."""
        layout = self.candidate_layout
        first, width = len(layout.numerics), len(layout.matches)
        values = self.transform_matches(layout.matches, counts, last_times, time=time)
        mean, std = self._candidate_moments
        columns = slice(first, first + 2 * width)
        flags = slice(len(mean) - width, len(mean))
        missing = np.isnan(values[:, :width])
        block.dense[:, columns] = np.nan_to_num((values - mean[columns]) / std[columns], nan=0.0)
        block.dense[:, flags] = (missing - mean[flags]) / std[flags]

    def transform_matches(
        self, names: Sequence[str], counts: Floats, last_times: Floats, *, time: Floats
    ) -> Floats:
        """log1p of counts and of days since of k match features, [N, 2k], before standardising.

        An entry is missing (NaN) where there is none, where it is later than the request, and where
        it is older than the feature's max_age_days.
        """
        days = (time[:, None] - last_times) / SECONDS_PER_DAY
        limits = np.array([self._max_age_days[name] for name in names])
        with np.errstate(invalid="ignore"):
            present = (counts > 0) & (days >= 0) & (days <= limits)
        both = np.concatenate([counts, days], axis=1)
        return np.log1p(np.where(np.concatenate([present, present], axis=1), both, np.nan))

    def with_recent_statistics(self, columns: Columns, *, time: Floats) -> Columns:
        """The columns, and beside them those of every recent feature whose events are given."""
        made: dict[str, Column | Ragged] = dict(columns)
        given = [feature for feature in self._recents if columns.get(feature.name) is not None]
        utc_offset = self._utc_offsets(time) if given else np.empty(0, np.float64)
        for feature in given:
            here = None
            if feature.context is not None:
                here = self._hashes(feature.context, columns.get(feature.context), len(time))
            made |= recent_statistics(
                feature,
                self._recent_column(feature, columns),
                time=time,
                utc_offset=utc_offset,
                here=here,
            )
        return made

    def transform_numerics(
        self, layout: BlockLayout, columns: Columns, *, time: Floats | None
    ) -> tuple[list[int], Floats]:
        """The given numeric features, clipped and log1p'd, before standardising; NaN where missing.

        Returns:
            Positions of the features in `layout.numerics`, and the values [n, k].
        """
        given: list[int] = []
        values: list[Floats] = []
        for j, name in enumerate(layout.numerics):
            column = self._column(name, columns)
            if column is None:
                continue
            given.append(j)
            if name in self._features:
                values.append(self._transform_numeric(name, numbers(name, column), time))
            else:  # a statistic of a recent feature is ready as it is
                values.append(np.asarray(column, np.float64))
        if not given:
            return given, np.empty((0, 0), np.float64)
        # Several times faster than stack for one row of many columns.
        return given, np.concatenate(values).reshape(len(values), -1).T

    def match_keys(self, columns: Columns, *, num_rows: int) -> npt.NDArray[np.uint64]:
        """Key hash of each candidate's attribute for every match feature, uint64 [N, M]."""
        hashes: dict[str, npt.NDArray[np.uint64]] = {}
        matches = self.candidate_layout.matches
        keys = np.full((num_rows, len(matches)), NO_KEY, np.uint64)
        for j, name in enumerate(matches):
            attribute = self._features[name].attribute  # type: ignore[union-attr]  # a Match feature
            column = columns.get(attribute)
            if column is None:
                continue
            if attribute not in hashes:
                hashes[attribute] = self._hashes(attribute, column, num_rows)
            keys[:, j] = hashes[attribute]
        return keys

    def _recent_column(self, feature: Recent, columns: Columns) -> RecentColumn:
        name, time_name, *context_name = raw_columns(feature)
        ragged = as_ragged(name, columns[name], columns.get(time_name))
        # As a record holds them, so that both sides see equal numbers.
        values = numbers(name, ragged.values).astype(np.float32).astype(np.float64)
        if not (values >= 0).all():
            raise EncodeError(name, "expected numbers of 0 or more")
        if not np.isfinite(ragged.times).all():
            raise EncodeError(time_name, f"expected a time for every event of {name}")
        later = np.flatnonzero(ragged.times[1:] > ragged.times[:-1]) + 1
        if len(later) and not np.isin(later, ragged.offsets).all():
            raise EncodeError(time_name, "expected the newest event first")
        keys = None
        if context_name and columns.get(context_name[0]) is not None:
            keys = self._recent_keys(context_name[0], columns[context_name[0]], ragged.offsets)
        events = Ragged(values=values, times=ragged.times, offsets=ragged.offsets)
        return RecentColumn(events=events, keys=keys)

    def _recent_keys(
        self, name: str, column: Column | Ragged, offsets: Ids
    ) -> npt.NDArray[np.uint64]:
        ragged = as_ragged(name, column, None)
        if not np.array_equal(ragged.offsets, offsets):
            raise EncodeError(name, "expected one value per event")
        if isinstance(column, Ragged):
            return np.asarray(column.values, np.uint64)  # hashed already: from events or a record
        return self._hashes(name, ragged.values, len(ragged.times))

    def _hashes(
        self, name: str, column: Column | Ragged | None, num_rows: int
    ) -> npt.NDArray[np.uint64]:
        if column is None:
            return np.full(num_rows, NO_KEY, np.uint64)
        hashed = map_ids(name, column, lambda v: hash_id(canonical_id(v)), null=NO_KEY)
        return hashed.view(np.uint64)

    def encode_ids(self, name: str, column: Column | Ragged) -> Ids:
        """Codes of one categorical or hashed feature, int64 [n]."""
        feature = self._features[name]
        if isinstance(feature, Hashed):
            buckets, default = feature.num_buckets, canonical_id(feature.default)

            def code(value: object) -> int:
                canonical = canonical_id(value) or default
                if canonical is None:
                    return MISSING_CODE
                return FIRST_CODE + hash_id(canonical) % buckets

        else:
            assert isinstance(feature, Categorical)
            vocabulary, default = self._vocabularies[name], canonical_id(feature.default)

            def code(value: object) -> int:
                canonical = canonical_id(value) or default
                if canonical is None:
                    return MISSING_CODE
                return vocabulary.get(canonical, UNKNOWN_CODE)

        return map_ids(name, column, code, null=code(None))

    def _write(
        self,
        layout: BlockLayout,
        moments: tuple[Floats, Floats],
        ids: Ids,
        dense: Dense,
        columns: Columns,
        time: Floats | None,
    ) -> None:
        for j, name in enumerate(layout.ids):
            if not isinstance(self._features[name], TimePart):
                column = self._column(name, columns)
                if column is not None:
                    ids[:, j] = self.encode_ids(name, column)
        given, values = self.transform_numerics(layout, columns, time=time)
        if given:
            mean, std = moments
            missing = np.isnan(values)
            places = np.array(given, np.int64)
            dense[:, places] = np.where(missing, 0.0, (values - mean[places]) / std[places])
            flags = places + len(layout.value_columns)
            dense[:, flags] = (missing - mean[flags]) / std[flags]

    def _column(self, name: str, columns: Columns) -> Column | Ragged | None:
        # A fixed feature keeps the value that the default row was made with.
        return None if name in self._fixed else columns.get(name)

    def _transform_numeric(self, name: str, raw: Floats, time: Floats | None) -> Floats:
        feature = self._features[name]
        if isinstance(feature, Elapsed):
            if time is None:
                return np.full(len(raw), np.nan)
            days = (time - raw) / SECONDS_PER_DAY
            with np.errstate(invalid="ignore"):
                return np.log1p(np.where(days >= 0, days, np.nan))
        assert isinstance(feature, Numeric)
        if feature.default is not None:
            raw = np.where(np.isnan(raw), feature.default, raw)
        raw = np.clip(raw, feature.minimum, feature.maximum)
        return np.log1p(raw) if feature.log1p else raw

    def _history(
        self, feature: History, column: Column | Ragged, columns: Columns, time: Floats
    ) -> Ids:
        ragged = as_ragged(feature.name, column, columns.get(f"{feature.name}_time"))
        try:
            codes = self.encode_ids(feature.of, ragged.values)
        except EncodeError as exc:
            raise EncodeError(feature.name, exc.reason, row=exc.row) from exc
        row = np.repeat(np.arange(len(time)), np.diff(ragged.offsets))
        keep = ragged.times <= time[row]
        row, codes = row[keep], codes[keep]
        counts = np.bincount(row, minlength=len(time))
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        place = np.arange(len(row)) - starts[row]
        fits = place < feature.max_length
        encoded = np.full((len(time), feature.max_length), PADDING_CODE, np.int64)
        encoded[row[fits], place[fits]] = codes[fits]
        return encoded

    def _default_row(self, layout: BlockLayout) -> tuple[Ids, Dense]:
        ids = np.full((1, len(layout.ids)), MISSING_CODE, np.int64)
        mean, std = moments = _moments(self.fitted, layout)
        dense = np.zeros((1, len(layout.dense_columns)), np.float32)
        flags = slice(len(layout.value_columns), None)
        dense[:, flags] = (1.0 - mean[flags]) / std[flags]
        columns: dict[str, Column] = {}
        for name in (*layout.ids, *layout.numerics):
            value = getattr(self._features.get(name), "default", None)
            if name in self._fixed:
                value = self._features[name].serving_value  # type: ignore[union-attr]  # log_only features have one
            if value is not None:
                columns[name] = [value]
        fixed, self._fixed = self._fixed, set()
        self._write(layout, moments, ids, dense, columns, None)
        self._fixed = fixed
        return ids, dense

    def _utc_offsets(self, time: Floats) -> Floats:
        # Offsets change at whole quarters of an hour only; Python is called once per distinct one.
        if len(time) == 1:
            return np.array([self._offset(float(np.floor(time[0] / 900.0)) * 900.0)], np.float64)
        quarters, inverse = np.unique(np.floor(time / 900.0), return_inverse=True)
        offsets = [self._offset(float(quarter) * 900.0) for quarter in quarters]
        return np.array(offsets, np.float64)[inverse]

    def _offset(self, time: float) -> float:
        try:
            offset = datetime.fromtimestamp(time, self._time_zone).utcoffset()
        except (OverflowError, ValueError, OSError) as exc:
            raise EncodeError("time", f"{time!r} is not a time in years 1 to 9999") from exc
        assert offset is not None
        return offset.total_seconds()


def _time_part(part: str, local: Floats) -> Ids:
    if part == "hour":
        return (np.floor(local / 3600.0) % 24).astype(np.int64)
    # 1970-01-01 was a Thursday; Monday is 0.
    return ((np.floor(local / SECONDS_PER_DAY) + 3) % 7).astype(np.int64)


def _moments(fitted: FittedSchema, layout: BlockLayout) -> tuple[Floats, Floats]:
    found = [fitted.moments.get(name) for name in layout.dense_columns]
    mean = np.array([0.0 if m is None else m.mean for m in found], np.float64)
    std = np.array([1.0 if m is None else m.std for m in found], np.float64)
    return mean, std


def _tile(row: tuple[Ids, Dense], num_rows: int) -> tuple[Ids, Dense]:
    ids, dense = row
    return np.repeat(ids, num_rows, axis=0), np.repeat(dense, num_rows, axis=0)
