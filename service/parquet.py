"""Reading Parquet files that came from elsewhere: whatever is wrong with one is a `LogError`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from model.contract.errors import LogError


@contextlib.contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Translates the errors of the calls to polars inside.

    Args:
        what: What the file should be, for the message.
        path: The file.

    Raises:
        LogError: The file is missing, unreadable, or no intact Parquet.
    """
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as exc:
        reason = str(exc).partition("\n")[0][:200]
        raise LogError(f"{what} {path}: {reason}", path=path) from exc
    except pl.exceptions.PanicException as exc:
        # polars' reader gives up in this way on some damaged files.
        raise LogError(f"{what} {path}: the file is damaged", path=path) from exc
