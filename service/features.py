"""One request's features: what the caller sent, the record and the item table hold, as blocks.

Pure computation on the event loop: no store, no model, no HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from model.contract.blocks import Blocks, CandidateBlock
from model.contract.columns import Column, Floats, Ragged, compact_ids, numbers
from model.contract.encode import Encoder
from model.contract.errors import EncodeError, RecordError
from model.contract.ids import canonical_id
from model.contract.record import HistoryEntries, Keys, MatchTable, RecentEntries, UserRecord
from model.contract.spec import Feature, History, Match, Recent, raw_columns
from service.errors import InvalidRequest
from service.item_index import Ids
from service.items import CandidateRows, ItemTable

Id = str | int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenColumn:
    """Values of one raw column, of all candidates or of some.

    Attributes:
        values: JSON values; None says that the value is missing.
        rows: Positions of the candidates they belong to; None means all, in order.
    """

    values: Sequence[object]
    rows: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """What a caller wants scored, at least one; repeats are allowed.

    Attributes:
        item_ids: As sent.
        columns: Inline features by raw column name.
        is_columnar: Whether the caller wrote columns; decides how errors name a field.
        has_objects: Whether the caller wrote one object per candidate; likewise.
    """

    item_ids: Sequence[Id]
    columns: Mapping[str, GivenColumn] = field(default_factory=dict)
    is_columnar: bool = False
    has_objects: bool = False

    def path(self, name: str, row: int | None) -> str:
        """Where the request has the value of a raw column, or of `item_id`."""
        if self.is_columnar:
            return f"candidates.{name}" + ("" if row is None else f"[{row}]")
        place = "candidates" if row is None else f"candidates[{row}]"
        return f"{place}.{name}" if self.has_objects else place


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRequest:
    """One request, ready for the model.

    Attributes:
        blocks: One request row, and the candidates in the order asked.
        is_known: bool [N], False for items that are not in the item table.
        ignored: Names the caller gave that are no features of the request, sorted.
    """

    blocks: Blocks
    is_known: npt.NDArray[np.bool_]
    ignored: tuple[str, ...]


class FeatureSource:
    """Puts features together by one bundle's encoder and item table. Immutable."""

    def __init__(self, encoder: Encoder, items: ItemTable) -> None:
        """Looks up once which raw columns come from where.

        Args:
            encoder: The bundle's.
            items: Encoded by the same encoder.
        """
        self._encoder = encoder
        self._items = items
        schema = encoder.schema
        given = [f for f in schema.features if f.source != "log_only"]
        self._context_columns = _columns_of(f for f in given if f.scope == "context")
        # Recent events come from the record only.
        users = [f for f in given if f.scope == "user" and not isinstance(f, Recent)]
        self._user_columns = _columns_of(users)
        self._histories = {f.name for f in given if isinstance(f, History)}
        self._history_times = {f"{name}_time": name for name in self._histories}
        stored = [f for f in users if f.source == "store"]
        self._stored_values = _columns_of(f for f in stored if not isinstance(f, History))
        self._stored_histories = {f.name for f in stored if isinstance(f, History)}
        self._candidate_columns = _columns_of(
            f for f in given if not f.is_request_side and not isinstance(f, Match)
        )
        self._id_columns = frozenset(encoder.candidate_layout.ids)
        matches = [f for f in schema.features if isinstance(f, Match)]
        self._match_columns = _columns_of(matches)
        self._matches = tuple(enumerate(matches))
        self._match_names = tuple(f.name for f in matches)
        self._match_attributes = {f.attribute for f in matches}
        self.reads_user_id = schema.log.user_id in self._user_columns
        self.uses_store = any(f.source == "store" for f in given)

    def encode(
        self,
        *,
        user_id: Id,
        time: float,
        context: Mapping[str, object],
        user_features: Mapping[str, object],
        candidates: Candidates,
        record: UserRecord | None,
    ) -> EncodedRequest:
        """Encodes one request.

        Args:
            user_id: As sent; only for a schema that has it as a feature.
            time: Unix seconds of the request. Stored events after it do not count.
            context: Raw values by raw column name; None says that the value is missing.
            user_features: Likewise; they replace those of the record.
            candidates: What to score.
            record: None for a user of whom nothing is stored, or nothing could be read.

        Raises:
            InvalidRequest: A value does not fit its feature; the field is named.
            RecordError: The record holds such a value.
        """
        ignored: set[str] = set()
        candidate, is_known = self._candidate_block(candidates, record, time, ignored)
        values: dict[str, object] = {}
        histories: dict[str, Column | Ragged] = {}
        recents: Mapping[str, RecentEntries] = {}
        if record is not None:
            recents = record.recents
            for name, stored in record.features.items():
                if name in self._stored_values:
                    values[name] = stored
            for name, entries in record.histories.items():
                if name in self._stored_histories:
                    histories[name] = _stored_history(entries)
        if self.reads_user_id:
            values[self._encoder.schema.log.user_id] = user_id
        self._add_given(context, self._context_columns, values, histories, ignored)
        self._add_given(user_features, self._user_columns, values, histories, ignored)
        try:
            request = self._encoder.row.encode(
                values, time=time, recents=recents, histories=histories
            )
        except EncodeError as exc:
            raise self._request_error(exc, context, user_features, values) from exc
        blocks = Blocks(
            request=request,
            candidate=candidate,
            request_of=np.zeros(len(candidate), np.int64),
        )
        return EncodedRequest(
            blocks=blocks, is_known=is_known, ignored=tuple(sorted(ignored)) if ignored else ()
        )

    def _add_given(
        self,
        given: Mapping[str, object],
        known: frozenset[str],
        values: dict[str, object],
        histories: dict[str, Column | Ragged],
        ignored: set[str],
    ) -> None:
        for name, value in given.items():
            if name not in known:
                ignored.add(name)
            elif name in self._histories:
                histories[name] = _given_history(name, given)
            elif name not in self._history_times:
                values[name] = value
            elif self._history_times[name] not in given:
                raise InvalidRequest(
                    "there are no ids to these times", field=f"user_features.{name}"
                )

    def _request_error(
        self,
        exc: EncodeError,
        context: Mapping[str, object],
        user_features: Mapping[str, object],
        values: Mapping[str, object],
    ) -> InvalidRequest | RecordError:
        """Says whose value does not fit: the caller's, by its path, or the record's."""
        name = exc.feature
        if name in user_features and name in self._user_columns:
            path = f"user_features.{name}"
        elif name in context and name in self._context_columns:
            path = f"context.{name}"
        elif self.reads_user_id and name == self._encoder.schema.log.user_id:
            path = "user_id"
        elif name == "time" and name not in values:
            path = "time"
        else:
            return RecordError(str(exc), where=name)
        is_list = name in self._histories and exc.row is not None
        return InvalidRequest(exc.reason, field=f"{path}[{exc.row}]" if is_list else path)

    def _candidate_block(
        self,
        candidates: Candidates,
        record: UserRecord | None,
        time: float,
        ignored: set[str],
    ) -> tuple[CandidateBlock, npt.NDArray[np.bool_]]:
        item_ids = _canonical_item_ids(candidates)
        try:
            rows = self._items.take(item_ids)
        except EncodeError as exc:
            raise InvalidRequest(exc.reason, field=candidates.path("item_id", None)) from exc
        block, keys = rows.block, rows.keys
        stale = self._stale_sums(rows)
        inline_matches: dict[str, GivenColumn] = {}
        for name, given in candidates.columns.items():
            if name in self._candidate_columns:
                self._overwrite(block, keys, name, given, candidates)
                if name in self._items.summed_features:
                    stale = np.zeros(len(block), np.bool_) if stale is None else stale
                    stale[_rows(given)] = True
            elif name in self._match_columns:
                inline_matches[name] = given
            else:
                ignored.add(name)
        if inline_matches or (record is not None and record.matches):
            self._write_matches(block, keys, record, inline_matches, candidates, time)
        if stale is not None:
            self._items.renew_sums(block, np.flatnonzero(stale))
        return block, rows.is_known

    def _stale_sums(self, rows: CandidateRows) -> npt.NDArray[np.bool_] | None:
        """Which candidates have sums of another item, bool [N]; None if all are right."""
        if self._encoder.schema.log.item_id not in self._items.summed_features:
            return None  # An item that is not known has the sums of one of which nothing is known.
        return None if rows.is_known.all() else ~rows.is_known

    def _overwrite(
        self,
        block: CandidateBlock,
        keys: Keys,
        name: str,
        given: GivenColumn,
        candidates: Candidates,
    ) -> None:
        is_id = name in self._id_columns
        columns = {name: given.values if is_id else _compact(given.values)}
        try:
            if given.rows is None:
                self._encoder.overwrite_candidates(block, columns)
            else:
                rows = np.array(given.rows, np.intp)
                part = CandidateBlock(ids=block.ids[rows], dense=block.dense[rows])
                self._encoder.overwrite_candidates(part, columns)
                block.ids[rows], block.dense[rows] = part.ids, part.dense
        except EncodeError as exc:
            raise _invalid_value(exc, given, candidates) from exc
        if name in self._match_attributes:
            columns = {name: compact_ids(given.values)}
            given_keys = self._encoder.match_keys(columns, num_rows=len(given.values))
            for j, feature in self._matches:
                if feature.attribute == name:
                    keys[_rows(given), j] = given_keys[:, j]

    def _write_matches(
        self,
        block: CandidateBlock,
        keys: Keys,
        record: UserRecord | None,
        inline: Mapping[str, GivenColumn],
        candidates: Candidates,
        time: float,
    ) -> None:
        table = MatchTable.of({} if record is None else record.matches)
        entries = table.find(self._match_names, keys)
        for j, feature in self._matches if inline else ():
            given_counts = inline.get(feature.count_column)
            given_times = inline.get(feature.last_time_column)
            if given_counts is not None and given_times is not None:
                _require_same_rows(feature, given_counts, given_times, candidates)
                for target, name, given in (
                    (entries[0, j], feature.count_column, given_counts),
                    (entries[1, j], feature.last_time_column, given_times),
                ):
                    target[_rows(given)] = _numbers(name, given, candidates)
            elif given_counts is not None or given_times is not None:
                lone = feature.last_time_column if given_counts is None else feature.count_column
                raise _lone_match_column(feature, inline[lone], lone, candidates)
        self._encoder.overwrite_matches(block, entries, time=time)


