"""Raw columns: the forms in which raw values reach the encoder, and how each value is checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract.errors import EncodeError

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

LARGEST = 1e30  # standardised, it still fits into float32


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """A column as its distinct raw values and, per row, an index into them (-1 for null)."""

    values: Sequence[object]
    index: Ids


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A column of lists, newest first: flat values and times [total], row i at offsets[i:i+2]."""

    values: "Column"
    times: Floats
    offsets: Ids


# Any: a numpy column may be of any dtype; what it may hold is checked feature by feature.
Column = Sequence[object] | npt.NDArray[Any] | Dictionary
Columns = Mapping[str, Column | Ragged]


def numbers(name: str, column: Column | Ragged) -> Floats:
    """A raw column as float64 [n], NaN where missing.

    Raises:
        EncodeError: a value is no finite number, or beyond what float32 can hold.
    """
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        values = column.astype(np.float64)
    elif isinstance(column, Dictionary | Ragged):
        raise EncodeError(name, "expected a number, got a text or list column")
    else:
        values = np.array([number(name, value, row) for row, value in enumerate(column)])
    too_large = np.abs(values) > LARGEST
    if too_large.any():
        row = int(np.argmax(too_large))
        raise EncodeError(
            name, f"expected a finite number up to {LARGEST:g}, got {values[row]:g}", row=row
        )
    return values


def number(name: str, value: object, row: int) -> float:
    """One raw value as a float, NaN where missing; its size is not checked.

    Raises:
        EncodeError: it is no number.
    """
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise EncodeError(name, f"expected a number, got {_shorten(value)}", row=row)
    try:
        return float(value)
    except OverflowError as exc:
        raise EncodeError(name, "the number is too large", row=row) from exc


def map_id(name: str, value: object, function: Callable[[object], int]) -> int:
    """Applies a function to one raw id.

    Raises:
        EncodeError: the value is no id.
    """
    try:
        return function(value)
    except TypeError as exc:
        raise EncodeError(name, str(exc), row=0) from exc
    except UnicodeEncodeError as exc:
        raise EncodeError(name, f"{_shorten(value)} is no valid text", row=0) from exc


def map_ids(
    name: str, column: "Column | Ragged", function: Callable[[object], int], *, null: int
) -> Ids:
    """Applies a function to each raw value, to each distinct one only of a dictionary column.

    Args:
        name: the feature, for errors.
        column: raw ids.
        function: raw value to a code, or to a 64-bit hash (its bits are kept).
        null: the result where a dictionary column has no value.

    Raises:
        EncodeError: a value is no id.
    """
    if isinstance(column, Ragged):
        raise EncodeError(name, "expected one id, got a list")
    values: Sequence[object] | npt.NDArray[Any]
    values = column.values if isinstance(column, Dictionary) else column
    mapped = []
    for row, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
        try:
            mapped.append(function(value))
        except TypeError as exc:
            raise EncodeError(name, str(exc), row=row) from exc
        except UnicodeEncodeError as exc:
            raise EncodeError(name, f"{_shorten(value)} is no valid text", row=row) from exc
    if isinstance(column, Dictionary):
        mapped.append(null)
    codes = np.array(mapped, np.uint64).view(np.int64)
    return codes[column.index] if isinstance(column, Dictionary) else codes


def compact_ids(values: Column) -> Column:
    """A list of ids with each distinct one once, if none of them can be at fault; else as it is.

    Those that can are left to `map_ids`, which names their row.
    """
    if not isinstance(values, list) or set(map(type, values)) - {type(None)} not in ({str}, {int}):
        return values
    positions = {value: position for position, value in enumerate(dict.fromkeys(values))}
    index = np.fromiter(map(positions.__getitem__, values), np.int64, count=len(values))
    return Dictionary(values=list(positions), index=index)


def as_ragged(
    name: str, column: "Column | Ragged", times_column: "Column | Ragged | None"
) -> Ragged:
    """The ragged form of a column of id lists and one of lists of unix seconds beside it.

    Without times every id counts, however late.

    Raises:
        EncodeError: a value is no list, or has not as many times as ids.
    """
    if isinstance(column, Ragged):
        return column
    if isinstance(column, Dictionary) or isinstance(times_column, Dictionary | Ragged):
        raise EncodeError(name, "expected a list of ids and a list of their times")
    flat: list[object] = []
    flat_times: list[Floats] = []
    offsets = [0]
    for row, ids in enumerate(column):
        given = () if ids is None else ids
        if not isinstance(given, list | tuple):
            raise EncodeError(name, "expected a list of ids", row=row)
        times = None if times_column is None else times_column[row]
        if times is None:
            flat_times.append(np.full(len(given), -np.inf))
        elif not isinstance(times, list | tuple | np.ndarray) or len(times) != len(given):
            raise EncodeError(name, f"expected a list of {len(given)} times, one per id", row=row)
        else:
            flat_times.append(numbers(f"{name}_time", times))
        flat.extend(given)
        offsets.append(len(flat))
    return Ragged(
        values=flat,
        times=np.concatenate(flat_times) if flat_times else np.empty(0, np.float64),
        offsets=np.array(offsets, np.int64),
    )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
