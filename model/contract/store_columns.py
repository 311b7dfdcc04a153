"""Which encoded columns come from the user record, and what stands there without one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.contract.blocks import BlockLayout, Dense
from model.contract.columns import Ids
from model.contract.encode import Encoder
from model.contract.spec import Recent


@dataclass(frozen=True, kw_only=True)
class StoreColumns:
    """Columns filled from the user record, with the values they have when there is none.

    Attributes:
        request_ids: positions in the request block's ids; `request_id_values` int64, their codes.
        request_dense: positions in its dense columns; `request_dense_values` float32.
        request_history: positions in its history columns; padding without a record.
        candidate_dense: positions in the candidate block's dense columns, with their values.
    """

    request_ids: Ids
    request_id_values: Ids
    request_dense: Ids
    request_dense_values: Dense
    request_history: Ids
    candidate_dense: Ids
    candidate_dense_values: Dense

    @classmethod
    def of(cls, encoder: Encoder) -> "StoreColumns":
        """Finds them by encoding a request of which nothing is known."""
        schema = encoder.schema
        stored = {f.name for f in schema.features if f.source == "store"}
        for recent in (f for f in schema.features if isinstance(f, Recent)):
            stored |= set(recent.statistics)
        request, candidate = encoder.request_layout, encoder.candidate_layout
        no_time = np.zeros(1)
        empty = encoder.request_block({}, time=no_time)
        empty_candidate = encoder.candidate_block({}, time=no_time)
        request_ids = _positions(request.ids, stored)
        request_dense = _dense_positions(request, stored)
        candidate_dense = _dense_positions(candidate, stored)
        history = [h.name for h in request.histories for _ in range(h.max_length)]
        return cls(
            request_ids=request_ids,
            request_id_values=empty.ids[0, request_ids],
            request_dense=request_dense,
            request_dense_values=empty.dense[0, request_dense],
            request_history=_positions(history, stored),
            candidate_dense=candidate_dense,
            candidate_dense_values=empty_candidate.dense[0, candidate_dense],
        )


def _positions(names: Sequence[str], wanted: set[str]) -> Ids:
    return np.array([j for j, name in enumerate(names) if name in wanted], np.int64)


def _dense_positions(layout: BlockLayout, wanted: set[str]) -> Ids:
    owners = (
        *layout.numerics,
        *layout.matches,
        *layout.matches,
        *layout.numerics,
        *layout.matches,
    )
    return _positions(owners, wanted)