def _columns_of(features: Iterable[Feature]) -> frozenset[str]:
    return frozenset(name for feature in features for name in raw_columns(feature))


def _canonical_item_ids(candidates: Candidates) -> Ids:
    kinds = set(map(type, candidates.item_ids))
    if kinds == {int}:
        return cast("Sequence[int]", candidates.item_ids)
    if kinds == {str} and "" not in candidates.item_ids:
        return cast("Sequence[str]", candidates.item_ids)
    item_ids: list[str] = []
    for row, item_id in enumerate(candidates.item_ids):
        try:
            canonical = canonical_id(item_id)
        except TypeError as exc:
            raise InvalidRequest(str(exc), field=candidates.path("item_id", row)) from exc
        if canonical is None:
            raise InvalidRequest("the item id is empty", field=candidates.path("item_id", row))
        item_ids.append(canonical)
    return item_ids


def _given_history(name: str, given: Mapping[str, object]) -> Ragged:
    path = f"user_features.{name}"
    ids, times = given[name], given.get(f"{name}_time")
    if ids is None:
        ids, times = [], None
    if not isinstance(ids, list):
        raise InvalidRequest("expected a list of ids", field=path)
    if times is None:
        # Without times every id counts, however late.
        seconds = np.full(len(ids), -np.inf)
    elif not isinstance(times, list) or len(times) != len(ids):
        raise InvalidRequest(
            f"expected a list of {len(ids)} times, one per id of {name}", field=f"{path}_time"
        )
    else:
        try:
            seconds = numbers(f"{name}_time", times)
        except EncodeError as exc:
            raise InvalidRequest(exc.reason, field=f"{path}_time[{exc.row}]") from exc
    return Ragged(values=ids, times=seconds, offsets=np.array([0, len(ids)], np.int64))


