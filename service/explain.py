"""What each feature adds to a candidate's probabilities: the model is asked again without it.

A feature's contribution is the change of the logit when the feature is there, against a request
in which it alone is missing: as if the caller, the record or the item table had no value for it.
All these questions go into one run. Contributions of features that work together overlap, so they
add up to the logit only in a model that is linear in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout, Blocks, RequestBlock
from model.contract.encode import Encoder
from model.contract.spec import Feature, Match, Recent, TimePart
from service.items import ItemTable

Outputs = Mapping[str, npt.NDArray[np.float32]]

# A float32 probability of 0 or 1 has no logit; this far out nobody asks which of two is larger.
_MIN = 1e-7


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where one feature stands in its block."""

    name: str
    ids: npt.NDArray[np.int64]
    dense: npt.NDArray[np.int64]
    history: slice


class Explainer:
    """Asks about candidates of one state. Immutable.

    Attributes:
        features: Names, in the order of the contributions. The hour and the day cannot be
            missing and what only logs know is fixed, so they are not among them.
    """

    def __init__(self, encoder: Encoder, items: ItemTable) -> None:
        """Looks up once where each feature stands.

        Args:
            encoder: The state's.
            items: The state's; renews what the first layer makes of an item.
        """
        self._encoder = encoder
        self._items = items
        asked = [
            f
            for f in encoder.schema.features
            if not isinstance(f, TimePart) and f.source != "log_only"
        ]
        self._request = [_columns(f, encoder.request_layout) for f in asked if f.is_request_side]
        self._candidate = [
            _columns(f, encoder.candidate_layout) for f in asked if not f.is_request_side
        ]
        self.features = tuple(c.name for c in (*self._request, *self._candidate))

    def questions(self, blocks: Blocks, *, time: float) -> Blocks:
        """One request's candidates as they are, then all of them without each feature in turn.

        Args:
            blocks: Of one request row and C candidates.
            time: Unix seconds of the request.

        Returns:
            Of 1 + (request features) request rows and C x (1 + features) candidates.
        """
        num = len(blocks)
        num_request = len(self._request)
        num_asked = 1 + len(self.features)
        request = self._request_rows(blocks.request, time)
        candidate = blocks.candidate.take(np.tile(np.arange(num), num_asked))
        default = self._encoder.candidate_block({}, time=np.array([time]))
        renewed: list[npt.NDArray[np.int64]] = []
        for j, columns in enumerate(self._candidate, start=1 + num_request):
            rows = slice(j * num, (j + 1) * num)
            candidate.ids[rows, columns.ids] = default.ids[0, columns.ids]
            candidate.dense[rows, columns.dense] = default.dense[0, columns.dense]
            if columns.name in self._items.summed_features:
                renewed.append(np.arange(rows.start, rows.stop))
        if renewed:
            self._items.renew_sums(candidate, np.concatenate(renewed))
        of_row = np.zeros(num_asked, np.int64)
        of_row[1 : 1 + num_request] = np.arange(1, 1 + num_request)
        return Blocks(request=request, candidate=candidate, request_of=np.repeat(of_row, num))

    def contributions(self, outputs: Outputs) -> dict[str, npt.NDArray[np.float64]]:
        """What the answers to `questions` say, [C, features] by output name, in logits."""
        found = {}
        for name, values in outputs.items():
            clipped = np.clip(values.astype(np.float64), _MIN, 1 - _MIN)
            logits = np.log(clipped / (1 - clipped)).reshape(1 + len(self.features), -1)
            found[name] = (logits[0] - logits[1:]).T
        return found

    def _request_rows(self, row: RequestBlock, time: float) -> RequestBlock:
        default = self._encoder.row.encode({}, time=time)
        num_rows = 1 + len(self._request)
        rows = RequestBlock(
            ids=row.ids.repeat(num_rows, axis=0),
            dense=row.dense.repeat(num_rows, axis=0),
            history=row.history.repeat(num_rows, axis=0),
        )
        for j, columns in enumerate(self._request, start=1):
            rows.ids[j, columns.ids] = default.ids[0, columns.ids]
            rows.dense[j, columns.dense] = default.dense[0, columns.dense]
            rows.history[j, columns.history] = default.history[0, columns.history]
        return rows


def _columns(feature: Feature, layout: BlockLayout) -> _Columns:
    name = feature.name
    start = 0
    history = slice(0, 0)
    for other in layout.histories:
        if other.name == name:
            history = slice(start, start + other.max_length)
        start += other.max_length
    return _Columns(
        name=name,
        ids=_places(layout.ids, (name,)),
        dense=_places(layout.dense_columns, _dense_names(feature)),
        history=history,
    )


def _places(columns: Sequence[str], wanted: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.array([j for j, name in enumerate(columns) if name in wanted], np.int64)


def _dense_names(feature: Feature) -> Sequence[str]:
    name = feature.name
    if isinstance(feature, Match):
        return (f"{name}_count", f"{name}_days", f"{name}_missing")
    values = feature.statistics if isinstance(feature, Recent) else (name,)
    return (*values, *(f"{value}_missing" for value in values))
