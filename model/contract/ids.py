"""Canonical form and hash of ids: one form offline and online, whatever type an id arrived as."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

HASH_NAME = "xxh64"
HASH_SEED = 0x43545230  # written into every record and manifest; another seed is another hash
NO_KEY = 0  # hash of a missing value: matches nothing


def canonical_id(value: object) -> str | None:
    """The one form of an id: `123`, `123.0` and `"123"` are one, other text stays as it is.

    Bytes are read as UTF-8, with undecodable ones kept by surrogate escape, so that the hash sees
    the same bytes again. None, NaN and "" are missing (None).

    Raises:
        TypeError: for a value that is no id (a boolean, a fraction, an infinity, a container).
    """
    if isinstance(value, str):
        return value or None
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        raise TypeError("expected an id (integer or text), got a boolean")
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return None
        if not float(value).is_integer():
            raise TypeError(f"expected an id (integer or text), got {value!r}")
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape") or None
    raise TypeError(f"expected an id (integer or text), got {type(value).__name__}")


def hash_id(canonical: str | None) -> int:
    """XXH64 of the canonical form's bytes, seeded; NO_KEY for a missing id, never for another."""
    if canonical is None:
        return NO_KEY
    return xxhash.xxh64_intdigest(_to_bytes(canonical), HASH_SEED) or 1


def key_of(value: object) -> int:
    """The hash of a raw id's canonical form.

    Raises:
        TypeError: as `canonical_id`.
    """
    return hash_id(canonical_id(value))


def hash_ids(canonical: Iterable[str | None]) -> npt.NDArray[np.uint64]:
    """`hash_id` of each, uint64 [n]."""
    return np.fromiter((hash_id(value) for value in canonical), np.uint64)


def canonical_ids(values: Sequence[object]) -> list[str | None]:
    """`canonical_id` of each; see there for what it raises."""
    return [canonical_id(value) for value in values]


def _to_bytes(canonical: str) -> bytes:
    return canonical.encode("utf-8", "surrogateescape")
