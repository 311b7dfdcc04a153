"""The encoder: raw columns to blocks. Training, item table and online request all call this one.

Two blocks: the request block has one row per request (user and context features), the candidate
block one row per candidate (item and cross features); `request_of` says which request row a
candidate belongs to. A block starts as copies of a row in which everything is missing, and given
columns overwrite it: so an absent column, an unknown user and an unknown item need no code of their
own.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout, CandidateBlock, RequestBlock, layouts
from model.contract.codes import IdCodes
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
from model.contract.ids import NO_KEY, key_of
from model.contract.matches import MatchPlan, log_matches
from model.contract.numerics import NumericPlan, moments_of, raw_numbers
from model.contract.recent import RecentColumn, recent_statistics
from model.contract.request_row import RowEncoder, quarter_of
from model.contract.spec import (
    FIRST_CODE,
    MISSING_CODE,
    PADDING_CODE,
    Categorical,
    FittedSchema,
    Hashed,
    History,
    Match,
    Recent,
    TimePart,
    raw_columns,
)
from model.contract.times import time_part


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One block's layout, and what is looked up once for it.

    Attributes:
        id_places: column of each id feature that a raw column may set; `numeric_places` likewise,
            among the layout's numerics.
        default_ids: int64 [1, F], of a row of which nothing is known.
        default_raw: float64 [K, 1], likewise: NaN, or the serving value.
        default_values: those transformed, [K].
        columns: mean and deviation of all dense columns, float64 [D, 1] each.
        plan: of all numerics.
    """

    layout: BlockLayout
    id_places: Mapping[str, int]
    numeric_places: Mapping[str, int]
    default_ids: Ids
    default_raw: Floats
    default_values: list[float]
    columns: tuple[Floats, Floats]
    plan: NumericPlan


