"""One online request's row: what the encoder makes of a block of one, value by value, bit for bit.

A value is looked up and transformed by the same objects as a block's columns are; what is saved is
the handling of columns of one value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from model.contract.blocks import BlockLayout, RequestBlock
from model.contract.codes import IdCodes
from model.contract.columns import Columns, Floats, Ids, map_id
from model.contract.ids import NO_KEY, key_of
from model.contract.numerics import NumericPlan, raw_number
from model.contract.recent import RecentRow
from model.contract.record import RecentEntries
from model.contract.spec import FIRST_CODE, Recent
from model.contract.times import time_part

_NO_RECENTS: Mapping[str, RecentEntries] = MappingProxyType({})
_NO_HISTORIES: Columns = MappingProxyType({})


class RowEncoder:
    """Encodes single requests by what an encoder has looked up. Immutable."""

    def __init__(
        self,
        layout: BlockLayout,
        *,
        codes: Mapping[str, tuple[int, IdCodes]],
        default_ids: Sequence[int],
        numeric_places: Mapping[str, int],
        default_values: Sequence[float],
        plan: NumericPlan,
        recents: Sequence[tuple[Recent, int]],
        time_parts: Sequence[tuple[int, str]],
        utc_offset: Callable[[float], float],
        histories: Callable[[Columns, Floats], Ids],
    ) -> None:
        """Takes the encoder's parts.

        Args:
            layout: The request block's.
            codes: Column and codes of each id feature that a raw value may set.
            default_ids: Of a row of which nothing is known, [F].
            numeric_places: Place among the layout's numerics of each that a raw value may set.
            default_values: Of such a row, transformed, [K].
            plan: Of all the numerics.
            recents: Recent features, and where their statistics begin among the numerics.
            time_parts: Column and part of each time part.
            utc_offset: Seconds to add for local time, of a unix time.
            histories: Encodes the history columns of requests at these times.
        """
        self._codes, self._default_ids = codes, list(default_ids)
        self._places, self._default_values = numeric_places, list(default_values)
        self._plan, self._time_parts = plan, time_parts
        self._recents = [(feature, start, RecentRow(feature)) for feature, start in recents]
        self._utc_offset, self._histories = utc_offset, histories
        self._no_history = np.zeros((1, layout.history_width), np.int64)
        self._no_history.setflags(write=False)

    def encode(
        self,
        values: Mapping[str, object],
        *,
        time: float,
        recents: Mapping[str, RecentEntries] = _NO_RECENTS,
        histories: Columns = _NO_HISTORIES,
    ) -> RequestBlock:
        """Encodes one request; see `Encoder.request_block`.

        Args:
            values: one raw value by raw column name; those of no request feature are ignored.
            time: unix seconds of the request.
            recents: stored events of recent features, by name.
            histories: raw columns of one row, of history features and of their times.

        Raises:
            EncodeError: a value does not fit its feature.
        """
        ids, row = self._default_ids.copy(), self._default_values.copy()
        raw: dict[int, float] = {}
        for name, value in values.items():
            place = self._places.get(name)
            if place is not None:
                raw[place] = raw_number(name, value)
            elif (found := self._codes.get(name)) is not None:
                ids[found[0]] = found[1].one(value)
        self._plan.transform_one(raw, row, time)
        if self._time_parts or recents:
            utc_offset = self._utc_offset(time)
            for feature, start, plan in self._recents:
                events = recents.get(feature.name)
                if events is not None:
                    made = plan.statistics(
                        events.values.astype(np.float64),
                        events.times.astype(np.float64),
                        events.keys if len(events.keys) else None,
                        time=time,
                        utc_offset=utc_offset,
                        here=_key(feature.context, values),
                    )
                    row[start : start + len(made)] = made
            for j, part in self._time_parts:
                ids[j] = FIRST_CODE + int(time_part(part, time + utc_offset))
        return RequestBlock(
            ids=np.array([ids], np.int64),
            dense=self._plan.write_one(row),
            history=self._histories(histories, np.array([time])) if histories else self._no_history,
        )


def quarter_of(time: float) -> float:
    """The quarter of an hour in which a time is: UTC offsets change at whole ones only."""
    return math.floor(time / 900.0) * 900.0 if math.isfinite(time) else time


def _key(context: str | None, values: Mapping[str, object]) -> int:
    return NO_KEY if context is None else map_id(context, values.get(context), key_of)
