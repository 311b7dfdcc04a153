"""Learns from training rows what encoding needs: vocabularies and the moments of dense columns."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model.contract.blocks import BlockLayout
from model.contract.columns import Column, Columns, Dictionary, Ragged
from model.contract.encode import Encoder
from model.contract.errors import EncodeError
from model.contract.ids import canonical_id
from model.contract.spec import Categorical, FittedSchema, Moments, Schema

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

MIN_DEVIATION = 0.03


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

    Raises:
        EncodeError: a value does not fit its feature.
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
    request_columns = encoder.with_recent_statistics(request_columns, time=request_time)
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
    try:
        counts = _value_counts(column, rows)
    except TypeError as exc:
        raise EncodeError(feature.name, str(exc)) from exc
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
    moments: dict[str, Moments] = {}
    for name in layout.numerics:
        given, values = encoder.transform_numerics(
            layout, {name: columns[name]} if name in columns else {}, time=time
        )
        if given:
            column = values[:, 0] if rows is None else values[rows, 0]
            moments |= _column_moments(column, value=name, flag=f"{name}_missing")
    return moments


def _match_moments(encoder: Encoder, columns: Columns, time: Floats) -> dict[str, Moments]:
    layout = encoder.candidate_layout
    moments: dict[str, Moments] = {}
    for name in layout.matches:
        if f"{name}_count" not in columns:
            continue
        raw = [np.asarray(columns[f"{name}_{part}"]) for part in ("count", "last_time")]
        values = encoder.transform_matches([name], raw[0][None], raw[1][None], time=time)
        for j, part in enumerate(("count", "days")):
            moments |= _column_moments(values[j], value=f"{name}_{part}", flag=f"{name}_missing")
    return moments


def _column_moments(values: Floats, *, value: str, flag: str) -> dict[str, Moments]:
    """Moments of a column and of its missing flag; see `Moments`."""
    missing = np.isnan(values)
    share = float(missing.mean())
    present = values[~missing]
    mean = float(present.mean()) if len(present) else 0.0
    deviation = float(np.sqrt(np.where(missing, 0.0, values - mean).var()))
    return {
        value: Moments(mean=mean, std=_scale(deviation)),
        flag: Moments(mean=share, std=_scale(float(np.sqrt(share * (1.0 - share))))),
    }


def _scale(deviation: float) -> float:
    # The floor keeps a nearly constant column from being blown up; a constant one is left as it is.
    return max(deviation, MIN_DEVIATION) if deviation > 1e-9 else 1.0