class Encoder:
    """Encodes by one fitted schema. Immutable; safe to share between threads.

    `row` encodes single requests, as `request_block` does those of one row, in less time.

    With `serving`, `log_only` features take their serving value whatever a column says; without,
    they are read like any other (training).
    """

    def __init__(self, fitted: FittedSchema, *, serving: bool = True) -> None:
        self.fitted = fitted
        self.schema = fitted.schema_
        self.request_layout, self.candidate_layout = layouts(self.schema)
        self._features = {feature.name: feature for feature in self.schema.features}
        self._recents = [f for f in self.schema.features if isinstance(f, Recent)]
        self._fixed = {
            f.name: f.serving_value  # type: ignore[union-attr]  # log_only features have one
            for f in self.schema.features
            if serving and f.source == "log_only"
        }
        self._codes = {
            f.name: IdCodes(f, fitted.vocabularies.get(f.name, ()))
            for f in self.schema.features
            if isinstance(f, Categorical | Hashed)
        }
        self._statistics_start = {
            f.name: self.request_layout.numerics.index(f.statistics[0]) for f in self._recents
        }
        self._max_age_days = {
            f.name: f.max_age_days or np.inf for f in self.schema.features if isinstance(f, Match)
        }
        self._time_zone = ZoneInfo(self.schema.time_zone)
        self._offset = functools.lru_cache(maxsize=64)(self._offset_at)
        self._request = self._side(self.request_layout)
        self._candidate = self._side(self.candidate_layout)
        self._candidate_default = self._default_candidate()
        mean, std = self._candidate.columns
        limits = [self._max_age_days[name] for name in self.candidate_layout.matches]
        self._match_plan = MatchPlan.of(self.candidate_layout, limits, mean=mean, std=std)
        self._time_parts: list[tuple[int, str]] = [
            (j, feature.part)
            for j, name in enumerate(self.request_layout.ids)
            if isinstance(feature := self._features[name], TimePart)
        ]
        self.row = self._row_encoder()

    def table_size(self, name: str) -> int:
        """Number of codes of an id feature, its embedding table's rows."""
        feature = self._features[name]
        if isinstance(feature, TimePart):
            return FIRST_CODE + feature.num_values
        return self._codes[name].table_size

    def request_block(
        self,
        columns: Columns,
        *,
        time: Floats,
        recents: Mapping[str, RecentColumn] = MappingProxyType({}),
    ) -> RequestBlock:
        """Encodes one row per request.

        Args:
            columns: raw columns by raw column name; those of no request feature are ignored.
            time: unix seconds of the requests, float64 [R].
            recents: events of recent features, by name, that were checked when they were read;
                in place of their raw columns.

        Raises:
            EncodeError: a value does not fit its feature.
        """
        side, num_rows = self._request, len(time)
        found = self._given_recents(columns, recents)
        utc_offset = self._utc_offsets(time) if self._time_parts or found else None
        ids = np.repeat(side.default_ids, num_rows, axis=0)
        self._write_ids(side, ids, columns)
        values = self._request_values(columns, time)
        for feature, column in found:
            assert utc_offset is not None
            start = self._statistics_start[feature.name]
            here = self._here(feature, columns, num_rows)
            statistics = recent_statistics(
                feature, column, time=time, utc_offset=utc_offset, here=here
            )
            values[start : start + len(statistics)] = statistics
        dense = np.empty((num_rows, len(side.layout.dense_columns)), np.float32)
        side.plan.write(dense, values)
        if self._time_parts:
            assert utc_offset is not None
            for j, part in self._time_parts:
                ids[:, j] = FIRST_CODE + time_part(part, time + utc_offset)
        return RequestBlock(ids=ids, dense=dense, history=self._histories(columns, time))

    def _request_values(self, columns: Columns, time: Floats) -> Floats:
        """Transformed values of all the request's numerics, [K, R]."""
        side = self._request
        given = [name for name in columns if name in side.numeric_places]
        raw = np.repeat(side.default_raw, len(time), axis=1)
        if given:
            places = [side.numeric_places[name] for name in given]
            raw[places] = raw_numbers((name, columns[name]) for name in given)
        return side.plan.transform(raw, time)

    def candidate_block(self, columns: Columns, *, time: Floats) -> CandidateBlock:
        """Encodes one row per candidate; `time` float64 [N] is that of each candidate's request.

        Raises:
            EncodeError: a value does not fit its feature.
        """
        default = self._candidate_default
        block = CandidateBlock(
            ids=np.repeat(default.ids, len(time), axis=0),
            dense=np.repeat(default.dense, len(time), axis=0),
        )
        self.overwrite_candidates(block, columns)
        matches = self.candidate_layout.matches
        entries = np.full((2, len(matches), len(time)), np.nan)
        given = False
        for j, name in enumerate(matches):
            pair = (f"{name}_count", f"{name}_last_time")
            present = [column for column in pair if column in columns]
            if len(present) == 1:
                raise EncodeError(present[0], f"{' and '.join(pair)} must be given together")
            if present:
                given = True
                entries[:, j] = [numbers(c, columns[c]) for c in pair]
        if given:
            self.overwrite_matches(block, entries, time=time)
        return block

    def overwrite_candidates(self, block: CandidateBlock, columns: Columns) -> None:
        """Writes the given id and numeric features into the block; columns have its length."""
        side = self._candidate
        self._write_ids(side, block.ids, columns)
        places, values = self.transform_numerics(side.layout, columns, time=None)
        if places:
            side.plan.select(places).write(block.dense, values.T)

    def overwrite_matches(
        self, block: CandidateBlock, entries: Floats, *, time: Floats | float
    ) -> None:
        """Writes every match feature.

        Args:
            block: N candidates.
            entries: counts, NaN or 0 for none, and last times in unix seconds, of no meaning where
                there is none: [2, M, N]; used up.
            time: unix seconds of the requests, [N] or one for all.
        """
        self._match_plan.write(block.dense, entries, time)

    def transform_matches(
        self, names: Sequence[str], counts: Floats, last_times: Floats, *, time: Floats | float
    ) -> Floats:
        """log1p of counts and of days since of k match features, [2k, N], before standardising.

        An entry is missing (NaN) where there is none, where it is later than the request, and where
        it is older than the feature's max_age_days.
        """
        limits = [self._max_age_days[name] for name in names]
        entries = np.array([counts, last_times], np.float64)
        present = log_matches(limits, entries, time)
        return np.where(present, entries, np.nan).reshape(2 * len(names), -1)

    def with_recent_statistics(self, columns: Columns, *, time: Floats) -> Columns:
        """The columns, and beside them those of every recent feature whose events are given."""
        made: dict[str, Column | Ragged] = dict(columns)
        given = self._given_recents(columns, {})
        utc_offset = self._utc_offsets(time) if given else np.empty(0, np.float64)
        for feature, column in given:
            here = self._here(feature, columns, len(time))
            statistics = recent_statistics(
                feature, column, time=time, utc_offset=utc_offset, here=here
            )
            made |= dict(zip(feature.statistics, statistics, strict=True))
        return made

    def transform_numerics(
        self, layout: BlockLayout, columns: Columns, *, time: Floats | None
    ) -> tuple[list[int], Floats]:
        """The given numeric features, clipped and log1p'd, before standardising; NaN where missing.

        Returns:
            Positions of the features in `layout.numerics`, and the values [n, k].
        """
        side = self._request if layout is self.request_layout else self._candidate
        given = [name for name in columns if name in side.numeric_places]
        if not given:
            return [], np.empty((0, 0), np.float64)
        places = [side.numeric_places[name] for name in given]
        raw = raw_numbers((name, columns[name]) for name in given)
        return places, side.plan.select(places).transform(raw, time).T

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

    def _given_recents(
        self, columns: Columns, recents: Mapping[str, RecentColumn]
    ) -> list[tuple[Recent, RecentColumn]]:
        return [
            (f, recents[f.name] if f.name in recents else self._recent_column(f, columns))
            for f in self._recents
            if f.name in recents or columns.get(f.name) is not None
        ]

    def _here(
        self, feature: Recent, columns: Columns, num_rows: int
    ) -> npt.NDArray[np.uint64] | None:
        if feature.context is None:
            return None
        return self._hashes(feature.context, columns.get(feature.context), num_rows)

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
        hashed = map_ids(name, column, key_of, null=NO_KEY)
        return hashed.view(np.uint64)

    def encode_ids(self, name: str, column: Column | Ragged) -> Ids:
        """Codes of one categorical or hashed feature, int64 [n]."""
        return self._codes[name].many(column)

    def _write_ids(self, side: "_Side", ids: Ids, columns: Columns) -> None:
        for name, column in columns.items():
            j = side.id_places.get(name)
            if j is not None:
                ids[:, j] = self.encode_ids(name, column)

    def _side(self, layout: BlockLayout) -> "_Side":
        mean, std = moments_of(self.fitted, layout)
        ids = [
            self._codes[name].code(self._fixed.get(name)) if name in self._codes else MISSING_CODE
            for name in layout.ids
        ]
        raw = [np.nan if (v := self._fixed.get(name)) is None else v for name in layout.numerics]
        default_raw = np.array(raw, np.float64)[:, None]
        plan = NumericPlan.of(layout, features=self._features, mean=mean, std=std)
        return _Side(
            layout=layout,
            id_places={
                name: j
                for j, name in enumerate(layout.ids)
                if name in self._codes and name not in self._fixed
            },
            numeric_places={
                name: j for j, name in enumerate(layout.numerics) if name not in self._fixed
            },
            default_ids=np.array([ids], np.int64),
            default_raw=default_raw,
            default_values=plan.transform(default_raw, None)[:, 0].tolist(),
            columns=(mean[:, None], std[:, None]),
            plan=plan,
        )

    def _row_encoder(self) -> RowEncoder:
        side = self._request
        return RowEncoder(
            side.layout,
            codes={name: (j, self._codes[name]) for name, j in side.id_places.items()},
            default_ids=side.default_ids[0].tolist(),
            numeric_places=side.numeric_places,
            default_values=side.default_values,
            plan=side.plan,
            recents=[(f, self._statistics_start[f.name]) for f in self._recents],
            time_parts=self._time_parts,
            utc_offset=lambda time: self._offset(quarter_of(time)),
            histories=self._histories,
        )

    def _default_candidate(self) -> CandidateBlock:
        side = self._candidate
        mean, std = side.columns
        dense = np.zeros((1, len(mean)), np.float32)
        flags = slice(len(side.layout.value_columns), None)
        dense[:, flags] = ((1.0 - mean[flags]) / std[flags]).T
        side.plan.write(dense, np.array(side.default_values, np.float64)[:, None])
        return CandidateBlock(ids=side.default_ids, dense=dense)

    def _histories(self, columns: Columns, time: Floats) -> Ids:
        layout = self.request_layout
        history = np.zeros((len(time), layout.history_width), np.int64)
        start = 0
        for feature in layout.histories:
            column = columns.get(feature.name)
            if column is not None:
                stop = start + feature.max_length
                history[:, start:stop] = self._history(feature, column, columns, time)
            start += feature.max_length
        return history

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

    def _utc_offsets(self, time: Floats) -> Floats:
        # Offsets change at whole quarters of an hour only; Python is called once per distinct one.
        quarters, inverse = np.unique(np.floor(time / 900.0), return_inverse=True)
        offsets = [self._offset(float(quarter) * 900.0) for quarter in quarters]
        return np.array(offsets, np.float64)[inverse]

    def _offset_at(self, time: float) -> float:
        try:
            offset = datetime.fromtimestamp(time, self._time_zone).utcoffset()
        except (OverflowError, ValueError, OSError) as exc:
            raise EncodeError("time", f"{time!r} is not a time in years 1 to 9999") from exc
        assert offset is not None
        return offset.total_seconds()