def _stored_history(entries: HistoryEntries) -> Ragged:
    return Ragged(
        values=entries.ids,
        times=entries.times.astype(np.float64),
        offsets=np.array([0, len(entries.ids)], np.int64),
    )


def _compact(values: Sequence[object]) -> Column:
    """The same numbers as an array, which the encoder need not go through value by value.

    Only if none can be at fault; others are left to the encoder, which names them.
    """
    if set(map(type, values)) - {type(None)} <= {int, float}:
        try:
            return np.array(values, np.float64)
        except OverflowError:
            return values
    return values


def _rows(given: GivenColumn) -> slice | Sequence[int]:
    return slice(None) if given.rows is None else given.rows


def _numbers(name: str, given: GivenColumn, candidates: Candidates) -> Floats:
    try:
        return numbers(name, _compact(given.values))
    except EncodeError as exc:
        raise _invalid_value(exc, given, candidates) from exc


def _invalid_value(exc: EncodeError, given: GivenColumn, candidates: Candidates) -> InvalidRequest:
    row = exc.row if exc.row is None or given.rows is None else given.rows[exc.row]
    return InvalidRequest(exc.reason, field=candidates.path(exc.feature, row))


def _require_same_rows(
    feature: Match, counts: GivenColumn, times: GivenColumn, candidates: Candidates
) -> None:
    if counts.rows == times.rows:
        return
    all_rows = range(len(candidates.item_ids))
    counted = set(all_rows if counts.rows is None else counts.rows)
    timed = set(all_rows if times.rows is None else times.rows)
    row = min(counted ^ timed)
    name = feature.count_column if row in counted else feature.last_time_column
    raise _lone_match_column(feature, GivenColumn(values=[], rows=[row]), name, candidates)


def _lone_match_column(
    feature: Match, given: GivenColumn, name: str, candidates: Candidates
) -> InvalidRequest:
    row = given.rows[0] if given.rows else 0
    return InvalidRequest(
        f"{feature.count_column} and {feature.last_time_column} must be given together",
        field=candidates.path(name, None if candidates.is_columnar else row),
    )
