"""Learns from training rows what encoding needs: vocabularies and the moments of dense columns."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout
from model.contract.columns import Column, Columns, Dictionary, Ragged
from model.contract.encode import Encoder
from model.contract.ids import canonical_id
from model.contract.spec import Categorical, FittedSchema, Moments, Schema

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def fit_schema(
    schema: Schema,
    *,
    request_columns: Columns,
    candidate_columns: Columns,
    request_time: Floats,
    request_of: Rows,
) -> FittedSchema:
    """Fits on the given rows, which must be training rows only.

    Request columns are counted once per impression, through `request_of`.
    """
    vocabularies = {
        feature.name: _vocabulary(
            feature,
            request_columns if feature.is_request_side else candidate_columns,
            request_of if feature.is_request_side else None,
        )
        for feature in schema.features
        if isinstance(feature, Categorical)
    }
    bare = FittedSchema(schema_=schema, vocabularies=vocabularies, moments={})
    encoder = Encoder(bare, serving=False)
    moments = _numeric_moments(
        encoder, encoder.request_layout, request_columns, request_time, rows=request_of
    )
    time = request_time[request_of]
    moments |= _numeric_moments(encoder, encoder.candidate_layout, candidate_columns, time)
    moments |= _match_moments(encoder, candidate_columns, time)
    return FittedSchema(schema_=schema, vocabularies=vocabularies, moments=moments)


def _vocabulary(feature: Categorical, columns: Columns, rows: Rows | None) -> tuple[str, ...]:
    """Canonical ids by falling count, then by text, so that equal data gives equal codes."""
    column = columns.get(feature.name)
    if column is None:
        return ()
    counts = _value_counts(column, rows)
    kept = [(-count, value) for value, count in counts.items() if count >= feature.min_count]
    return tuple(value for _, value in sorted(kept)[: feature.max_size])


def _value_counts(column: Column | Ragged, rows: Rows | None) -> Mapping[str, int]:
    assert not isinstance(column, Ragged)
    counts: Counter[str] = Counter()
    if isinstance(column, Dictionary):
        index = column.index if rows is None else column.index[rows]
        occurrences = np.bincount(index[index >= 0], minlength=len(column.values))
        pairs = list(zip(column.values, occurrences.tolist(), strict=True))
    else:
        values = list(column) if rows is None else [column[i] for i in rows]
        pairs = [(value, 1) for value in values]
    for value, count in pairs:
        canonical = canonical_id(value)
        if canonical is not None and count:
            counts[canonical] += count
    return counts


def _numeric_moments(
    encoder: Encoder,
    layout: BlockLayout,
    columns: Columns,
    time: Floats,
    *,
    rows: Rows | None = None,
) -> dict[str, Moments]:
    moments = {}
    for name in layout.numerics:
        given, values = encoder.transform_numerics(
            layout, {name: columns[name]} if name in columns else {}, time=time
        )
        if given:
            column = values[:, 0] if rows is None else values[rows, 0]
            moments[name] = _moments(column)
    return moments


def _match_moments(encoder: Encoder, columns: Columns, time: Floats) -> dict[str, Moments]:
    layout = encoder.candidate_layout
    moments = {}
    for name in layout.matches:
        if f"{name}_count" not in columns:
            continue
        raw = [np.asarray(columns[f"{name}_{part}"]) for part in ("count", "last_time")]
        values = encoder.transform_matches([name], raw[0][:, None], raw[1][:, None], time=time)
        moments[f"{name}_count"] = _moments(values[:, 0])
        moments[f"{name}_days"] = _moments(values[:, 1])
    return moments


def _moments(values: Floats) -> Moments:
    present = values[~np.isnan(values)]
    if not len(present):
        return Moments(mean=0.0, std=1.0)
    std = float(present.std())
    return Moments(mean=float(present.mean()), std=std if std > 1e-6 else 1.0)
