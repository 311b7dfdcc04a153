"""Times on the wire: RFC 3339 with an offset, unix seconds inside."""

import math
import re
from datetime import UTC, datetime

import numpy as np

from model.contract.columns import Floats, Ids
from model.contract.errors import EncodeError

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


# Key in the metadata of a snapshot's files: the time they are as of, in unix seconds.
AS_OF = "ctr_as_of"

SECONDS_PER_DAY = 86400.0


def parse_time(text: str, *, field: str = "time") -> float:
    """Unix seconds of an RFC 3339 time.

    Raises:
        EncodeError: it is not one, or has no offset.
    """
    try:
        if not _RFC3339.fullmatch(text):
            raise ValueError
        return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError) as exc:
        raise EncodeError(
            field,
            f"expected an RFC 3339 time with an offset (2026-01-31T12:00:00Z), got {text[:40]!r}",
        ) from exc


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def time_part(part: str, local: Floats | float) -> Ids | int:
    """Hour of the day (`hour`), or day of the week from Monday 0, of local unix seconds.

    The same for one time as a plain number, without five arrays.
    """
    # 1970-01-01 was a Thursday.
    if isinstance(local, float):
        if part == "hour":
            return math.floor(local / 3600.0) % 24
        return (math.floor(local / SECONDS_PER_DAY) + 3) % 7
    if part == "hour":
        return (np.floor(local / 3600.0) % 24).astype(np.int64)
    return ((np.floor(local / SECONDS_PER_DAY) + 3) % 7).astype(np.int64)
